"""Unit inference: one forward walk over the graphs, by the rules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from graphsplit.analysis.facts import RULES, Facts, Path
from graphsplit.analysis.units import SHARED, Factors, Ids, UnitBuilder, varying
from graphsplit.errors import InternalError
from graphsplit.graphs import is_kept, node_arg
from graphsplit.program import TRAINING, Dim, Program, TensorMeta, op_name, source_of

aten = torch.ops.aten

LARGEST_CONSTANT = 1 << 20
MOVES = {
    "view.default", "reshape.default", "flatten.using_ints", "squeeze.dim", "squeeze.default",
    "unsqueeze.default", "permute.default", "transpose.int", "alias.default", "clone.default",
    "contiguous.default",
}  # fmt: skip
CUTS = {"slice.Tensor", "select.int", "narrow.default"}
PASSED_ON = MOVES | CUTS | {
    "detach.default", "expand.default", "squeeze.dims", "t.default", "to.dtype", "_to_copy.default",
}  # fmt: skip
KNOWN = {torch.bool, torch.int32, torch.int64, torch.float32, torch.float64}


@dataclass
class Inference:
    """Facts about every node of a program for a given K, before anything is assigned to a sub-model.

    Attributes:
        facts: Per node that is not common.
        common: Nodes with the same value in all sub-models: it depends on none of `own`.
        data: Nodes that depend on the model's inputs.
        state: For each parameter, written buffer or table the ids along each of its dimensions.
        own: Their names: a sub-model has values of its own there.
        holding: Nodes that kept units whole, whatever their rules say of it.
    """

    program: Program
    k: int
    units: UnitBuilder
    facts: dict[fx.Node, Facts] = field(default_factory=dict)
    common: set[fx.Node] = field(default_factory=set)
    data: set[fx.Node] = field(default_factory=set)
    state: dict[str, list[Ids | None]] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)
    holding: list[fx.Node] = field(default_factory=list)
    _constants: dict[fx.Node, NDArray[Any] | None] = field(default_factory=dict, repr=False)

    # -- what rules ask for ----------------------------------------------------------------------------------

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a node's tensor in the traced example."""
        value = node.meta["value"]
        assert isinstance(value, TensorMeta), node
        return value.shape

    def factors(self, node: Any) -> Factors:
        """Factors of an operand: none for constants and common values, fresh ids for a parameter seen first.

        Factors that were shared are left out, so that they hold nothing else together.
        """
        if not isinstance(node, fx.Node) or node in self.common:
            return ()
        if node.op == "get_attr":
            found = self._state_factors(node)
        else:
            outputs = self.facts[node].outputs
            assert isinstance(outputs, tuple), node
            found = outputs
        return tuple(ids for ids in found if not self.units.is_shared(ids))

    def _state_factors(self, node: fx.Node) -> Factors:
        dims = self.state[str(node.target)]
        for dim, size in enumerate(self.shape(node)):
            if size > 1 and dims[dim] is None:
                dims[dim] = self.units.fresh(size)
        return self.known_factors(node)

    def known_factors(self, node: fx.Node) -> Factors:
        """Factors of a state tensor as far as its dimensions have been set."""
        return state_factors(self.state[str(node.target)], self.shape(node))

    def unset(self, node: Any, dim: int) -> bool:
        """True for a dimension of a state tensor that nothing has been said of yet."""
        return (
            isinstance(node, fx.Node)
            and node.op == "get_attr"
            and node not in self.common
            and self.state[str(node.target)][dim] is None
            and self.shape(node)[dim] > 1
        )

    def adopt(self, node: fx.Node, dim: int, ids: Ids | None) -> None:
        """Give a dimension of a state tensor the ids ``[size]`` that it meets; None shares it."""
        dims = self.state[str(node.target)]
        size = self.shape(node)[dim]
        if size == 1:
            return
        if ids is None:
            ids = np.zeros(size, np.int64)
        known = dims[dim]
        if known is None:
            dims[dim] = ids.reshape(size)
        else:
            self.units.couple(known, ids.reshape(size))

    def is_common(self, node: Any) -> bool:
        """True for an operand that is the same in all sub-models: constants, and values of inputs alone."""
        return not isinstance(node, fx.Node) or node in self.common

    def share(self, node: Any) -> None:
        """Keep all units of an operand whole."""
        for ids in self.factors(node):
            self.units.share(ids)

    def hold(self, node: Any, dims: Sequence[int]) -> tuple[Factors, bool]:
        """Factors of an operand with the units along ``dims`` kept whole.

        Returns:
            The factors along the other dimensions, and whether a factor was lost because it has no others.
        """
        lost = False
        if isinstance(node, fx.Node):
            for dim in dims:
                if self.unset(node, dim):
                    self.adopt(node, dim, None)
        kept = []
        for ids in self.factors(node):
            held = [dim for dim in dims if ids.shape[dim] > 1]
            if not held:
                kept.append(ids)
            elif len(held) < len(varying(ids)):
                kept.append(self.units.tie(ids, held))
            else:
                self.units.share(ids)
                lost = True
        return tuple(kept), lost

    def constant(self, node: Any) -> NDArray[Any] | None:
        """Values of a small tensor that no input and no state dict can change; None where there are none."""
        if node not in self._constants:
            self._constants[node] = self._evaluate(node)
        return self._constants[node]

    def _evaluate(self, node: Any) -> NDArray[Any] | None:
        if not isinstance(node, fx.Node) or node not in self.common or node in self.data:
            return None
        value = node.meta.get("value")
        if not isinstance(value, TensorMeta) or math.prod(value.shape) > LARGEST_CONSTANT:
            return None
        if any(dim.symbol is not None for dim in value.dims) or value.device == "meta":
            return None
        if node.op == "get_attr":
            entry = self.program.state.get(str(node.target))
            if entry is None or entry.kind == "parameter" or entry.name in self._written():
                return None
            return _array(entry.tensor) if entry.kind == "constant" or not entry.persistent else None
        if not isinstance(node.target, torch._ops.OpOverload) or is_kept(node):
            return None
        values: dict[fx.Node, torch.Tensor] = {}
        for operand in node.all_input_nodes:
            found = self.constant(operand)
            if found is None:
                return None
            values[operand] = torch.from_numpy(found.copy())
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        return _array(node.target(*args, **kwargs))

    def _written(self) -> set[str]:
        """Names of the buffers that the graphs write."""
        return {str(node_arg(n).target) for n in self.program.nodes() if n.target is aten.copy_.default}

    # -- the walk --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Walk over all graphs and fill in the facts."""
        writes = [node for node in self.program.nodes() if node.target is aten.copy_.default]
        running = {name for node in self.program.nodes() for name in running_statistics(node)}
        self.own |= {n for n, e in self.program.state.items() if e.kind == "parameter"} | running
        # A written buffer is common if what is written is (a counter is, an average of activations is not).
        while True:
            self._mark()
            written = {str(node_arg(node).target) for node in writes if node.args[1] not in self.common}
            if written <= self.own:
                break
            self.own |= written
        for name in (name for name in self.program.state if name in self.own):
            self.state[name] = [None] * self.program.state[name].tensor.dim()
        for graph in self.program.graphs:
            for node in graph.nodes:
                if node.op == "call_function" and node not in self.common:
                    self.facts[node] = self._apply(node)
            self._output(graph)
        for name in self.state:
            self._keep_unread(name)
        for name, dims in self.state.items():
            shape = self.program.state[name].tensor.shape
            self.state[name] = [
                np.zeros(n, np.int64) if d is None else d for d, n in zip(dims, shape, strict=True)
            ]

    def _keep_unread(self, name: str) -> None:
        """Keep entries of a state tensor whole that are cut off, as rows of a table for longer inputs are."""
        read: list[Ids] = []
        cuts: list[fx.Node] = []
        stack = [node for node in self.program.nodes() if node.op == "get_attr" and node.target == name]
        while stack:
            node = stack.pop()
            passed = [user for user in node.users if op_name(user) in PASSED_ON]
            if len(passed) < len(node.users):
                if node.op == "get_attr":
                    return
                read += self.factors(node)
            stack += passed
            cuts += [user for user in passed if op_name(user) in CUTS]
        if not cuts:
            return
        seen = np.unique(np.concatenate([np.zeros(1, np.int64), *(ids.ravel() for ids in read)]))
        for ids in self.state[name]:
            if ids is not None and (unread := np.setdiff1d(ids, seen)).size:
                component = self.units.components()
                self.units.share(unread)
                if component[np.intersect1d(ids, seen)].any():  # else no entry is a unit
                    facts = self.facts[cuts[0]]
                    facts.whole = facts.whole or "what the example inputs do not reach is kept whole"

    def tables(self) -> set[str]:
        """Buffers whose every use meets as many units along one dimension, as one of positions does.

        Their entries are dealt out with the units, and streams that share one are divided alike. One met
        along two dimensions, such as a mask on a weight, has entries of no sub-model, which would be lost.
        """
        candidates = {
            name: [node for node in self.program.nodes() if node.op == "get_attr" and node.target == name]
            for name, entry in self.program.state.items()
            if entry.kind == "buffer" and name not in self.own and entry.tensor.is_floating_point()
        }
        if not candidates:
            return set()
        component = self.units.components()

        def is_table(nodes: list[fx.Node]) -> bool:
            uses = [[ids for ids in met if component[ids].any()] for met in self._met(nodes)]
            if not uses or not all(len(met) == 1 and len(varying(met[0])) == 1 for met in uses):
                return False
            first, *others = (np.unique(component[met[0]], return_inverse=True)[1].ravel() for met in uses)
            return all(np.array_equal(first, other) for other in others)

        return {name for name, nodes in candidates.items() if is_table(nodes)}

    def _met(self, nodes: Sequence[fx.Node]) -> list[Factors]:
        """For each use of a state tensor the factors that meet it there."""
        found: list[Factors] = []
        stack = list(nodes)
        while stack:
            node = stack.pop()
            for user in node.users:
                if op_name(user) in PASSED_ON:
                    stack.append(user)
                    continue
                expects = self.facts[user].expects if user in self.facts else {}
                places = [place for place, operand in operands(user) if operand is node]
                found.append(tuple(ids for place in places for ids in expects.get(place, ())))
        return found

    def _mark(self) -> None:
        self.common.clear()
        self.data.clear()
        for node in self.program.nodes():
            if node.op == "placeholder":
                self.common.add(node)
                self.data.add(node)
            elif node.op == "get_attr":
                if str(node.target) == TRAINING or str(node.target) not in self.own:
                    self.common.add(node)
            else:
                inputs = node.all_input_nodes
                if all(item in self.common for item in inputs):
                    self.common.add(node)
                # Sizes tell nothing of values: a parameter expanded to the batch is none of the data.
                if any(item in self.data for item in inputs) and not isinstance(node.meta.get("value"), Dim):
                    self.data.add(node)

    def _apply(self, node: fx.Node) -> Facts:
        found = RULES.get(op_name(node))
        before = self.units.shares
        facts = found(self, node) if found else whole(self, node, f"{op_name(node)} has no rule")
        if self.units.shares > before:
            self.holding.append(node)
        value = node.meta.get("value")
        if isinstance(facts.outputs, tuple):
            facts.outputs = self._one_kind_each(facts, self._clean(node, value, facts.outputs))
        else:
            values = value if isinstance(value, tuple) else (value,) * len(facts.outputs)
            facts.outputs = [
                self._clean(node, item, factors) for item, factors in zip(values, facts.outputs, strict=True)
            ]
        return facts

    def _clean(self, node: fx.Node, value: Any, factors: Factors) -> Factors:
        """Drop factors that vary nowhere; the one unit of such a value is then in every sub-model."""
        kept = []
        for ids in factors:
            if isinstance(value, TensorMeta) and not _fits(ids, value.shape):
                raise InternalError(
                    f"the rule of {op_name(node)} gives a factor {ids.shape} for a result {value.shape}",
                    where=str(source_of(node)),
                )
            if not ids.size:
                continue  # an empty tensor belongs to nobody
            if varying(ids):
                kept.append(ids)
            elif ids.size and ids.flat[0] != SHARED:
                self.units.share(ids)
        return tuple(kept)

    def _one_kind_each(self, facts: Facts, factors: Factors) -> Factors:
        """Where two kinds of units lie along one dimension (a flattened outer product) one is kept whole: the
        inner one, but where K divides that alone."""
        dims = [dim for ids in factors for dim in varying(ids)]
        if len(dims) == len(set(dims)):
            return factors
        kept: list[Ids] = []
        for ids in sorted(factors, key=lambda ids: (np.unique(ids).size % self.k != 0, -_first_run(ids))):
            if any(set(varying(ids)) & set(varying(other)) for other in kept):
                self.units.share(ids)
                facts.whole = "an outer product of units is flattened"
            else:
                kept.append(ids)
        return tuple(kept)

    def _output(self, graph: fx.Graph) -> None:
        """Whatever reaches an output is shared by all sub-models."""
        for value in output_nodes(graph):
            if isinstance(value, fx.Node):
                self.share(value)


