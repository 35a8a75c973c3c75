"""What rules of fusion share: arguments, and operands in the layout of others."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphsplit.builder import aten
from graphsplit.fusion.fuser import Fuser, Layout, Value
from graphsplit.graphs import base_name
from graphsplit.program import Dim, TensorMeta

Arguments = dict[str, Any]
SAME, STACK, FOLD = Layout.SAME, Layout.STACK, Layout.FOLD
JOIN, WEAVE, MATRIX = Layout.JOIN, Layout.WEAVE, Layout.MATRIX


def values_of(arguments: Arguments) -> list[Value]:
    """Tensors among arguments, those of lists too."""
    found = []
    for argument in arguments.values():
        items = argument if isinstance(argument, (list, tuple)) else [argument]
        found += [item for item in items if isinstance(item, Value)]
    return found


def with_nodes(arguments: Arguments, change: Any) -> Arguments:
    """Arguments with every value changed to a node."""

    def changed(item: Any) -> Any:
        if isinstance(item, Value):
            return change(item)
        if isinstance(item, (list, tuple)):
            return [changed(each) for each in item]
        return item

    return {name: changed(argument) for name, argument in arguments.items()}


def joinable(fuser: Fuser, value: Value, result: TensorMeta, layout: Layout) -> fx.Node | None:
    """An operand that broadcasts against all models as one batch; None where it has to be a stack."""
    own = value.meta
    if value.layout is SAME:
        return value.node if own.ndim < result.ndim or own.dims[0] == Dim(1) else None
    if (value.layout, layout) == (FOLD, JOIN) or own.ndim != result.ndim or own.dims[0] != result.dims[0]:
        return None
    return fuser.join(value, layout)


def one_batch(values: list[Value]) -> Layout:
    """In which order all models are one batch: woven where the operands are, or are the same in memory."""
    return WEAVE if all(value.layout in (WEAVE, FOLD) for value in values) else JOIN


def results_of(node: fx.Node) -> list[Any]:
    """What is known of each result of one model's op."""
    metas = node.meta.get("value")
    return list(metas) if isinstance(metas, tuple) else [metas]


def is_for_products(node: fx.Node) -> bool:
    """Do products read the value, or what dropout leaves of it?"""
    names = {base_name(user) if user.op == "call_function" else "" for user in node.users}
    if names == {"dropout"}:
        return all(map(is_for_products, node.users))
    return "linear" in names


def rows_of_models(fuser: Fuser, x: Value, meta: TensorMeta) -> Value:
    """Folded images ``[N, K * C, H, W]`` as rows of each model, ``[K, N, C * H * W]``."""
    batch, width = meta.dims
    apart = TensorMeta((batch, Dim(fuser.k), width), meta.dtype, meta.device)
    rows = fuser.build.call(aten.reshape.default, (x.node, [-1, fuser.k, width.hint]), apart)
    return Value(fuser.exchange(rows, fuser.stacked(meta)), STACK, meta)
