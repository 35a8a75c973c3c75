"""Rules of fusion for ops along some dimensions of a tensor."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphsplit.builder import aten
from graphsplit.fusion.fuser import Fuser, Result, Value, rule
from graphsplit.fusion.rules.operands import (
    FOLD,
    JOIN,
    MATRIX,
    SAME,
    STACK,
    WEAVE,
    Arguments,
    is_for_products,
    one_batch,
    results_of,
    rows_of_models,
    values_of,
    with_nodes,
)
from graphsplit.fusion.rules.pointwise import pointwise
from graphsplit.graphs import base_name, overload_of
from graphsplit.program import Dim, TensorMeta, meta_of

_ONE = {
    "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "sum", "mean",
    "var", "std", "amax", "amin", "max", "min", "argmax", "argmin", "topk", "sort", "argsort", "any", "all",
    "prod", "logsumexp", "linalg_vector_norm", "norm", "squeeze", "flip", "select", "slice", "narrow",
    "split",
    "split_with_sizes", "chunk", "unbind", "cat", "glu", "cosine_similarity", "diff", "count_nonzero",
    "tensor_split", "cummax", "cummin", "roll", "gather", "transpose", "swapaxes", "movedim",
    "unfold", "flatten", "unflatten", "index_select", "scatter", "scatter_add", "repeat_interleave",
    "slice_scatter", "index_add", "index_copy", "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_fft2",
    "fft_ifft2", "fft_rfft2", "fft_irfft2",
}  # fmt: skip
_BY_INDEX = {"index_select", "index_add", "index_copy"}
_NAMES = ("dim", "dim0", "dim1", "dims", "axis0", "axis1", "source", "destination", "dimension", "start_dim",
          "end_dim")  # fmt: skip
_REDUCES_ALL = {
    "sum", "mean", "var", "std", "amax", "amin", "max", "min", "any", "all", "prod", "norm", "argmax",
    "argmin", "linalg_vector_norm", "squeeze", "flip", "roll", "count_nonzero",
}  # fmt: skip
_FOLDED = _ONE - _BY_INDEX - {"cosine_similarity", "unbind", "movedim", "norm", "unflatten"}


@rule(*_ONE)
def along(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """The same dimension, one further on; on folded values where it is behind the channels."""
    if "other" in arguments and base_name(node) in ("max", "min"):
        return pointwise(fuser, node, arguments)
    if base_name(node) == "cat":  # an empty list of numbers counts for nothing, whatever its rank
        arguments = {**arguments, "tensors": [x for x in arguments["tensors"] if x.meta.shape != (0,)]}
    keep = arguments.get("index") if base_name(node) in _BY_INDEX else None
    if keep is not None and keep.layout is not SAME:
        return None
    moving = [value for value in values_of(arguments) if value is not keep]
    rank = moving[0].meta.ndim
    if not rank or any(value.meta.ndim != rank for value in moving):
        return None
    dims = {
        name: arguments[name]
        for name in _NAMES
        if name in arguments and not isinstance(arguments[name], Value)
    }
    if base_name(node) in _REDUCES_ALL and all(dim is None or dim == [] for dim in dims.values()):
        return _to_one_number(fuser, node, arguments, moving)
    places = {name: _normal(dim, rank) for name, dim in dims.items() if dim is not None}
    for way in (_along_folded, _along_joined, _along_matrices):
        found = way(fuser, node, arguments, moving, places)
        if found is not None:
            return found
    shifted = {name: _shift(place) for name, place in places.items()}

    def stacked(value: Value) -> fx.Node:
        return value.node if value is keep else fuser.stack(value)

    return fuser.invoke(node, {**with_nodes(arguments, stacked), **shifted}, STACK)


def _to_one_number(fuser: Fuser, node: fx.Node, arguments: Arguments, values: list[Value]) -> Result | None:
    """Sum or mean over everything of one model."""
    target = {"sum": aten.sum.dim_IntList, "mean": aten.mean.dim}.get(base_name(node))
    if target is None or "dim" in arguments:
        return None
    (x,) = values
    dims = list(range(1, x.meta.ndim + 1))
    options = {} if arguments["dtype"] is None else {"dtype": arguments["dtype"]}
    meta = meta_of(node)
    made = fuser.build.call(target, (fuser.stack(x), dims), fuser.stacked(meta), options)
    return Value(made, STACK, meta)


def _flat(places: dict[str, Any]) -> list[int]:
    return [place for entry in places.values() for place in (entry if isinstance(entry, list) else [entry])]


def _along_joined(
    fuser: Fuser, node: fx.Node, arguments: Arguments, values: list[Value], places: dict[str, Any]
) -> Result | None:
    """Behind the batch of all models."""
    batch, layout = values[0].meta.dims[0], one_batch(values)
    fitting = (JOIN,) if layout is JOIN else (WEAVE, FOLD) if _flat(places) == [1] else (WEAVE,)
    if any(value.layout not in fitting or value.meta.dims[0] != batch for value in values):
        return None
    results = results_of(node)
    if not all(isinstance(item, TensorMeta) and item.dims[:1] == (batch,) for item in results):
        return None
    if not places or min(_flat(places)) < 1:
        return None
    nodes = with_nodes(arguments, lambda value: fuser.join(value, layout) if value in values else value.node)
    return fuser.invoke(node, {**nodes, **places}, layout)


def _along_matrices(
    fuser: Fuser, node: fx.Node, arguments: Arguments, values: list[Value], places: dict[str, Any]
) -> Result | None:
    """Along the last dimension."""
    *between, _ = values[0].meta.dims
    if any(value.layout is not MATRIX or list(value.meta.dims[:-1]) != between for value in values):
        return None
    if set(_flat(places)) != {len(between)}:
        return None
    if base_name(node) == "unflatten" and -1 not in {*values[0].sizes} & {*arguments["sizes"]}:
        args = (values[0].node, [fuser.k, *values[0].sizes, *arguments["sizes"]])
        return fuser.call(aten.reshape.default, args, STACK, meta_of(node))
    results = results_of(node)
    if not all(isinstance(item, TensorMeta) and list(item.dims[:-1]) == between for item in results):
        return None
    last = {name: [2] if isinstance(place, list) else 2 for name, place in places.items()}
    nodes = with_nodes(arguments, lambda value: value.node)
    return fuser.invoke(node, {**nodes, **last}, MATRIX, values[0].sizes)


def _along_folded(
    fuser: Fuser, node: fx.Node, arguments: Arguments, values: list[Value], places: dict[str, Any]
) -> Result | None:
    if base_name(node) not in _FOLDED or any(value.layout is not FOLD for value in values):
        return None
    if not all(isinstance(item, TensorMeta) and fuser.can_fold(item) for item in results_of(node)):
        return None
    flat = _flat(places)
    if base_name(node) == "flatten" and is_for_products(node) and flat == [1, values[0].meta.ndim - 1]:
        return rows_of_models(fuser, values[0], meta_of(node))
    first = 1 if base_name(node) == "flatten" else 2
    if flat and min(flat) >= first:
        return fuser.invoke(node, {**with_nodes(arguments, lambda value: value.node), **places}, FOLD)
    if flat == [1] and base_name(node) in ("cat", "chunk", "split", "split_with_sizes", "slice", "narrow"):
        return _along_channels(fuser, node, arguments, next(iter(places)))
    return None


def _along_channels(fuser: Fuser, node: fx.Node, arguments: Arguments, name: str) -> Result | None:
    """On ``[N, K, C, ...]``, where models and their channels are apart."""

    def apart(meta: TensorMeta) -> TensorMeta:
        batch, channels, *rest = meta.dims
        return TensorMeta((batch, Dim(fuser.k), channels, *rest), meta.dtype, meta.device)

    meta = node.meta["value"]
    given = {**with_nodes(arguments, fuser.apart), name: 2}
    args = tuple(given[a.name] for a in overload_of(node)._schema.arguments)
    if isinstance(meta, TensorMeta):
        made = fuser.build.call(node.target, args, apart(meta))
        return Value(fuser.flat(made, 1, fuser.folded(meta)), FOLD, meta)
    made = fuser.build.call(node.target, args, tuple(apart(item) for item in meta))
    pieces = fuser.wrap(made, SAME, tuple(apart(item) for item in meta))
    assert isinstance(pieces, tuple)
    return tuple(
        Value(fuser.flat(piece.node, 1, fuser.folded(item)), FOLD, item)
        for piece, item in zip(pieces, meta, strict=True)
    )


def _normal(dim: Any, rank: int) -> Any:
    return [_normal(each, rank) for each in dim] if isinstance(dim, (list, tuple)) else dim % rank


def _shift(dim: Any) -> Any:
    return [_shift(each) for each in dim] if isinstance(dim, (list, tuple)) else dim + 1
