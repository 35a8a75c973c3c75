"""Brings the graph of one model over to K models: every value in one of six layouts, every op by a rule.

A value of one model, ``[N, C, ...]``, stands in the fused graph as

- ``SAME``: one value for all models, ``[N, C, ...]``;
- ``STACK``: ``[K, N, C, ...]``;
- ``JOIN``: ``[K * N, C, ...]``, all models as one batch, as attention takes it;
- ``MATRIX``: ``[K, N * C * ..., W]``, W being the last dimension, as batched products take it;
- ``FOLD``: ``[N, K * C, ...]``, the channels of model 0 first, so that grouped convolutions, batch norm and
  pooling need no view at all;
- ``WEAVE``: ``[N * K, C, ...]``, one batch in which the models of an example follow one another: a fold in
  another shape, for what looks across channels.

A value keeps its layout through ops that know it, so that changes from one to another and back, which would
cancel, are not made.

What has no rule, or is called in a way that its rule does not know, runs once for each model on slices, which
is always right; so does what has other numbers among its arguments in each model, as a slice that takes a
sub-model's share of a value that all have. With ``in_turn`` every op does.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphsplit.builder import GraphBuilder, aten
from graphsplit.graphs import base_name, draws, drop_dead, node_arg, overload_of
from graphsplit.program import TRAINING, Dim, StateEntry, TensorMeta, op_name, source_of


class Layout(Enum):
    """How the values of K models stand in one tensor."""

    SAME = "same"
    STACK = "stack"
    JOIN = "join"
    MATRIX = "matrix"
    FOLD = "fold"
    WEAVE = "weave"


@dataclass(frozen=True, eq=False)
class Value:
    """What stands for a tensor of one model.

    Attributes:
        node: In the fused graph.
        layout: How the models stand in it.
        meta: Of one model's tensor.
        sizes: Of a matrix: those of the dimensions that are one in it, of which one may be -1.
    """

    node: fx.Node
    layout: Layout
    meta: TensorMeta
    sizes: tuple[Any, ...] = ()


Result = Value | tuple[Any, ...] | fx.Node
Rule = Callable[["Fuser", fx.Node, dict[str, Any]], Result | None]
Own = Mapping[fx.Node, Sequence[Any]]
"""Arguments (positional, by keyword) of each model, in nodes of the first, where they differ."""
RULES: dict[str, Rule] = {}
"""Rules by the base name of the op; one that gives None does not know this way to call it."""

_READ_MEMORY = {"as_strided", "as_strided_copy", "as_strided_scatter", "sym_stride", "sym_storage_offset"}
_NEW_MEMORY = {"linear", "addmm", "mm", "bmm"}
"""Ops whose result stands in memory in the same way whatever their operands do."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ops."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


