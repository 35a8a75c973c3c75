"""Slices, selections, concatenations, look-ups by index: ids move as the data does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from graphsplit.analysis.facts import Facts, Path, argument, indexed, rolled, rule, written_places
from graphsplit.analysis.inference import Inference, whole
from graphsplit.analysis.rules.pointwise import align, meet
from graphsplit.analysis.units import SHARED, Factors, Ids, varying
from graphsplit.graphs import node_arg, node_list_arg


@rule("operator.getitem")
def getitem(inference: Inference, node: fx.Node) -> Facts:
    """One result of an op that has several."""
    container, index = node_arg(node), node.args[1]
    facts = inference.facts[container]
    assert isinstance(facts.outputs, list) and isinstance(index, int)
    return Facts(facts.outputs[index], linear=(container,) if facts.linear else (), keeps_zero=True)


def _take(ids: Ids, dim: int, index: int | slice) -> Ids:
    """Index one dimension of a factor, which may have size 1 there because it does not vary."""
    if isinstance(index, int):
        taken: Ids = np.take(ids, 0 if ids.shape[dim] == 1 else index, axis=dim)
        return taken
    if ids.shape[dim] == 1:
        return ids
    lead = (slice(None),) * dim
    cut = ids[(*lead, index)]
    if cut.shape[dim]:
        return cut
    # An empty slice has units along its other dimensions, or none.
    first = ids[(*lead, slice(0, 1))]
    return first if varying(first) else np.full_like(first, SHARED)


def cut(inference: Inference, node: fx.Node, index: Any, position: int = 1) -> Facts:
    """A slice or one entry of a dimension."""
    x = node_arg(node)
    shape = inference.shape(x)
    dim = int(argument(node, position, "dim", 0)) % len(shape)
    if isinstance(index, slice) and any(isinstance(v, fx.Node) for v in (index.start, index.stop)):
        return _cut_by_the_batch(inference, x, dim)
    factors = inference.factors(x)
    taken = tuple(_take(ids, dim, index) for ids in factors)
    return Facts(taken, linear=(x,), keeps_zero=True, whole=_alone(factors, taken))


def _cut_by_the_batch(inference: Inference, x: fx.Node, dim: int) -> Facts:
    """A slice whose bounds are sizes of inputs: what lies along it stays whole, the rest is as before."""
    if inference.unset(x, dim):
        inference.adopt(x, dim, None)
    along = any(ids.shape[dim] > 1 for ids in inference.factors(x))
    factors, _ = inference.hold(x, [dim])
    reason = "a slice along units whose bounds depend on the batch" if along else None
    return Facts(factors, linear=(x,), keeps_zero=True, whole=reason)


ONE_UNIT = "one unit is taken by itself"


def _alone(before: Factors, after: Factors) -> str | None:
    """A reason where a piece holds one unit alone, which is then in every sub-model."""
    pairs = zip(before, after, strict=True)
    return ONE_UNIT if any(varying(ids) and not varying(own) and own.any() for ids, own in pairs) else None


@rule("slice.Tensor")
def slice_(inference: Inference, node: fx.Node) -> Facts:
    """``x[..., start:end:step, ...]``."""
    bounds = slice(argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1))
    return cut(inference, node, bounds)


@rule("narrow.default")
def narrow(inference: Inference, node: fx.Node) -> Facts:
    """``x[..., start:start + length, ...]``."""
    start: Any = node.args[2]
    length: Any = node.args[3]
    if isinstance(start, fx.Node) or isinstance(length, fx.Node):
        x = node_arg(node)
        return _cut_by_the_batch(inference, x, int(argument(node, 1, "dim", 0)) % len(inference.shape(x)))
    return cut(inference, node, slice(start, start + length))


@rule("select.int")
def select(inference: Inference, node: fx.Node) -> Facts:
    """``x[..., index, ...]``."""
    index = node.args[2]
    return cut(inference, node, index if isinstance(index, int) else 0)


@rule("unbind.int")
def unbind(inference: Inference, node: fx.Node) -> Facts:
    """Every entry of a dimension."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    dim = int(argument(node, 1, "dim", 0)) % rank
    factors = inference.factors(x)
    pieces = [tuple(_take(ids, dim, i) for ids in factors) for i in range(len(node.meta["value"]))]
    reasons = [_alone(factors, piece) for piece in pieces]
    return Facts(list(pieces), linear=(x,), keeps_zero=True, whole=next(filter(None, reasons), None))


