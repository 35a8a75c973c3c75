"""An exported graph as a functional one.

Before::

    y = aten.relu_(x); v = aten.slice(z, 1, 0, 4); aten.add_(v, 1); use(z)

After::

    y = aten.relu(x); v = aten.slice(z, 1, 0, 4); v2 = aten.add(v, 1)
    z2 = aten.slice_scatter(z, v2, 1, 0, 4); use(z2)

Nested graphs (``no_grad`` regions, disabled autocast) are inlined, assertions dropped, writes to buffers
collected. Composite ops stay whole: `run_decompositions` changes gradients of dropout and batch norm and
scatters what one rule can see whole. Only those that are mere shorthands (`SHORTHANDS`) become their parts.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import make_fx

from graphsplit.errors import UnsupportedError
from graphsplit.graphs import int_arg, node_arg, overload_of, state_node
from graphsplit.program import Dim, Source, TensorMeta, op_name
from graphsplit.tracing.provenance import source_from_meta

aten = torch.ops.aten

DROPPED = {
    "_assert_tensor_metadata.default", "_assert_scalar.default", "sym_constrain_range.default",
    "sym_constrain_range_for_size.default", "_assert_async.default", "_assert_async.msg",
}  # fmt: skip

# Composite ops that say no more than their parts, which torch computes in their place anyway.
SHORTHANDS = {
    "hstack", "vstack", "row_stack", "dstack", "column_stack", "atleast_1d", "atleast_2d", "atleast_3d",
    "ravel", "fliplr", "flipud", "inner", "outer", "ger", "kron", "linalg_norm", "frobenius_norm",
    "linalg_vecdot", "linalg_multi_dot", "chain_matmul", "nanmean", "trapezoid", "cov", "corrcoef",
    "cartesian_prod", "pairwise_distance", "triplet_margin_loss", "cosine_embedding_loss",
    "margin_ranking_loss",
}  # fmt: skip

# In-place and out= overloads whose functional twin has another name.
TWINS: dict[str, Any] = {
    "bernoulli_.float": aten.bernoulli.p,
    "zero_.default": aten.zeros_like.default,
    "normal_.default": aten.normal_functional.default,
    "transpose_.default": aten.transpose.int,
}

# Views that name exactly one region of their base: how to write a new value of the view back into the base.
Inverse = Callable[["Functionalizer", fx.Node, fx.Node, fx.Node], fx.Node]


def _scatter(op: Any) -> Inverse:
    def inverse(self: Functionalizer, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
        arguments = [self.lookup(arg) for arg in view.args[1:]]
        return self.emit(op, (base, value, *arguments), base.meta)

    return inverse


def _slice_back(self: Functionalizer, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    whole: Any = ((), (0,), (0, sys.maxsize))
    if view.args[2:] in whole:
        return value
    return self.scatter(aten.slice_scatter.default, base, value, view.args[1:])


def _select_back(self: Functionalizer, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    return self.scatter(aten.select_scatter.default, base, value, view.args[1:])


def _reshape_back(self: Functionalizer, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    return self.emit(aten.reshape_as.default, (value, base), base.meta)


def _same_again(self: Functionalizer, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    return self.emit(view.target, (value, *view.args[1:]), base.meta)


def _permute_back(self: Functionalizer, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    order: Any = view.args[1]
    rank = len(order)
    back = [0] * rank
    for position, source in enumerate(order):
        back[source % rank] = position
    return self.emit(aten.permute.default, (value, back), base.meta)


def _identity(self: Functionalizer, view: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
    return value


INVERSES: dict[str, Inverse] = {
    "slice.Tensor": _slice_back,
    "select.int": _select_back,
    "diagonal.default": _scatter(aten.diagonal_scatter.default),
    "view.default": _reshape_back,
    "reshape.default": _reshape_back,
    "flatten.using_ints": _reshape_back,
    "unflatten.int": _reshape_back,
    "squeeze.dim": _reshape_back,
    "squeeze.dims": _reshape_back,
    "squeeze.default": _reshape_back,
    "unsqueeze.default": _reshape_back,
    "view_as.default": _reshape_back,
    "reshape_as.default": _reshape_back,
    "transpose.int": _same_again,
    "swapaxes.default": _same_again,
    "swapdims.default": _same_again,
    "t.default": _same_again,
    "permute.default": _permute_back,
    "alias.default": _identity,
    "detach.default": _identity,
    "dropout.default": _identity,
    "feature_dropout.default": _identity,
    "alpha_dropout.default": _identity,
    "feature_alpha_dropout.default": _identity,
    "contiguous.default": _identity,
    "lift_fresh_copy.default": _identity,
    "to.dtype": _identity,
    "to.dtype_layout": _identity,
    "to.device": _identity,
    "to.other": _identity,
    "type_as.default": _identity,
}

# Change the shape of their argument in place: what the tracer reads afterwards is a view like any other.
RESHAPING = {"unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_"}

# Change what memory a tensor has: rare, and not worth a rule.
REPLACING = {"resize_", "set_", "as_strided_"}

# Views that come as a list, with the position of their ``dim`` argument.
LIST_VIEWS = {
    "unbind.int": 1, "split.Tensor": 2, "split_with_sizes.default": 2, "chunk.default": 2,
    "tensor_split.sections": 2, "tensor_split.indices": 2,
}  # fmt: skip

# Give a view where the memory allows it, else a copy.
RESHAPES = {"reshape.default", "flatten.using_ints", "reshape_as.default"}

# Give their input itself where they drop nothing; the schema does not say so.
DROPOUTS = {
    "dropout.default",
    "feature_dropout.default",
    "alpha_dropout.default",
    "feature_alpha_dropout.default",
}


@dataclass
class FunctionalGraph:
    """Result: a graph without in-place ops, and the values to be written to buffers when it has run."""

    graph: fx.Graph
    outputs: tuple[Any, ...]
    writes: dict[str, fx.Node]


@dataclass
class Functionalizer:
    """Rebuilds one exported graph. ``strip`` turns a traced state name into the user's, and
    ``input_names`` are the names that the placeholders get."""

    exported: ExportedProgram
    strip: Callable[[str], str]
    input_names: Sequence[str]
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, Any] = field(default_factory=dict)  # exported node -> functional node (or literal)
    parents: dict[fx.Node, fx.Node] = field(default_factory=dict)  # exported view -> exported base
    versions: dict[fx.Node, int] = field(default_factory=dict)  # root -> number of writes
    fresh: dict[fx.Node, int] = field(default_factory=dict)  # exported node -> its root's version then
    roots: dict[fx.Node, str] = field(default_factory=dict)  # state placeholder -> name
    source: Source = field(default_factory=Source)
    differentiable: set[fx.Node] = field(default_factory=set)  # exported nodes through which gradients flow
    parameter_names: set[str] = field(default_factory=set)
    grad_enabled: bool = True
    _inside_region: bool = False  # a no_grad region whose results are detached when it ends

    def run(self) -> FunctionalGraph:
        """The functional twin of the exported graph."""
        signature = self.exported.graph_signature
        kinds = {spec.arg.name: spec for spec in signature.input_specs}
        self.parameters = {
            spec.arg.name for spec in signature.input_specs if spec.kind == InputKind.PARAMETER
        }
        outputs: tuple[Any, ...] = ()
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, kinds[node.name])
            elif node.op == "output":
                outputs = tuple(self.lookup(arg) for arg in node.args[0])
            else:
                self._node(node)
        user_outputs = tuple(
            value
            for value, spec in zip(outputs, signature.output_specs, strict=True)
            if spec.kind.name == "USER_OUTPUT"
        )
        writes = {
            name: self.read(root)
            for root, name in self.roots.items()
            if self.versions.get(root, 0) > 0 and kinds[root.name].kind == InputKind.BUFFER
        }
        for value, spec in zip(outputs, signature.output_specs, strict=True):
            if spec.kind.name == "BUFFER_MUTATION":
                writes[self.strip(spec.target)] = value
        return FunctionalGraph(self.graph, user_outputs, writes)

    # -- values ----------------------------------------------------------------------------------------------

    def emit(
        self, target: Any, args: tuple[Any, ...], meta: Mapping[str, Any], kwargs: Any = None
    ) -> fx.Node:
        """Append a call; ``meta`` gives its value, provenance is that of the node in hand."""
        node = self.graph.call_function(target, args, kwargs or {})
        node.meta["value"] = meta["value"]
        node.meta["source"] = self.source
        return node

    def scatter(self, target: Any, base: fx.Node, value: fx.Node, arguments: Sequence[Any]) -> fx.Node:
        """Append a write into a slice; of complex tensors as real ones, as torch has no gradient of these."""
        dim, *others = (self.lookup(argument) for argument in arguments)
        meta: TensorMeta = base.meta["value"]
        if not meta.dtype.is_complex:
            return self.emit(target, (base, value, dim, *others), base.meta)
        real = []
        for operand in (base, value):
            given: TensorMeta = operand.meta["value"]
            pairs = TensorMeta((*given.dims, Dim(2)), given.dtype.to_real(), given.device)
            real.append(self.emit(aten.view_as_real.default, (operand,), {"value": pairs}))
        written = self.emit(target, (*real, dim % meta.ndim, *others), real[0].meta)
        return self.emit(aten.view_as_complex.default, (written,), base.meta)

    def lookup(self, argument: Any) -> Any:
        """An argument of an exported node in terms of the new graph."""
        return fx.map_arg(argument, self.read)

    def root(self, node: fx.Node) -> fx.Node:
        """The exported node that owns the memory of a view: itself for what is none."""
        while node in self.parents:
            node = self.parents[node]
        return node

    def read(self, node: fx.Node) -> Any:
        """Current value of an exported node: a view is taken anew where its base was written since."""
        version = self.versions.get(self.root(node), 0)
        if node in self.parents and self.fresh.get(node, 0) < version:
            base = self.read(self.parents[node])
            self.values[node] = self._take_view(node, base)
            self.fresh[node] = version
        return self.values[node]

    def _take_view(self, node: fx.Node, base: fx.Node) -> fx.Node:
        if _is_alias(node):
            return base
        if node.target is operator.getitem:
            pieces = node_arg(node)
            again = self.emit(pieces.target, (base, *pieces.args[1:]), {"value": value_of(pieces)})
            return self.emit(operator.getitem, (again, node.args[1]), {"value": value_of(node)})
        arguments = [self.lookup(arg) for arg in node.args[1:]]
        return self.emit(node.target, (base, *arguments), {"value": value_of(node)}, self.lookup(node.kwargs))

    def write(self, node: fx.Node, value: fx.Node) -> None:
        """Make ``value`` the current value of an exported node and of everything that shares its memory."""
        if op_name(node) == "detach.default" or not self.grad_enabled:
            self._refuse_hidden_write(node)
        if not self.grad_enabled:
            value = self._without_gradient(value)
        if node in self.parents:
            parent = self.parents[node]
            base = self.read(parent)
            if _is_alias(node):
                back = value
            elif node.target is operator.getitem:
                back = self._piece_back(node, base, value)
            else:
                inverse = INVERSES.get(op_name(node))
                if inverse is None:
                    raise self._no_inverse(op_name(node))
                quiet = op_name(node) == "detach.default"
                back = inverse(self, node, base, self._without_gradient(value) if quiet else value)
            self.write(parent, back)
        else:
            self.versions[node] = self.versions.get(node, 0) + 1
        self.values[node] = value
        self.fresh[node] = self.versions[self.root(node)]

    def _no_inverse(self, name: str) -> UnsupportedError:
        return UnsupportedError(
            f"{name} gives a view that is written in place",
            where=str(self.source),
            hint="write to a copy instead (`x = x.clone()` before, or the out-of-place op)",
        )

    def _refuse_hidden_write(self, node: fx.Node) -> None:
        """A write that autograd does not see leaves gradients that no functional graph gives."""
        base = self.parents.get(node, node) if op_name(node) == "detach.default" else node
        if base in self.differentiable or self.root(node) in self.differentiable:
            raise UnsupportedError(
                "a value that needs a gradient is written in place where autograd does not look "
                "(under no_grad, or through detach)",
                where=str(self.source),
                hint="compute a new value instead, such as torch.where(mask, x.detach(), x)",
            )

    def _piece_back(self, node: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node:
        """Write one piece of an ``unbind``, ``split`` or ``chunk`` back into the tensor that was divided."""
        pieces, index = node_arg(node), int_arg(node, 1)
        if op_name(pieces) not in LIST_VIEWS:
            raise self._no_inverse(op_name(pieces))
        position = LIST_VIEWS[op_name(pieces)]
        dim = int_arg(pieces, position) if len(pieces.args) > position else 0
        if op_name(pieces) == "unbind.int":
            return self.scatter(aten.select_scatter.default, base, value, (dim, index))
        sizes = [piece.dims[dim].hint for piece in value_of(pieces)]
        start = sum(sizes[:index])
        return self.scatter(aten.slice_scatter.default, base, value, (dim, start, start + sizes[index]))

    # -- nodes -----------------------------------------------------------------------------------------------

    def _placeholder(self, node: fx.Node, spec: Any) -> None:
        if spec.kind == InputKind.USER_INPUT:
            position = sum(other.op == "placeholder" for other in self.graph.nodes)
            new = self.graph.placeholder(self.input_names[position])
            new.target = new.name  # generated code calls its argument by this
        elif spec.kind == InputKind.CUSTOM_OBJ:
            kind = type(self.exported.constants.get(spec.target)).__name__
            users = [source_from_meta(user.meta, self.strip) for user in node.users]
            raise UnsupportedError(
                f"forward makes or holds a {kind}, which is no tensor: programs hold none",
                where=next((str(source) for source in users if source.file), None),
                hint="draw random numbers without a generator of your own (torch.manual_seed sets them)",
            )
        else:
            name = self.strip(spec.target)
            new = state_node(self.graph, name) or self.graph.create_node("get_attr", name)
            self.roots[node] = name
            if spec.kind == InputKind.PARAMETER:
                self.differentiable.add(node)
                self.parameter_names.add(name)
        new.meta["value"] = value_of(node)
        self.values[node] = new

    def _node(self, node: fx.Node) -> None:
        self.source = source_from_meta(node.meta, self.strip)
        try:
            self._rebuild(node)
        except UnsupportedError as error:
            error.where = error.where or str(self.source)
            raise

    def _rebuild(self, node: fx.Node) -> None:
        name = op_name(node)
        if name in DROPPED or _only_checked(node):
            return
        if node.target is torch._C._set_grad_enabled:
            self.grad_enabled = bool(node.args[0])
            return
        if (
            self.grad_enabled
            and name != "detach.default"
            and any(operand in self.differentiable for operand in node.all_input_nodes)
        ):
            self.differentiable.add(node)
        if name.partition(".")[0] in RESHAPING and node_arg(node).op != "placeholder":
            node.target = functional_twin(node.target)
        if node.op == "get_attr":
            self.values[node] = getattr(self.exported.graph_module, str(node.target))
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            self._nested(node)
        elif node.target is operator.getitem and isinstance(self.values.get(node_arg(node)), tuple):
            self._bind_value(node, self.values[node_arg(node)][node.args[1]])
        elif _is_shorthand(node):
            self._bind_value(node, self._inline(_parts(node), node.all_input_nodes)[0])
        elif isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            self._in_place(node)
        else:
            self._plain(node)

    def _plain(self, node: fx.Node) -> None:
        base = _viewed(node)
        if base is not None and op_name(node) == "lift_fresh_copy.default":
            self.values[node] = self.read(base)
            return
        if base is not None:
            self.parents[node] = base
            self.fresh[node] = self.versions.get(self.root(base), 0)
        value = self.emit(
            node.target, self.lookup(node.args), {"value": value_of(node)}, self.lookup(node.kwargs)
        )
        if not self.grad_enabled and not self._inside_region:
            value = self._detached(value)
        self.values[node] = value

    def _detached(self, value: fx.Node) -> fx.Node:
        meta = value.meta.get("value")
        if isinstance(meta, TensorMeta) and _is_float(meta):
            return self.emit(aten.detach.default, (value,), value.meta)
        return value

    def _without_gradient(self, value: fx.Node) -> fx.Node:
        """A value as it is written where autograd does not look: detached, if a gradient flows through it."""
        return self._detached(value) if self._has_gradient(value) else value

    def _has_gradient(self, value: fx.Node) -> bool:
        """May a gradient flow through a node of the new graph, to an input or to a parameter?"""
        seen, rest = {value}, [value]
        while rest:
            node = rest.pop()
            meta = node.meta["value"]
            if node.target is aten.detach.default or (isinstance(meta, TensorMeta) and not _is_float(meta)):
                continue
            if node.op == "placeholder" or (node.op == "get_attr" and node.target in self.parameter_names):
                return True
            new = set(node.all_input_nodes) - seen
            seen |= new
            rest += new
        return False

    def _in_place(self, node: fx.Node) -> None:
        """``x.op_(...)`` becomes ``y = op(x, ...)``, and whoever reads x afterwards reads y."""
        schema = overload_of(node)._schema
        operand: Any = node.kwargs["out"] if "out" in node.kwargs else node.args[0]
        written: fx.Node = operand
        name = op_name(node)
        root = self.root(written)
        if root.op == "placeholder" and root.name in self.parameters:
            raise UnsupportedError(
                f"{name} writes to the parameter {self.roots[root]} in the forward pass",
                where=str(self.source),
                hint="do this outside of forward, or use torch.nn.utils.parametrize",
            )
        if root.target is operator.getitem and _shares_memory(root.args[0]):
            raise self._no_inverse(op_name(node_arg(root)))
        mutated = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        twin = functional_twin(node.target) if len(mutated) == 1 else None
        if name.partition(".")[0] in RESHAPING | REPLACING:
            twin = None
        if name == "copy_.default":
            self._assign(node, written, self.read(node_arg(node, 1)))
            return
        if twin is None:
            raise UnsupportedError(
                f"{name} works in place and has no functional twin",
                where=str(self.source),
                hint="use the out-of-place form in the model",
            )
        kwargs = {key: self.lookup(arg) for key, arg in node.kwargs.items() if key != "out"}
        meta = {"value": value_of(written)}
        given = {argument.name for argument in schema.arguments[len(node.args) :]} & set(node.kwargs)
        for argument in schema.arguments[len(node.args) :]:
            if argument.name not in given and not argument.kwarg_only and argument.default_value is not None:
                kwargs.setdefault(argument.name, argument.default_value)
        value = self.emit(twin, self.lookup(node.args), meta, _accepted(twin, kwargs))
        dtype = meta["value"].dtype
        others = [arg.meta.get("value") for arg in value.all_input_nodes]
        if any(isinstance(other, TensorMeta) and other.dims and other.dtype != dtype for other in others):
            value = self.emit(aten.to.dtype, (value, dtype), meta)
        self._rebind(node, written, value)

    def _assign(self, node: fx.Node, written: fx.Node, value: fx.Node) -> None:
        """``x.copy_(y)``: y in the shape and dtype of x. (``aten.copy`` has no derivative.)"""
        meta = {"value": value_of(written)}
        target, source = meta["value"], value.meta["value"]
        if source.dtype != target.dtype:
            value = self.emit(
                aten.to.dtype, (value, target.dtype), {"value": replace(source, dtype=target.dtype)}
            )
        if source.dims != target.dims:
            value = self.emit(aten.expand_as.default, (value, self.read(written)), meta)
        self._rebind(node, written, value)

    def _rebind(self, node: fx.Node, written: fx.Node, value: fx.Node) -> None:
        self.write(written, value)
        if node is not written:
            self.parents[node] = written
            self.values[node] = value
            self.fresh[node] = self.versions[self.root(written)]

    def _nested(self, node: fx.Node) -> None:
        """Inline a ``no_grad`` region or a disabled autocast; refuse what changes semantics."""
        name = op_name(node)
        enabled: Any = True
        if name == "wrap_with_set_grad_enabled":
            enabled, body, operands = node.args[0], node_arg(node, 1), node.args[2:]
        elif name == "wrap_with_autocast" and node.args[2] is False:
            body, operands = node_arg(node, 4), node.args[5:]
        else:
            raise UnsupportedError(
                f"the model holds the control-flow or region op {name}",
                where=str(self._place_of_region(node)),
                hint="trace the model without it (for autocast: enter autocast outside of the model)",
            )
        module: fx.GraphModule = self.values[body]
        if name == "wrap_with_autocast" and not any(
            inner.op == "call_function" for inner in module.graph.nodes
        ):
            # What torch.export leaves of a no_grad block in an autocast block: where it was cannot be told.
            raise UnsupportedError(
                "a no_grad block inside an autocast block, which torch.export loses",
                where=str(self._place_of_region(node)),
                hint="put the no_grad block outside of the autocast block",
            )
        before = self.grad_enabled, self._inside_region
        if not enabled:
            self.grad_enabled, self._inside_region = False, True
        elif name == "wrap_with_set_grad_enabled":
            self.grad_enabled, self._inside_region = True, False
        results = self._inline(module, operands)
        self.grad_enabled, self._inside_region = before
        if not enabled:
            for result in results:
                if isinstance(result, fx.Node) and result.op == "call_function":
                    self.values[result] = self._detached(self.read(result))
                    self.parents.pop(result, None)
        self.values[node] = results

    def _inline(self, module: fx.GraphModule, operands: Sequence[Any]) -> tuple[Any, ...]:
        """Rebuild the nodes of another graph in the place of a node; returns what that graph does."""
        outer = list(operands)
        results: tuple[Any, ...] = ()
        for inner in module.graph.nodes:
            if inner.op == "placeholder":
                self._bind_value(inner, outer.pop(0))
            elif inner.op == "output":
                returned = inner.args[0]
                results = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
            elif inner.op == "get_attr":
                self.values[inner] = getattr(module, str(inner.target))
            else:
                self._node(inner)
        return results

    def _place_of_region(self, node: fx.Node) -> Source:
        """Provenance of a region op, or of the first op in it: the tracer gives regions none."""
        metas = [node.meta]
        for body in node.all_input_nodes:
            module = self.values.get(body)
            if isinstance(module, fx.GraphModule):
                metas += [inner.meta for inner in module.graph.nodes]
        found = [source_from_meta(meta, self.strip) for meta in metas]
        around = node
        while not any(source.file for source in found) and around.op != "output":
            around = around.next
            found.append(source_from_meta(around.meta, self.strip))
        return next((source for source in found if source.file), found[0])

    def _bind_value(self, node: fx.Node, value: Any) -> None:
        """Let ``node`` be another name of an exported node (or a literal)."""
        if isinstance(value, fx.Node):
            self.values[node] = self.read(value)
            self.parents[node] = value
            self.fresh[node] = self.versions.get(self.root(value), 0)
        else:
            self.values[node] = value


def _is_float(meta: TensorMeta) -> bool:
    """Can a tensor have a gradient?"""
    return meta.dtype.is_floating_point or meta.dtype.is_complex


def _only_checked(node: fx.Node) -> bool:
    """True for a number (an ``item``, a comparison) that only assertions read, which are dropped."""
    return (
        node.op == "call_function"
        and not isinstance(node.meta.get("val"), torch.Tensor)
        and bool(node.users)
        and all(op_name(user) in DROPPED or _only_checked(user) for user in node.users)
    )


def _is_alias(node: fx.Node) -> bool:
    """A node that is its base under another name: an in-place op's result, a binding of an inlined graph."""
    if node.target is operator.getitem:
        return isinstance(node_arg(node).target, torch._ops.HigherOrderOperator)
    if node.op == "placeholder" or _is_shorthand(node):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_shorthand(node: fx.Node) -> bool:
    """Is a call one of `SHORTHANDS`?"""
    return node.op == "call_function" and op_name(node).partition(".")[0] in SHORTHANDS


