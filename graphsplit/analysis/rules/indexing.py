"""Slices, selections, concatenations, look-ups by index: ids move as the data does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from graphsplit.analysis.facts import Facts, Path, argument, rule
from graphsplit.analysis.inference import Inference, whole
from graphsplit.analysis.rules.pointwise import align
from graphsplit.analysis.units import Factors, Ids, varying
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
    # An empty slice has units along its other dimensions.
    return cut if cut.shape[dim] else ids[(*lead, slice(0, 1))]


def cut(inference: Inference, node: fx.Node, index: Any, position: int = 1) -> Facts:
    """A slice or one entry of a dimension."""
    x = node_arg(node)
    shape = inference.shape(x)
    dim = int(argument(node, position, "dim", 0)) % len(shape)
    symbolic = isinstance(index, slice) and any(isinstance(v, fx.Node) for v in (index.start, index.stop))
    factors = inference.factors(x)
    if symbolic and any(ids.shape[dim] > 1 for ids in factors):
        return whole(inference, node, "a slice along units whose bounds depend on the batch")
    if symbolic:
        index = slice(None)
    return Facts(tuple(_take(ids, dim, index) for ids in factors), linear=(x,), keeps_zero=True)


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
        return whole(inference, node, "a slice whose bounds depend on the batch")
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
    count = len(node.meta["value"])
    return Facts(
        [tuple(_take(ids, dim, i) for ids in factors) for i in range(count)], linear=(x,), keeps_zero=True
    )


@rule(
    "split.Tensor",
    "split_with_sizes.default",
    "chunk.default",
    "tensor_split.sections",
    "tensor_split.indices",
)
def split(inference: Inference, node: fx.Node) -> Facts:
    """Consecutive pieces of a dimension."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    dim = int(argument(node, 2, "dim", 0)) % rank
    pieces: list[Factors] = []
    start = 0
    for piece in node.meta["value"]:
        size = piece.shape[dim]
        pieces.append(tuple(_take(ids, dim, slice(start, start + size)) for ids in inference.factors(x)))
        start += size
    return Facts(list(pieces), linear=(x,), keeps_zero=True)


@rule("cat.default", "concat.default", "concatenate.default")
def cat(inference: Inference, node: fx.Node) -> Facts:
    """Tensors one after the other; entries without units (inputs, zeros) are shared."""
    tensors = node_list_arg(node)
    rank = node.meta["value"].ndim
    dim = int(argument(node, 1, "dim", 0)) % rank
    if any(len(inference.shape(tensor)) != rank for tensor in tensors):
        return whole(inference, node, "cat of tensors of different rank")
    parts: list[tuple[Path, fx.Node]] = [((0, place), tensor) for place, tensor in enumerate(tensors)]
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


@rule("slice_scatter.default")
def slice_scatter(inference: Inference, node: fx.Node) -> Facts:
    """``x[..., start:end:step, ...] = y``."""
    bounds = slice(argument(node, 3, "start"), argument(node, 4, "end"), argument(node, 5, "step", 1))
    return _scatter(inference, node, bounds)


@rule("select_scatter.default")
def select_scatter(inference: Inference, node: fx.Node) -> Facts:
    """``x[..., index, ...] = y``."""
    return _scatter(inference, node, argument(node, 3, "index"))


def _scatter(inference: Inference, node: fx.Node, index: Any) -> Facts:
    x, y = node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(y, fx.Node)
    dim = int(argument(node, 2, "dim", 0)) % len(inference.shape(x))
    base, piece = inference.factors(x), inference.factors(y)
    if any(ids.shape[dim] > 1 for ids in base) or len(base) > 1 or len(piece) > 1:
        return whole(inference, node, "a write into a slice of units")
    if isinstance(index, int):
        piece = tuple(np.expand_dims(ids, dim) for ids in piece)
    if any(ids.shape[dim] > 1 for ids in piece) or len(base) != len(piece):
        return whole(inference, node, "a write into a slice of units")
    for ids, own in zip(base, piece, strict=True):
        inference.units.couple(ids, own)
    return Facts(base, linear=tuple(n for n in (x, y) if not inference.is_common(n)))


