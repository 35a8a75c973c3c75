"""Reads and writes by position along a dimension: what belongs to a unit stays along the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from graphsplit.analysis.facts import Facts, argument, rule
from graphsplit.analysis.inference import Inference, whole
from graphsplit.analysis.rules.pointwise import Met, align, meet
from graphsplit.analysis.units import Factors, Ids, varying
from graphsplit.graphs import base_name, node_arg


def _by_position(
    inference: Inference, node: fx.Node, dim: int, places: list[int], result: tuple[int, ...]
) -> Facts:
    """Operands that meet in all dimensions but ``dim``, which is kept whole; factors of a result."""
    rank = len(result)
    operands: list[Met] = []
    lost = False
    for place in places:
        operand = node.args[place]
        if not isinstance(operand, fx.Node) or not inference.shape(operand):
            continue
        factors, gone = inference.hold(operand, [dim])
        lost |= gone
        operands.append(((place,), inference.shape(operand), factors))
    shapes = [result, *(shape for _, shape, _ in operands)]
    for _, _, factors in operands:
        for ids in factors:
            if any(shape[d] != result[d] for shape in shapes for d in varying(ids)):
                return whole(inference, node, f"{base_name(node)} along a part of the units")
    found, expects = meet(inference, rank, operands)
    return Facts(found, expects, whole=f"{base_name(node)} along units" if lost else None)


@rule("gather.default")
def gather(inference: Inference, node: fx.Node) -> Facts:
    """``y[i, j] = x[index[i, j], j]`` along dimension 0, and likewise along others."""
    x = node_arg(node)
    shape = node.meta["value"].shape
    if not shape:
        return whole(inference, node, "gather of a scalar")
    dim = int(argument(node, 1, "dim")) % len(shape)
    facts = _by_position(inference, node, dim, [0, 2], shape)
    facts.linear = (x,)
    return facts


@rule("take_along_dim.default")
def take_along_dim(inference: Inference, node: fx.Node) -> Facts:
    """`gather` with its operands broadcast against each other."""
    x, index, dim = node_arg(node), node_arg(node, 1), argument(node, 2, "dim")
    rank = node.meta["value"].ndim
    if dim is None or len({rank, len(inference.shape(x)), len(inference.shape(index))}) > 1:
        return whole(inference, node, "take_along_dim over all dimensions")
    facts = _by_position(inference, node, int(dim) % rank, [0, 1], node.meta["value"].shape)
    facts.linear = (x,)
    return facts


@rule(
    "scatter.src", "scatter.value", "scatter.reduce", "scatter.value_reduce", "scatter_add.default",
    "scatter_reduce.two",
)  # fmt: skip
def scatter(inference: Inference, node: fx.Node) -> Facts:
    """``x[index[i, j], j] = src[i, j]`` along dimension 0, and likewise along others."""
    shape = node.meta["value"].shape
    if not shape:
        return whole(inference, node, "a write into a scalar")
    dim = int(argument(node, 1, "dim")) % len(shape)
    facts = _by_position(inference, node, dim, [0, 2, 3], shape)
    if base_name(node) == "scatter_add":
        facts.linear = tuple(n for n in (node.args[0], node.args[3]) if not inference.is_common(n))  # type: ignore[misc]
    return facts


@rule(
    "index_add.default", "index_copy.default", "index_fill.int_Scalar", "index_fill.int_Tensor",
    "index_reduce.default",
)  # fmt: skip
def write_lines(inference: Inference, node: fx.Node) -> Facts:
    """``x[index[i], j] += src[i, j]`` along dimension 0, and likewise along others."""
    shape = node.meta["value"].shape
    if not shape or inference.factors(node.args[2]):
        return whole(inference, node, "indices that are units themselves")
    dim = int(argument(node, 1, "dim")) % len(shape)
    facts = _by_position(inference, node, dim, [0, 3], shape)
    if base_name(node) in ("index_add", "index_copy"):
        facts.linear = tuple(n for n in (node.args[0], node.args[3]) if not inference.is_common(n))  # type: ignore[misc]
    return facts


@rule("index_put.default")
def index_put(inference: Inference, node: fx.Node) -> Facts:
    """``x[index, ...] = values``: indexed dimensions are whole, the others stay; a mask writes by entry."""
    x, values = node_arg(node), node_arg(node, 2)
    indices: Any = node.args[1]
    shape = inference.shape(x)
    rank = len(shape)
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if any(index.meta["value"].dtype in (torch.bool, torch.uint8) for _, index in given):
        first = given[0][1]
        if len(given) > 1 or len(indices) > 1 or inference.shape(first) != shape or inference.shape(values):
            return whole(inference, node, "a write by a mask")
        factors, expects = align(inference, rank, [((0,), x), ((1, 0), first)])
        return Facts(factors, expects)
    if any(inference.factors(index) for _, index in given):
        return whole(inference, node, "indices that are units themselves")
    places = [dim for dim, _ in given]
    count = len(np.broadcast_shapes(*(inference.shape(index) for _, index in given)))
    at = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    rest = [dim for dim in range(rank) if dim not in places]
    # Dimensions of ``x[index]``: those that are left, with the dimensions of the indices at their place.
    order = [*rest[:at], *([-1] * count), *rest[at:]]

    def read(ids: Ids) -> Ids:
        return ids.reshape([1 if dim < 0 else ids.shape[dim] for dim in order])

    def back(ids: Ids) -> Ids:
        sizes = dict(zip(order, ids.shape, strict=True))
        return ids.reshape([sizes[dim] if dim in rest else 1 for dim in range(rank)])

    held, lost = inference.hold(x, places)
    offset = len(order) - len(inference.shape(values))
    of_values, gone = inference.hold(
        values, [place - offset for place, dim in enumerate(order) if dim < 0 and place >= offset]
    )
    taken = tuple(1 if dim < 0 else shape[dim] for dim in order)
    operands: list[Met] = [
        ((0,), taken, tuple(read(ids) for ids in held)),
        ((2,), inference.shape(values), of_values),
    ]
    factors, expects = meet(inference, len(order), operands)
    if (0,) in expects:
        expects[(0,)] = tuple(back(ids) for ids in expects[(0,)])
    reason = "a write along units" if lost or gone else None
    outputs: Factors = tuple(back(ids) for ids in factors)
    linear = tuple(operand for operand in (x, values) if not inference.is_common(operand))
    return Facts(outputs, expects, linear=linear, whole=reason)