def _array(value: Any) -> NDArray[Any] | None:
    """A tensor's values, where numpy has its type."""
    if not isinstance(value, torch.Tensor) or value.device.type == "meta" or value.dtype not in KNOWN:
        return None
    found: NDArray[Any] = value.detach().cpu().numpy()
    return found


def _first_run(ids: Ids) -> int:
    """How often the first id stands before another one comes: 1 for the innermost of flattened dimensions."""
    return int(np.argmax(ids.ravel() != ids.flat[0]))


def _fits(ids: Ids, shape: tuple[int, ...]) -> bool:
    """A factor has the rank of its tensor, and its sizes or 1."""
    return ids.ndim == len(shape) and all(n in (1, size) for n, size in zip(ids.shape, shape, strict=True))


def whole(inference: Inference, node: fx.Node, reason: str) -> Facts:
    """Keep the units of all operands whole: every sub-model computes the op just as the original does.

    Always right, never fine: each sub-model then holds a full copy of what is coupled to the operands.
    """
    for operand in node.all_input_nodes:
        inference.share(operand)
    value = node.meta.get("value")
    return Facts([() for _ in value] if isinstance(value, tuple) else (), whole=reason)


def state_factors(dims: list[Ids | None], shape: tuple[int, ...]) -> Factors:
    """One factor for each dimension of a state tensor that has units."""
    return tuple(
        ids.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        for dim, ids in enumerate(dims)
        if ids is not None and shape[dim] > 1 and ids.any()
    )


