"""Pooling, resampling and padding: each channel by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from graphsplit.analysis.facts import Facts, argument, rule
from graphsplit.analysis.inference import Inference, whole
from graphsplit.analysis.rules.pointwise import Met, meet
from graphsplit.analysis.units import SHARED, Factors, Ids
from graphsplit.graphs import base_name, node_arg

WINDOW = "a pooling window runs over units"


def _spatial_dims(node: fx.Node) -> int:
    """Number of dimensions that an op runs over, from its name: 2 for ``max_pool2d``."""
    return next(int(digit) for digit in base_name(node) if digit.isdigit())


def _spatial(inference: Inference, node: fx.Node, count: int) -> tuple[Factors, bool]:
    """Factors of the first operand, and whether none varies along its last ``count`` dimensions."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    factors = inference.factors(x)
    return factors, all(ids.shape[dim] == 1 for ids in factors for dim in range(rank - count, rank))


@rule(
    *(f"{kind}{n}d.default" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool") for n in (1, 2, 3)),
    "lp_pool1d.default", "lp_pool2d.default", "reflection_pad1d.default", "reflection_pad2d.default",
    "replication_pad1d.default", "replication_pad2d.default", "upsample_linear1d.vec",
    "upsample_bilinear2d.vec", "upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec",
    "upsample_trilinear3d.vec", "upsample_bicubic2d.vec", "_upsample_bicubic2d_aa.vec",
    "_upsample_bilinear2d_aa.vec", "upsample_nearest2d.default", "upsample_bilinear2d.default",
    "lp_pool3d.default", "reflection_pad3d.default", "replication_pad3d.default",
    *(f"_upsample_nearest_exact{n}d.vec" for n in (1, 2, 3)),
    *(f"upsample_nearest_exact{n}d.vec" for n in (1, 2, 3)),
)  # fmt: skip
def pool(inference: Inference, node: fx.Node) -> Facts:
    """Windows over the last one, two or three dimensions."""
    name = base_name(node)
    count = _spatial_dims(node)
    factors, free = _spatial(inference, node, count)
    x = node_arg(node)
    linear = () if name.startswith(("max", "lp", "adaptive_max")) else (x,)
    if free:
        return Facts(factors, linear=linear)
    found = _across_channels(inference, node, factors, count)
    if found is not None:
        return found
    rank = len(inference.shape(x))
    factors, lost = inference.hold(x, range(rank - count, rank))
    return Facts(factors, linear=linear, whole=WINDOW if lost else None)


@rule(
    "max_pool1d_with_indices.default", "max_pool2d_with_indices.default", "max_pool3d_with_indices.default",
    "adaptive_max_pool1d.default",
    "adaptive_max_pool2d.default", "adaptive_max_pool3d.default",
)  # fmt: skip
def pool_with_indices(inference: Inference, node: fx.Node) -> Facts:
    """Values and positions."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    factors, lost = inference.hold(x, range(rank - _spatial_dims(node), rank))
    return Facts([factors, factors], whole=WINDOW if lost else None)


@rule("max_unpool2d.default", "max_unpool3d.default")
def unpool(inference: Inference, node: fx.Node) -> Facts:
    """Values at the positions of their maxima, zeros elsewhere, each channel by itself."""
    count = _spatial_dims(node)
    parts: list[Met] = []
    lost = False
    for place in range(2):
        operand = node_arg(node, place)
        shape = inference.shape(operand)
        factors, gone = inference.hold(operand, range(len(shape) - count, len(shape)))
        parts.append(((place,), shape, factors))
        lost |= gone
    found, expects = meet(inference, node.meta["value"].ndim, parts)
    return Facts(found, expects, whole="positions in space are units" if lost else None)


@rule("grid_sampler.default")
def grid_sample(inference: Inference, node: fx.Node) -> Facts:
    """``y[n, c, s] = x[n, c, grid[n, s]]``, interpolated: linear in ``x``; the positions are whole."""
    x, grid = node_arg(node), node_arg(node, 1)
    n, c, *space = inference.shape(x)
    ones = (1,) * len(space)
    factors, lost = inference.hold(x, range(2, 2 + len(space)))
    places, gone = inference.hold(grid, range(1, 2 + len(space)))
    met: list[Met] = [((0,), (n, c, *ones), factors), ((1,), (n, 1, *ones), places)]
    outputs, expects = meet(inference, 2 + len(space), met)
    linear = (x,) if inference.is_common(grid) else ()
    reason = "positions in space are units" if lost or gone else None
    return Facts(outputs, expects, linear=linear, whole=reason)


@rule("affine_grid_generator.default")
def affine_grid(inference: Inference, node: fx.Node) -> Facts:
    """Positions from affine maps, linear in these, which are whole."""
    theta = node_arg(node)
    _, lost = inference.hold(theta, range(len(inference.shape(theta))))
    return Facts((), linear=(theta,), whole="positions in space are units" if lost else None)


def _across_channels(inference: Inference, node: fx.Node, factors: Factors, count: int) -> Facts | None:
    """Average pooling with stride 1 along padded units, as in local response normalisation across channels.

    A sub-model pads and pools its own slice. The padding stands at the ends with the id of what is shared.
    """
    x = node_arg(node)
    rank = len(inference.shape(x))
    kernel: Any = argument(node, 1, "kernel_size")
    stride: Any = argument(node, 2, "stride", None) or kernel
    padding: Any = argument(node, 3, "padding", 0)
    if not base_name(node).startswith("avg_pool"):
        return None
    sizes, strides, paddings = (_each(value, count) for value in (kernel, stride, padding))
    facts = Facts(())
    outputs: list[Ids] = []
    for ids in factors:
        for place in range(count):
            dim = rank - count + place
            if ids.shape[dim] == 1:
                continue
            window = sizes[place]
            line = np.moveaxis(ids, dim, 0)
            before, after = window // 2, window - 1 - window // 2
            ends = np.concatenate([line[:before].ravel(), line[line.shape[0] - after :].ravel()])
            if strides[place] != 1 or paddings[place] != 0 or (ends != SHARED).any():
                return None
            facts.mixes.append((ids, (dim,)))
            ids = np.moveaxis(line[before : line.shape[0] - after], 0, dim)
        outputs.append(ids)
    facts.outputs = tuple(outputs)
    return facts


def _each(value: Any, count: int) -> list[int]:
    if isinstance(value, int):
        return [value] * count
    values = list(value)
    return values * count if len(values) == 1 else values


@rule("pad.default", "constant_pad_nd.default")
def pad(inference: Inference, node: fx.Node) -> Facts:
    """Padding along units adds entries that are the same in all sub-models."""
    x = node_arg(node)
    widths: Any = node.args[1]
    mode = argument(node, 2, "mode", "constant")
    constant = "constant_pad" in str(node.target) or mode == "constant"
    outputs = []
    for ids in inference.factors(x):
        amounts = [(0, 0)] * ids.ndim
        for place in range(len(widths) // 2):
            dim = ids.ndim - 1 - place
            if ids.shape[dim] > 1:
                amounts[dim] = (widths[2 * place], widths[2 * place + 1])
        if any(amount != (0, 0) for amount in amounts):
            if not constant or any(min(amount) < 0 for amount in amounts):
                return whole(inference, node, f"{mode} padding along units")
            ids = np.pad(ids, amounts, constant_values=SHARED)
        outputs.append(ids)
    return Facts(tuple(outputs), keeps_zero=False)