class Fuser:
    """The fused graph under construction.

    Attributes:
        k: Number of models.
        build: What the graph is built with.
        looped: How many ops of each name run once for each model.
    """

    def __init__(
        self,
        k: int,
        same: Mapping[str, bool],
        constants: dict[str, StateEntry],
        own: Own,
        *,
        in_turn: bool = False,
    ) -> None:
        self.k = k
        self._own = own
        self._in_memory: set[fx.Node] = set()
        self._rules: Mapping[str, Rule] = {} if in_turn else RULES
        self.build = GraphBuilder(constants, same)
        self.looped: Counter[str] = Counter()
        self._same = same
        self._values: dict[fx.Node, Any] = {}
        self._as: dict[tuple[fx.Node, str], fx.Node] = {}

    def run(self, graph: fx.Graph, *, own_inputs: bool) -> fx.Graph:
        """The fused graph of a model's."""
        self._in_memory = _in_memory(graph)
        for node in graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, own=own_inputs)
            elif node.op == "get_attr":
                self._state(node)
            elif node.op == "output":
                self.build.output([self._returned(value) for value in node.args[0]])
                closing = next(iter(reversed(self.build.graph.nodes)))
                closing.meta.update({k: v for k, v in node.meta.items() if k != "value"})
            else:
                self.build.source = source_of(node)
                self._values[node] = self._call(node)
        drop_dead(self.build.graph)
        return self.build.graph

    # -- values ----------------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node, *, own: bool) -> None:
        meta = node.meta["value"]
        placeholder = self.build.placeholder(node)
        if own:
            placeholder.meta["value"] = self.stacked(meta)
        self._values[node] = Value(placeholder, Layout.STACK if own else Layout.SAME, meta)

    def _state(self, node: fx.Node) -> None:
        name, meta = str(node.target), node.meta.get("value")
        if name == TRAINING or not isinstance(meta, TensorMeta):
            self._values[node] = self.build.state(name, None)
            return
        same = self._same[name]
        read = self.build.state(name, meta if same else self.stacked(meta))
        self._values[node] = Value(read, Layout.SAME if same else Layout.STACK, meta)

    def _returned(self, value: Any) -> Any:
        found = self._values[value] if isinstance(value, fx.Node) else value
        return self.stack(found) if isinstance(found, Value) else found

    def stacked(self, meta: TensorMeta) -> TensorMeta:
        """``[K, ...]``."""
        return TensorMeta((Dim(self.k), *meta.dims), meta.dtype, meta.device)

    def folded(self, meta: TensorMeta) -> TensorMeta:
        """``[N, K * C, ...]``."""
        batch, channels, *rest = meta.dims
        return TensorMeta((batch, Dim(self.k * channels.hint), *rest), meta.dtype, meta.device)

    def can_fold(self, meta: TensorMeta) -> bool:
        """True where there is a dimension of channels, whose number is fixed."""
        return meta.ndim >= 2 and meta.dims[1].symbol is None

    def meta_in(self, layout: Layout, meta: TensorMeta) -> TensorMeta:
        """Of the fused tensor."""
        if layout is Layout.SAME:
            return meta
        makers = {Layout.STACK: self.stacked, Layout.MATRIX: self.flattened, Layout.FOLD: self.folded}
        return makers.get(layout, self.joined)(meta)

    def stack(self, value: Value) -> fx.Node:
        """The value as ``[K, ...]``."""
        if value.layout is Layout.STACK:
            return value.node
        return self._cached(value, "stack", self._stack)

    def _stack(self, value: Value) -> fx.Node:
        wanted = self.stacked(value.meta)
        if value.layout is Layout.SAME:
            one = TensorMeta((Dim(1), *value.meta.dims), value.meta.dtype, value.meta.device)
            lifted = self.build.call(aten.unsqueeze.default, (value.node, 0), one)
            return self.build.call(aten.expand.default, (lifted, [self.k] + [-1] * value.meta.ndim), wanted)
        if value.layout is Layout.JOIN:
            return self.build.call(aten.unflatten.int, (value.node, 0, [self.k, -1]), wanted)
        if value.layout is Layout.MATRIX:
            return self.build.call(aten.unflatten.int, (value.node, 1, list(value.sizes)), wanted)
        return self.exchange(self.apart(value), wanted)

    def exchange(self, node: fx.Node, value: TensorMeta) -> fx.Node:
        """The first two dimensions in the other order."""
        return self.permuted(node, [1, 0, *range(2, value.ndim)], value)

    def permuted(self, node: fx.Node, order: Sequence[int], value: TensorMeta) -> fx.Node:
        """Dimensions in another order; of what was permuted before, from where it came."""
        if node.target is aten.permute.default:
            before: Any = node.args[1]
            node, order = node_arg(node), [before[place] for place in order]
        return self.build.call(aten.permute.default, (node, list(order)), value)

    def apart(self, value: Value) -> fx.Node:
        """A folded or woven value as ``[N, K, C, ...]``."""
        return self._cached(value, "apart", self._apart)

    def _apart(self, value: Value) -> fx.Node:
        batch, *rest = value.meta.dims
        meta = TensorMeta((batch, Dim(self.k), *rest), value.meta.dtype, value.meta.device)
        args = (1, [self.k, rest[0].hint]) if value.layout is Layout.FOLD else (0, [-1, self.k])
        return self.build.call(aten.unflatten.int, (value.node, *args), meta)

    def fold(self, value: Value) -> fx.Node:
        """The value as ``[N, K * C, ...]``."""
        if value.layout is Layout.FOLD:
            return value.node
        return self._cached(value, "fold", self._fold)

    def _fold(self, value: Value) -> fx.Node:
        wanted = self.folded(value.meta)
        if value.layout is Layout.SAME:
            times = [1, self.k] + [1] * (value.meta.ndim - 2)
            return self.build.call(aten.repeat.default, (value.node, times), wanted)
        if value.layout is Layout.WEAVE:
            return self._regrouped(value, 1, wanted)
        batch, channels, *rest = value.meta.dims
        middle = TensorMeta((batch, Dim(self.k), channels, *rest), wanted.dtype, wanted.device)
        return self.flat(self.exchange(self.stack(value), middle), 1, wanted)

    def _regrouped(self, value: Value, dim: int, wanted: TensorMeta) -> fx.Node:
        """A fold as a weave, or the other way about: the same in memory."""
        if all(size.symbol is None for size in wanted.dims[1:]):
            return self.build.call(aten.reshape.default, (value.node, [-1, *wanted.shape[1:]]), wanted)
        return self.flat(self.apart(value), dim, wanted)

    def join(self, value: Value, layout: Layout = Layout.JOIN) -> fx.Node:
        """The value as ``[K * N, ...]``, or woven: all models as one batch; of a weight, the rows of all."""
        if value.layout is layout:
            return value.node
        return self._cached(value, layout.value, self._join if layout is Layout.JOIN else self._weave)

    def _weave(self, value: Value) -> fx.Node:
        wanted = self.joined(value.meta)
        if value.layout is Layout.FOLD:
            return self._regrouped(value, 0, wanted)
        batch, *rest = value.meta.dims
        middle = TensorMeta((batch, Dim(self.k), *rest), wanted.dtype, wanted.device)
        return self.flat(self.exchange(self.stack(value), middle), 0, wanted)

    def _join(self, value: Value) -> fx.Node:
        return self.flat(self.stack(value), 0, self.joined(value.meta))

    def joined(self, meta: TensorMeta) -> TensorMeta:
        """``[K * N, ...]``."""
        first, *rest = meta.dims
        size = Dim(self.k * first.hint, None if first.symbol is None else f"{self.k}*({first.symbol})")
        return TensorMeta((size, *rest), meta.dtype, meta.device)

    def matrix(self, value: Value) -> fx.Node:
        """The value, of two dimensions or more, as ``[K, ..., W]`` with all between as one."""
        if value.layout is Layout.MATRIX or value.meta.ndim == 2:
            return value.node if value.layout is Layout.MATRIX else self.stack(value)
        return self._cached(value, "matrix", self._matrix)

    def _matrix(self, value: Value) -> fx.Node:
        wanted, last = self.flattened(value.meta), value.meta.dims[-1]
        if value.layout is Layout.JOIN and last.symbol is None:
            return self.build.call(aten.reshape.default, (value.node, [self.k, -1, last.hint]), wanted)
        args = (self.stack(value), 1, value.meta.ndim - 1)
        return self.build.call(aten.flatten.using_ints, args, wanted)

    def flattened(self, meta: TensorMeta) -> TensorMeta:
        """``[K, ..., W]`` with all between as one."""
        *between, last = meta.dims
        fixed = all(dim.symbol is None for dim in between)
        symbol = None if fixed else "*".join(f"({dim})" for dim in between)
        rows = Dim(math.prod(dim.hint for dim in between), symbol)
        return TensorMeta((Dim(self.k), rows, last), meta.dtype, meta.device)

    def sizes(self, value: Value) -> tuple[Any, ...]:
        """Of all dimensions but the last, of which one may be left open, -1."""
        if value.sizes:
            return value.sizes
        found: list[Any] = []
        for place, size in enumerate(value.meta.dims[:-1]):
            if size.symbol is None:
                found.append(size.hint)
            elif -1 not in found:
                found.append(-1)
            else:
                found.append(self.build.call(aten.sym_size.int, (self.stack(value), place + 1), size))
        return tuple(found)

    def flat(self, node: fx.Node, dim: int, value: TensorMeta) -> fx.Node:
        """Two neighbouring dimensions as one."""
        return self.build.call(aten.flatten.using_ints, (node, dim, dim + 1), value)

    def aligned(self, value: Value, rank: int) -> fx.Node:
        """A stack with dimensions of one behind the first, to broadcast like a tensor of ``rank``."""
        node = self.stack(value)
        missing = rank - value.meta.ndim
        if not missing:
            return node
        return self._cached(value, f"aligned {rank}", lambda _: self._lifted(node, value.meta, missing))

    def _lifted(self, node: fx.Node, meta: TensorMeta, missing: int) -> fx.Node:
        dims = (Dim(self.k), *[Dim(1)] * missing, *meta.dims)
        lifted = TensorMeta(dims, meta.dtype, meta.device)
        return self.build.call(aten.unflatten.int, (node, 0, [self.k] + [1] * missing), lifted)

    def part(self, value: Value, number: int) -> fx.Node:
        """One model's value."""
        if value.layout is Layout.SAME:
            return value.node
        return self._cached(value, f"part {number}", lambda value: self._part(value, number))

    def _part(self, value: Value, number: int) -> fx.Node:
        """All are taken at once: the gradient of a single one would be as large as the whole."""
        parts = self._cached(value, "parts", self._parts)
        return self.build.call(operator.getitem, (parts, number), value.meta)

    def _parts(self, value: Value) -> fx.Node:
        return self.build.call(aten.unbind.int, (self.stack(value), 0), (value.meta,) * self.k)

    def _cached(self, value: Value, what: str, make: Callable[[Value], fx.Node]) -> fx.Node:
        key = (value.node, what)
        if key not in self._as:
            self._as[key] = make(value)
        return self._as[key]

    # -- ops -------------------------------------------------------------------------------------------------

    def value(self, node: Any) -> Any:
        """What stands for a node: a `Value`, several of them, or a number's node; anything else as it is."""
        return self._values[node] if isinstance(node, fx.Node) else node

    def lookup(self, argument: Any) -> Any:
        """An argument with nodes of the fused graph for sizes and flags, and with values for tensors."""
        return pytree.tree_map(self.value, argument, is_leaf=lambda x: isinstance(x, fx.Node))

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self._item(node)
        if node in self._own:
            return self._loop(
                node, [self._with_own_memory(node, self.lookup(own)) for own in self._own[node]]
            )
        given = self.lookup((node.args, node.kwargs))
        operands = [item for item in _leaves(given) if isinstance(item, Value)]
        overload = isinstance(node.target, torch._ops.OpOverload)  # what draws is each model's own
        if all(item.layout is Layout.SAME for item in operands) and not (overload and draws(node)):
            return self._as_it_is(node, given)
        if node.target is aten.copy_.default:
            buffer, value = operands
            return self.call(node.target, (self.stack(buffer), self.stack(value)), Layout.STACK, buffer.meta)
        if node in self._in_memory:
            return self._loop(node, [self._with_own_memory(node, given)] * self.k)
        if overload and base_name(node) in self._rules:
            found = self._rules[base_name(node)](self, node, self.arguments(node))
            if found is not None:
                return found
        return self._loop(node, [given] * self.k)

    def _with_own_memory(self, node: fx.Node, given: Any) -> Any:
        """Arguments with copies of state and inputs, where each model's are part of a stack in memory."""
        if not _is_of(node, _READ_MEMORY) or node_arg(node).op == "call_function":
            return given
        (x, *args), kwargs = given
        if x.layout is Layout.SAME:
            return given
        copies = [
            self.build.call(aten.clone.default, (self.part(x, number),), x.meta) for number in range(self.k)
        ]
        return (self._together(copies, x.meta), *args), kwargs

    def _item(self, node: fx.Node) -> Any:
        found = self.value(node_arg(node))
        if node not in self._own:
            return found[node.args[1]]
        parts = [self.part(found[args[1]], number) for number, (args, _) in enumerate(self._own[node])]
        return self._together(parts, node.meta["value"])

    def _as_it_is(self, node: fx.Node, given: Any) -> Any:
        args, kwargs = _nodes(given)
        made = self.build.call(node.target, args, node.meta.get("value"), kwargs)
        return self.wrap(made, Layout.SAME, node.meta.get("value"))

    def wrap(self, made: fx.Node, layout: Layout, meta: Any, sizes: tuple[Any, ...] = ()) -> Result:
        """The value, or values, that an op gives, of which ``meta`` is that of one model."""
        if isinstance(meta, TensorMeta):
            return Value(made, layout, meta, sizes)
        if not isinstance(meta, tuple):
            return made
        return tuple(
            Value(
                self.build.call(operator.getitem, (made, position), self.meta_in(layout, item)),
                layout,
                item,
                sizes,
            )
            if isinstance(item, TensorMeta)
            else item
            for position, item in enumerate(meta)
        )

    def _loop(self, node: fx.Node, each: Sequence[Any]) -> Any:
        """The op once for each model, with the arguments of each."""
        self.looped[op_name(node)] += 1
        meta = node.meta.get("value")
        results = []
        for number, given in enumerate(each):
            args, kwargs = self._of_one(given, number)
            results.append(self.build.call(node.target, args, meta, kwargs))
        if isinstance(meta, TensorMeta):
            return self._together(results, meta)
        if not isinstance(meta, tuple):
            return results[0]
        return tuple(
            self._together(
                [self.build.call(operator.getitem, (made, position), item) for made in results], item
            )
            if isinstance(item, TensorMeta)
            else item
            for position, item in enumerate(meta)
        )

    def _of_one(self, given: Any, number: int) -> Any:
        return pytree.tree_map(lambda x: self.part(x, number) if isinstance(x, Value) else x, given)

    def _together(self, results: Sequence[fx.Node], meta: TensorMeta) -> Value:
        """As a stack, which nothing reads where the next op runs once for each model, too."""
        made = self.build.call(aten.stack.default, (list(results), 0), self.stacked(meta))
        self._as.update(((made, f"part {number}"), result) for number, result in enumerate(results))
        return Value(made, Layout.STACK, meta)

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """Arguments by name, defaults too, with values for tensors."""
        found = {}
        for position, argument in enumerate(overload_of(node)._schema.arguments):
            if argument.name in node.kwargs:
                given: Any = node.kwargs[argument.name]
            elif not argument.kwarg_only and position < len(node.args):
                given = node.args[position]
            else:
                given = argument.default_value
            found[argument.name] = self.lookup(given)
        return found

    def invoke(
        self, node: fx.Node, arguments: Mapping[str, Any], layout: Layout, sizes: tuple[Any, ...] = ()
    ) -> Result:
        """The op of a node with other arguments, in which tensors are nodes already."""
        meta = node.meta.get("value")
        given = meta if isinstance(meta, tuple) else (meta,)
        values = tuple(self.meta_in(layout, item) if isinstance(item, TensorMeta) else item for item in given)
        made = self._invoked(node, arguments, values if isinstance(meta, tuple) else values[0])
        return self.wrap(made, layout, meta, sizes)

    def _invoked(self, node: fx.Node, arguments: Mapping[str, Any], value: Any) -> fx.Node:
        args, kwargs = [], {}
        for argument in overload_of(node)._schema.arguments:
            given = arguments[argument.name]
            if not argument.kwarg_only:
                args.append(given)
            elif given != argument.default_value:
                kwargs[argument.name] = given
        return self.build.call(node.target, tuple(args), value, kwargs)

    def call(
        self,
        target: Any,
        args: tuple[Any, ...],
        layout: Layout,
        meta: TensorMeta,
        sizes: tuple[Any, ...] = (),
    ) -> Value:
        """An op that gives a value with the meta of one model."""
        return Value(self.build.call(target, args, self.meta_in(layout, meta)), layout, meta, sizes)


def _in_memory(graph: fx.Graph) -> set[fx.Node]:
    """Ops that read how a tensor stands in memory, and those from which it has that.

    They run once for each model, so that it is as in the model.
    """
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        readers = (user for user in node.users if not _is_of(user, _NEW_MEMORY))
        if node.op == "call_function" and (_is_of(node, _READ_MEMORY) or not found.isdisjoint(readers)):
            found.add(node)
    return found


def _is_of(node: fx.Node, names: set[str]) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and base_name(node) in names


def _leaves(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree, is_leaf=lambda x: isinstance(x, (Value, slice)))


def _nodes(tree: Any) -> Any:
    """Values as nodes."""
    return pytree.tree_map(lambda x: x.node if isinstance(x, Value) else x, tree)
