"""Rules of fusion for ops on entries, and for new tensors."""

from __future__ import annotations

from torch import fx

from graphsplit.analysis.rules.pointwise import NARY, UNARY
from graphsplit.fusion.fuser import Fuser, Layout, Result, Value, rule
from graphsplit.fusion.rules.operands import (
    FOLD,
    JOIN,
    MATRIX,
    SAME,
    STACK,
    WEAVE,
    Arguments,
    joinable,
    values_of,
    with_nodes,
)
from graphsplit.graphs import base_name, draws
from graphsplit.program import TensorMeta

_BY_CHANNEL = {"feature_dropout", "feature_alpha_dropout"}


@rule(*(name for name in (*UNARY, *NARY) if name not in _BY_CHANNEL), "to", "_to_copy")
def pointwise(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Broadcasting as in one model, in the layout of an operand where all can be in it, else on stacks."""
    meta = node.meta.get("value")
    values = values_of(arguments)
    if not isinstance(meta, TensorMeta) or _promotes(values, meta):
        return None
    if base_name(node) in ("fill", "copy", "masked_fill"):  # into the first, in its shape
        first, *others = values
        if any(value.layout is not SAME and value.meta.ndim == 0 for value in others):
            return None
        if first.layout is SAME:
            whole = Value(fuser.stack(first), STACK, first.meta)
            arguments = {**arguments, "self": whole}
            values = [whole, *others]
    if any(value.layout is FOLD for value in values) and fuser.can_fold(meta):
        nodes = {value: _foldable(fuser, value, meta) for value in values}
        if all(found is not None for found in nodes.values()):
            return fuser.invoke(node, with_nodes(arguments, nodes.__getitem__), FOLD)
    for layout in (MATRIX, JOIN, WEAVE):
        alike = (WEAVE, FOLD) if layout is WEAVE else (layout,)
        led = next((value for value in values if value.layout in alike), None)
        if led is not None:
            nodes = {value: _in_layout(fuser, value, meta, layout) for value in values}
            if all(found is not None for found in nodes.values()):
                return fuser.invoke(node, with_nodes(arguments, nodes.__getitem__), layout, led.sizes)

    def stacked(value: Value) -> fx.Node:
        if value.layout is SAME and not (draws(node) and value.meta.ndim == meta.ndim):
            return value.node
        return fuser.aligned(value, meta.ndim)

    return fuser.invoke(node, with_nodes(arguments, stacked), STACK)


def _promotes(values: list[Value], result: TensorMeta) -> bool:
    """True where a stack would choose another dtype: tensors without dimensions yield to those with some."""
    if result.ndim == 0:
        return len({value.meta.dtype for value in values}) > 1
    dtypes = {value.meta.dtype for value in values if value.meta.ndim}
    return any(not v.meta.ndim and v.layout is not SAME and v.meta.dtype not in dtypes for v in values)


@rule("type_as")
def type_as(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Of the other tensor only the dtype matters."""
    x = arguments["self"]
    return fuser.invoke(node, {"self": x.node, "other": arguments["other"].node}, x.layout, x.sizes)


def _foldable(fuser: Fuser, value: Value, result: TensorMeta) -> fx.Node | None:
    """An operand that broadcasts against folded values; None where it has to be a stack."""
    channels, own = result.shape[1], value.meta
    if value.layout is FOLD:
        return value.node if own.ndim == result.ndim and own.shape[1] == channels else None
    place = 1 - (result.ndim - own.ndim)  # where the operand's channels are
    many = place >= 0 and own.shape[place] == channels and channels > 1
    if value.layout is SAME and not many:
        return value.node
    if not many:
        return None
    if place == 1:
        return fuser.fold(value) if own.dims[1].symbol is None else None
    return fuser.join(value) if value.layout is STACK else None


def _in_layout(fuser: Fuser, value: Value, result: TensorMeta, layout: Layout) -> fx.Node | None:
    """An operand that broadcasts against others in a layout; None where it has to be a stack."""
    own = value.meta
    if layout is not MATRIX:
        return joinable(fuser, value, result, layout)
    if own.ndim <= 1:
        return value.node if value.layout is SAME else fuser.aligned(value, 2)
    if value.layout in (SAME, FOLD) or own.dims[:-1] != result.dims[:-1]:
        return None
    return fuser.matrix(value)


@rule("rand", "randn")
def random_numbers(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Each model's own, drawn together."""
    return fuser.invoke(node, {**arguments, "size": [fuser.k, *arguments["size"]]}, STACK)


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def new(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """The same for all: only dtype and device come from the tensor."""
    return fuser.invoke(node, with_nodes(arguments, lambda value: value.node), SAME)