@rule("index.Tensor")
def index_tensor(inference: Inference, node: fx.Node) -> Facts:
    """``x[index, ...]`` by tensors of indices: indexed dimensions are whole, the others stay."""
    x = node_arg(node)
    indices: Any = node.args[1]
    if any(inference.factors(index) for index in indices if isinstance(index, fx.Node)):
        return whole(inference, node, "indices that are units themselves")
    places = [dim for dim, index in enumerate(indices) if index is not None]
    values = [index.meta["value"] for index in indices if index is not None]
    if any(value.dtype in (torch.bool, torch.uint8) for value in values):
        return whole(inference, node, "an index by a mask")
    shape = np.broadcast_shapes(*(value.shape for value in values))
    if x.op == "get_attr" and x not in inference.common:
        for dim in places:
            inference.adopt(x, dim, None)
    adjacent = places == list(range(places[0], places[-1] + 1))
    outputs = []
    reason = None
    for ids in inference.factors(x):
        hit = [dim for dim in places if ids.shape[dim] > 1]
        if hit and any(dim not in places for dim in varying(ids)):
            ids = inference.units.tie(ids, hit)
        elif hit:
            inference.units.share(ids)
            reason = "an index along units"
            continue
        rest = [ids.shape[dim] for dim in range(ids.ndim) if dim not in places]
        at = places[0] if adjacent else 0
        outputs.append(ids.reshape([*rest[:at], *([1] * len(shape)), *rest[at:]]))
    return Facts(tuple(outputs), linear=(x,), whole=reason)


@rule("index_select.default")
def index_select(inference: Inference, node: fx.Node) -> Facts:
    """Entries of one dimension by a tensor of indices."""
    x, dim, index = node.args
    assert isinstance(x, fx.Node) and isinstance(dim, int)
    dim %= len(inference.shape(x))
    if inference.factors(index):
        return whole(inference, node, "indices that are units themselves")
    outputs = []
    for ids in inference.factors(x):
        if ids.shape[dim] > 1:
            if len(varying(ids)) == 1:
                inference.units.share(ids)
                continue
            ids = inference.units.tie(ids, [dim])
        outputs.append(ids)
    return Facts(tuple(outputs), linear=(x,))


@rule("gather.default", "take_along_dim.default")
def gather(inference: Inference, node: fx.Node) -> Facts:
    """Entries by position along one dimension that holds no units, from a value without units elsewhere."""
    x, _, index = node.args[:3]
    if inference.factors(x) or inference.factors(index):
        return whole(inference, node, "a look-up by position on units")
    return Facts(())


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
    """A cyclic shift along dimensions without units."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    dims = [dim % rank for dim in argument(node, 2, "dims", [])]
    factors = inference.factors(x)
    if not dims or any(ids.shape[dim] > 1 for ids in factors for dim in dims):
        return whole(inference, node, "a cyclic shift along units")
    return Facts(factors, linear=(x,), keeps_zero=True)


@rule("tril.default", "triu.default")
def triangle(inference: Inference, node: fx.Node) -> Facts:
    """The lower or upper triangle of the last two dimensions."""
    x = node_arg(node)
    factors = inference.factors(x)
    if any(ids.shape[dim] > 1 for ids in factors for dim in (ids.ndim - 1, ids.ndim - 2)):
        return whole(inference, node, "a triangle over units")
    return Facts(factors, linear=(x,), keeps_zero=True)


@rule("copy_.default")
def copy_(inference: Inference, node: fx.Node) -> Facts:
    """The write of a buffer at the end of a graph."""
    target, value = node.args[:2]
    assert isinstance(target, fx.Node) and isinstance(value, fx.Node)
    factors, expects = align(inference, len(inference.shape(target)), [((0,), target), ((1,), value)])
    return Facts(factors, expects)