def running_statistics(node: fx.Node) -> list[str]:
    """Names of the buffers that a normalisation updates by itself."""
    if op_name(node) in ("batch_norm.default", "instance_norm.default"):
        return [
            str(arg.target) for arg in node.args[3:5] if isinstance(arg, fx.Node) and arg.op == "get_attr"
        ]
    return []


def output_nodes(graph: fx.Graph) -> tuple[Any, ...]:
    """The flat values that a graph returns."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    values: Any = output.args[0]
    return tuple(values)


def operands(node: fx.Node) -> Iterator[tuple[Path, fx.Node]]:
    """Tensor operands with their places."""
    for position, argument in enumerate(node.args):
        if isinstance(argument, fx.Node):
            yield (position,), argument
        elif isinstance(argument, (tuple, list)):
            for inner, item in enumerate(argument):
                if isinstance(item, fx.Node):
                    yield (position, inner), item
    for name, argument in node.kwargs.items():
        if isinstance(argument, fx.Node):
            yield name, argument


def infer(program: Program, k: int, *, outermost: bool = False) -> Inference:
    """Run unit inference.

    Args:
        program: What to analyse.
        k: Number of sub-models; decides which dimension carries the units where there is a choice.
        outermost: The outer dimension carries them whether K divides it or not: heads, and groups.
    """
    import graphsplit.analysis.rules  # noqa: F401 - registers the rules

    inference = Inference(program, k, UnitBuilder(1 if outermost else k))
    inference.run()
    tables = inference.tables()
    if tables:
        inference = Inference(program, k, UnitBuilder(1 if outermost else k), own=tables)
        inference.run()
    return inference
