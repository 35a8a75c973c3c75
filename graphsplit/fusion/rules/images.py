"""Rules of fusion for images and sequences with channels, ``[N, C, ...]``."""

from __future__ import annotations

from torch import fx

from graphsplit.builder import aten
from graphsplit.fusion.fuser import Fuser, Result, Value, rule
from graphsplit.fusion.rules.operands import (
    FOLD,
    JOIN,
    SAME,
    Arguments,
    one_batch,
    values_of,
    with_nodes,
)
from graphsplit.graphs import base_name
from graphsplit.program import Dim, TensorMeta


def _rank(name: str) -> int | None:
    """Dimensions that an op on images takes with a batch: 4 for ``max_pool2d``."""
    digits = [int(letter) for letter in name if letter in "123"]
    return digits[0] + 2 if digits else None


@rule(
    *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)),
    *(f"max_pool{n}d_with_indices" for n in (1, 2, 3)),
    *(f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d")),
    "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "feature_dropout", "feature_alpha_dropout", "pixel_shuffle", "pixel_unshuffle",
)  # fmt: skip
def by_channel(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Each channel of each image by itself."""
    first, *others = arguments
    x, rank = arguments[first], _rank(base_name(node)) or (4 if "pixel" in base_name(node) else None)
    if not isinstance(x, Value) or (rank is not None and x.meta.ndim != rank) or x.meta.ndim < 3:
        return None
    if any(isinstance(arguments[name], Value) for name in others):
        return None
    if x.layout is FOLD:
        return fuser.invoke(node, {**arguments, first: x.node}, FOLD)
    layout = one_batch([x])
    return fuser.invoke(node, {**arguments, first: fuser.join(x, layout)}, layout)


@rule(
    "pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "reflection_pad1d", "replication_pad1d"
)
def pad(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Padding of what is behind batch and channels; of a stack as one batch."""
    first = next(iter(arguments))
    x, sizes = arguments[first], arguments.get("pad", arguments.get("padding"))
    assert isinstance(x, Value) and sizes is not None
    behind = len(sizes) // 2
    if x.layout is FOLD and behind <= x.meta.ndim - 2:
        return fuser.invoke(node, {**arguments, first: x.node}, FOLD)
    if behind <= x.meta.ndim - 1:
        layout = one_batch([x])
        return fuser.invoke(node, {**arguments, first: fuser.join(x, layout)}, layout)
    return None


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """A grouped convolution; where the input is the same for all, one with K times the filters."""
    name = base_name(node)
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    if x.meta.ndim != _rank(name) or weight.layout is SAME or not fuser.can_fold(x.meta):
        return None
    if isinstance(bias, Value) and bias.layout is SAME:
        return None
    groups = arguments["groups"]
    whole = x.layout is SAME and groups == 1 and "transpose" not in name
    changed = {
        "input": x.node if whole else fuser.fold(x),
        "weight": fuser.join(weight),
        "bias": None if bias is None else fuser.join(bias),
        "groups": 1 if whole else groups * fuser.k,
    }
    return fuser.invoke(node, {**arguments, **changed}, FOLD)


@rule("batch_norm", "instance_norm", "group_norm")
def norm_of_channels(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Statistics of each model's channels: their own, as channels stand side by side."""
    x, *others = values_of(arguments)
    if not fuser.can_fold(x.meta) or any(value.layout is SAME for value in others):
        return None
    changed = with_nodes(arguments, lambda value: fuser.fold(value) if value is x else fuser.join(value))
    if "num_groups" in changed:
        changed["num_groups"] *= fuser.k
    return fuser.invoke(node, changed, FOLD)


@rule("prelu")
def prelu(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """A slope for each channel of each model; a single one is that of all channels."""
    x, slope = arguments["self"], arguments["weight"]
    if not fuser.can_fold(x.meta) or slope.layout is SAME:
        return None
    rows, channels = fuser.join(slope), x.meta.dims[1]
    if slope.meta.shape != (channels.hint,):
        wide = TensorMeta((Dim(fuser.k), channels), slope.meta.dtype, slope.meta.device)
        spread = fuser.build.call(aten.expand.default, (fuser.stack(slope), [-1, channels.hint]), wide)
        flat = TensorMeta((Dim(fuser.k * channels.hint),), slope.meta.dtype, slope.meta.device)
        rows = fuser.flat(spread, 0, flat)
    return fuser.invoke(node, {"self": fuser.fold(x), "weight": rows}, FOLD)


@rule("_weight_norm")
def weight_norm(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Row by row, so that the rows of all models are those of one weight."""
    v, g = arguments["v"], arguments["g"]
    if arguments["dim"] != 0 or {v.layout, g.layout} == {SAME}:
        return None
    return fuser.invoke(node, with_nodes(arguments, fuser.join), JOIN)