@rule(
    "split.Tensor",
    "split_with_sizes.default",
    "chunk.default",
    "tensor_split.sections",
    "tensor_split.indices",
    "unsafe_split.Tensor",
    "unsafe_chunk.default",
)
def split(inference: Inference, node: fx.Node) -> Facts:
    """Consecutive pieces of a dimension."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    dim = int(argument(node, 2, "dim", 0)) % rank
    factors = inference.factors(x)
    pieces: list[Factors] = []
    start = 0
    for piece in node.meta["value"]:
        size = piece.shape[dim]
        pieces.append(tuple(_take(ids, dim, slice(start, start + size)) for ids in factors))
        start += size
    reasons = [_alone(factors, piece) for piece in pieces]
    return Facts(list(pieces), linear=(x,), keeps_zero=True, whole=next(filter(None, reasons), None))


@rule("cat.default", "concat.default", "concatenate.default")
def cat(inference: Inference, node: fx.Node) -> Facts:
    """Tensors one after the other; entries without units (inputs, zeros) are shared."""
    rank = node.meta["value"].ndim
    dim = int(argument(node, 1, "dim", 0)) % rank
    # An empty vector (the start of a cache) may stand beside tensors of any rank.
    parts: list[tuple[Path, fx.Node]] = [
        ((0, place), tensor) for place, tensor in enumerate(node_list_arg(node))
        if len(inference.shape(tensor)) == rank or inference.shape(tensor) != (0,)
    ]  # fmt: skip
    tensors = [tensor for _, tensor in parts]
    linear = tuple(tensor for tensor in tensors if not inference.is_common(tensor))
    _yield_along(inference, tensors, dim)
    along = [[ids for ids in inference.factors(t) if ids.shape[dim] > 1] for t in tensors]
    if not any(along):
        factors, expects = align(inference, rank, parts)
        return Facts(factors, expects, linear=linear, keeps_zero=True)
    if any(len(found) > 1 for found in along):
        return whole(inference, node, "cat along a dimension with several kinds of units")
    others = sorted({d for found in along for ids in found for d in varying(ids) if d != dim})
    pieces = []
    for tensor, found in zip(tensors, along, strict=True):
        shape = inference.shape(tensor)
        target = [shape[d] if d == dim or d in others else 1 for d in range(rank)]
        if found:
            ids = found[0]
        else:
            rest = [f for f in inference.factors(tensor) if set(varying(f)) & set(others)]
            ids = rest[0] if rest else np.zeros((1,) * rank, np.int64)
        pieces.append(np.broadcast_to(ids, target))
    joined = np.concatenate(pieces, axis=dim)
    beside = [
        (path, tensor) for path, tensor in parts
        if any(not set(varying(f)) & {dim, *others} for f in inference.factors(tensor))
    ]  # fmt: skip
    outputs: Factors = (joined,)
    if beside:
        for _, tensor in parts:
            for ids in inference.factors(tensor):
                if not set(varying(ids)) & {dim, *others}:
                    inference.units.share(ids)
    return Facts(outputs, linear=linear, keeps_zero=True)


def _yield_along(inference: Inference, tensors: list[fx.Node], dim: int) -> None:
    """Parameters beside activations that have no units along a dimension (tokens) have none there either."""
    data = [tensor for tensor in tensors if tensor in inference.data]
    if not data or any(ids.shape[dim] > 1 for tensor in data for ids in inference.factors(tensor)):
        return
    for tensor in tensors:
        if tensor in inference.data or inference.is_common(tensor):
            continue
        if inference.unset(tensor, dim):
            inference.adopt(tensor, dim, None)
        for ids in inference.factors(tensor):
            if varying(ids) == (dim,):
                inference.units.share(ids)


@rule("stack.default")
def stack(inference: Inference, node: fx.Node) -> Facts:
    """Tensors of one shape along a new dimension: the same units in each."""
    tensors = node_list_arg(node)
    rank = node.meta["value"].ndim
    dim = int(argument(node, 1, "dim", 0)) % rank
    factors, expects = align(
        inference, rank - 1, [((0, place), tensor) for place, tensor in enumerate(tensors)]
    )
    linear = tuple(tensor for tensor in tensors if not inference.is_common(tensor))
    return Facts(tuple(np.expand_dims(ids, dim) for ids in factors), expects, linear=linear, keeps_zero=True)


@rule("slice_scatter.default", "select_scatter.default")
def scatter_into_slice(inference: Inference, node: fx.Node) -> Facts:
    """``x[..., start:end:step, ...] = y`` or ``x[..., index, ...] = y``: ids are written as the data is."""
    x, y = node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(y, fx.Node)
    shape = inference.shape(x)
    rank = len(shape)
    dim = int(argument(node, 2, "dim", 0)) % rank
    base, piece = inference.factors(x), inference.factors(y)
    piece_shape = inference.shape(y)
    selects = len(piece_shape) < rank
    if selects:
        piece = tuple(np.expand_dims(ids, dim) for ids in piece)
        piece_shape = (*piece_shape[:dim], 1, *piece_shape[dim:])
    along = [[ids for ids in found if ids.shape[dim] > 1] for found in (base, piece)]
    linear = tuple(operand for operand in (x, y) if not inference.is_common(operand))
    if any(isinstance(argument(node, place, ""), fx.Node) for place in (3, 4)):
        return whole(inference, node, "a write into a slice whose bounds depend on the batch")
    if selects and along[0]:
        along[1] = [ids for ids in piece if set(varying(ids)) & set(varying(along[0][0]))]
    taken = {d for found in along for ids in found for d in varying(ids)}
    rest = [[ids for ids in found if not set(varying(ids)) & taken] for found in (base, piece)]
    factors, expects = meet(
        inference, rank, [((0,), shape, tuple(rest[0])), ((1,), piece_shape, tuple(rest[1]))]
    )
    if taken:
        if any(len(found) > 1 for found in along) or any(
            len(a) + len(b) < len(c) for a, b, c in zip(along, rest, (base, piece), strict=True)
        ):
            return whole(inference, node, "a write into a slice of several kinds of units")
        ids = _written(inference, node, dim, taken, along, (shape, piece_shape))
        written = np.take(ids, written_places(node, shape[dim]), axis=dim)
        places: tuple[Path, Path] = ((0,), (1,))
        for path, found, own in zip(places, along, (ids, written), strict=True):
            if not found:
                expects[path] = (*expects.get(path, ()), own)
        factors = (*factors, ids)
    if selects and (1,) in expects:
        expects[(1,)] = tuple(np.take(ids, 0, axis=dim) for ids in expects[(1,)])
        expects[(1,)] = tuple(ids for ids in expects[(1,)] if varying(ids))
    return Facts(factors, expects, linear=linear)


def _written(
    inference: Inference, node: fx.Node, dim: int, taken: set[int], along: list[list[Ids]],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> Ids:  # fmt: skip
    """Ids of a tensor into which another was written along units.

    Entries of one that has no units (zeros) become units of their own: each sub-model has its slice of them.
    """
    filled = []
    for found, shape in zip(along, shapes, strict=True):
        target = [size if d == dim or d in taken else 1 for d, size in enumerate(shape)]
        own = found[0] if found else inference.units.fresh(math.prod(target)).reshape(target)
        filled.append(np.broadcast_to(own, target))
    ids = filled[0].copy()
    ids[(slice(None),) * dim + (written_places(node, shapes[0][dim]),)] = filled[1]
    return ids


@rule("index.Tensor", "index_select.default")
def index_tensor(inference: Inference, node: fx.Node) -> Facts:
    """``x[index, ...]``: indexed dimensions are whole, unless the indices are constants; the others stay."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    if not rank or 0 in inference.shape(x):
        return Facts(
            (), linear=(x,), keeps_zero=True
        )  # a scalar has no dimensions, and an empty tensor nothing
    indices: Any = node.args[1]
    if not isinstance(indices, (list, tuple)):
        dim, index = indexed(node, rank)
        indices = [None] * dim + [index]
    if any(inference.factors(index) for index in indices if isinstance(index, fx.Node)):
        return whole(inference, node, "indices that are units themselves")
    places = [dim for dim, index in enumerate(indices) if index is not None]
    values = [index.meta["value"] for index in indices if index is not None]
    if any(value.dtype in (torch.bool, torch.uint8) for value in values):
        return whole(inference, node, "an index by a mask")
    shape = np.broadcast_shapes(*(value.shape for value in values))
    known = None
    if len(places) == 1 and len(shape) == 1:
        known = inference.constant(indices[places[0]])
    if known is None:
        factors, lost = inference.hold(x, places)
    else:
        factors, lost = inference.factors(x), False
    adjacent = places == list(range(places[0], places[-1] + 1))
    outputs = []
    for ids in factors:
        if known is not None:
            size = ids.shape[places[0]]
            outputs.append(ids if size == 1 else np.take(ids, known % size, axis=places[0]))
            continue
        rest = [ids.shape[dim] for dim in range(ids.ndim) if dim not in places]
        at = places[0] if adjacent else 0
        outputs.append(ids.reshape([*rest[:at], *([1] * len(shape)), *rest[at:]]))
    reason = "an index along units" if lost else None
    return Facts(tuple(outputs), linear=(x,), keeps_zero=True, whole=reason)