def _parts(node: fx.Node) -> fx.GraphModule:
    """The ops that a composite op is made of, as a graph over its operands."""
    operands = node.all_input_nodes

    def call(*values: Any) -> Any:
        given = dict(zip(operands, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), given.__getitem__)
        return overload_of(node).decompose(*args, **kwargs)

    parts: fx.GraphModule = make_fx(call)(*(operand.meta["val"] for operand in operands))
    parts.graph.eliminate_dead_code()
    for part in parts.graph.nodes:
        part.meta = {**node.meta, "val": part.meta.get("val")}
    return parts


def _viewed(node: fx.Node) -> fx.Node | None:
    """The exported node whose memory this node's result shares, if any."""
    target = node.target
    if target is operator.getitem:
        pieces = node_arg(node)
        whole = pieces.args[0] if _shares_memory(pieces) else None
        return whole if isinstance(whole, fx.Node) else None
    if not isinstance(target, torch._ops.OpOverload) or not node.args:
        return None
    if op_name(node) in DROPOUTS and (node.args[1] == 0 or node.args[2] is False):
        return node_arg(node)
    schema = target._schema
    if not schema.arguments or schema.arguments[0].alias_info is None or len(schema.returns) != 1:
        return None
    if str(schema.returns[0].type) != "Tensor":
        return None
    base = node.args[0]
    if not isinstance(base, fx.Node):
        return None
    name = op_name(node)
    before: Any = base.meta.get("val")
    after: Any = node.meta.get("val")
    if name == "contiguous.default" and not before.is_contiguous():
        return None
    if name in RESHAPES and not _can_view(before, after):
        return None
    converts = name.startswith("to.") or name == "type_as.default"
    if converts and (before.dtype != after.dtype or before.device != after.device):
        return None
    return base