@rule("flip.default")
def flip(inference: Inference, node: fx.Node) -> Facts:
    """The other way round along some dimensions."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    dims: Any = node.args[1]
    outputs = []
    for ids in inference.factors(x):
        for dim in dims:
            ids = np.flip(ids, dim % rank)
        outputs.append(ids)
    return Facts(tuple(outputs), linear=(x,), keeps_zero=True)


@rule("roll.default")
def roll(inference: Inference, node: fx.Node) -> Facts:
    """A cyclic shift along dimensions."""
    x = node_arg(node)
    shifts, dims = rolled(node, len(inference.shape(x)))
    factors = inference.factors(x)
    if not dims and factors:
        return whole(inference, node, "a cyclic shift of all dimensions at once")
    outputs = []
    for ids in factors:
        for shift, dim in zip(shifts, dims, strict=True):
            ids = np.roll(ids, shift, dim)
        outputs.append(ids)
    return Facts(tuple(outputs), linear=(x,), keeps_zero=True)


@rule("tril.default", "triu.default")
def triangle(inference: Inference, node: fx.Node) -> Facts:
    """The lower or upper triangle of the last two dimensions."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    factors, lost = inference.hold(x, [rank - 2, rank - 1])
    return Facts(factors, linear=(x,), keeps_zero=True, whole="a triangle over units" if lost else None)


@rule("copy_.default")
def copy_(inference: Inference, node: fx.Node) -> Facts:
    """The write of a buffer at the end of a graph."""
    target, value = node.args[:2]
    assert isinstance(target, fx.Node) and isinstance(value, fx.Node)
    factors, expects = align(inference, len(inference.shape(target)), [((0,), target), ((1,), value)])
    return Facts(factors, expects)