def _shares_memory(pieces: Any) -> bool:
    """True for ops whose several results share memory with an operand."""
    target = pieces.target if isinstance(pieces, fx.Node) else None
    if op_name(pieces) in LIST_VIEWS:
        return True
    return isinstance(target, torch._ops.OpOverload) and any(
        argument.alias_info is not None for argument in target._schema.arguments
    )


def _can_view(before: Any, after: Any) -> bool:
    """Can a tensor with these strides be reshaped without a copy?"""
    shape = [_dim(size).hint for size in before.shape]
    stride = [_dim(step).hint for step in before.stride()]
    try:
        torch.empty_strided(shape, stride, device="meta").view([_dim(size).hint for size in after.shape])
    except RuntimeError:
        return False
    return True


def _accepted(op: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords without the defaults that an op fills in by itself."""
    defaults = {argument.name: argument.default_value for argument in op._schema.arguments}
    return {name: value for name, value in kwargs.items() if name not in defaults or defaults[name] != value}


def functional_twin(op: Any) -> Any:
    """The overload that computes what an in-place or ``out=`` overload writes; None where there is none."""
    packet_name, _, overload = str(op).removeprefix("aten.").partition(".")
    name = f"{packet_name}.{overload}"
    if name in TWINS:
        return TWINS[name]
    if overload == "out" or overload.endswith("_out"):
        overload = {"out": "Tensor"}.get(overload, overload.removesuffix("_out"))
        base = packet_name
    elif packet_name.endswith("_"):
        base = packet_name[:-1]
    elif packet_name.startswith("__i"):
        base = "__" + packet_name[3:]
    else:
        return None
    packet = getattr(aten, base, None)
    for candidate in (overload, "default"):
        if packet is not None and candidate in packet.overloads():
            return getattr(packet, candidate)
    return None


def value_of(node: fx.Node) -> Any:
    """`TensorMeta`, `Dim` or a tuple of them for an exported node, from its fake tensors."""
    return _meta(node.meta.get("val"))


def _meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorMeta(tuple(_dim(size) for size in value.shape), value.dtype, str(value.device))
    if isinstance(value, (tuple, list)):
        return tuple(_meta(item) for item in value)
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return _dim(value)
    return None


def _dim(size: int | torch.SymInt) -> Dim:
    if isinstance(size, int):
        return Dim(size)
    expression = size.node.expr
    if expression.is_number:
        return Dim(int(expression))
    hint = size.node.hint
    if hint is None:
        raise UnsupportedError(
            "the size of a tensor depends on values of another (an index by a mask, nonzero, item)",
            hint="use torch.where or a gather with a fixed number of entries",
        )
    return Dim(int(hint), str(expression))
