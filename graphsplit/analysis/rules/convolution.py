"""Convolutions: grouped, depthwise and transposed ones are contractions with groups as a batch dimension."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from graphsplit.analysis.facts import Facts, argument, place_of, rule
from graphsplit.analysis.inference import Inference, whole
from graphsplit.analysis.rules.contraction import Operand, _linear_operands, add_bias, contract, operand_of
from graphsplit.analysis.units import Factors, Ids, reshape_ids, varying

SPATIAL = "stuvw"
KERNEL = "lmnop"
OVER_SPACE = "a convolution runs over units"


def groups_of(node: fx.Node) -> int | None:
    """Number of groups of a convolution; None where it depends on the batch."""
    groups = argument(node, 6, "groups", 1)
    return groups if isinstance(groups, int) else None


@rule(
    "conv1d.default", "conv2d.default", "conv3d.default", "conv1d.padding", "conv2d.padding",
    "conv3d.padding", "conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input",
)  # fmt: skip
def convolution(inference: Inference, node: fx.Node) -> Facts:
    """``y[n, (g o), s] = x[n, (g i), s] w[(g o), i, k] + b``; transposed ones have ``w[(g i), o, k]``."""
    x, weight = node.args[:2]
    bias = argument(node, 2, "bias")
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    transposed = "transpose" in str(node.target)
    groups = groups_of(node)
    if groups is None:
        return whole(inference, node, "a convolution whose groups depend on the batch")
    spatial = len(inference.shape(weight)) - 2
    batched = len(inference.shape(x)) == spatial + 2
    lead = "a" if batched else ""
    lost = False
    if groups > 1 or transposed:
        space = range(len(lead) + 1, len(lead) + 1 + spatial)
        lost |= inference.hold(x, space)[1]
    if groups == 1:
        weight_labels = "yz" if transposed else "zy"
        found = contract(
            inference,
            [
                operand_of(inference, (0,), x, lead + "y" + SPATIAL[:spatial]),
                operand_of(inference, (1,), weight, weight_labels + KERNEL[:spatial]),
            ],
            lead + "z" + SPATIAL[:spatial],
        )
        facts = found.facts
        result = found.result
        same = [] if transposed else _same_length(node, inference.shape(weight)[2:], len(lead) + 1)
        result.factors = _drop_space(inference, facts, result.factors, len(lead), same)
        facts.outputs = result.factors
    else:
        facts, result = _grouped(inference, node, x, weight, groups, lead, spatial, transposed)
    if lost:
        facts.whole = OVER_SPACE
    add_bias(inference, facts, place_of(node, 2, "bias"), bias, result, "z")
    facts.linear = _linear_operands(node, inference, [x, weight], [bias] if bias is not None else [])
    return facts


def _grouped(
    inference: Inference, node: fx.Node, x: fx.Node, weight: fx.Node, groups: int, lead: str, spatial: int,
    transposed: bool,
) -> tuple[Facts, Operand]:  # fmt: skip
    channel = len(lead)
    if weight.op == "get_attr" and weight not in inference.common:
        # Kernel sizes, and for transposed ones the outputs of a group, are no units.
        for dim in range(1 if transposed else 2, spatial + 2):
            inference.adopt(weight, dim, None)
    out_shape = node.meta["value"].shape
    per_input = inference.shape(x)[channel] // groups
    per_output = out_shape[channel] // groups
    taken = _view(inference, (0,), x, channel, (groups, per_input), lead + "gy" + SPATIAL[:spatial])
    kernel = KERNEL[:spatial]
    if transposed:
        weights = _view(inference, (1,), weight, 0, (groups, per_input), "gyz" + kernel)
    else:
        weights = _view(inference, (1,), weight, 0, (groups, per_output), "gzy" + kernel)
    found = contract(inference, [taken, weights], lead + "gz" + SPATIAL[:spatial])
    facts = found.facts
    if facts.expects:
        # Groups that are cut on one side only: not worth a slice.
        facts.expects.clear()
        inference.share(x)
        inference.share(weight)
    before = (*out_shape[:channel], groups, per_output, *out_shape[channel + 1 :])
    factors = tuple(reshape_ids(ids, before, out_shape) for ids in found.result.factors)
    facts.outputs = _drop_space(inference, facts, factors, channel, [])
    result = Operand(
        None, None, lead + "z" + SPATIAL[:spatial], out_shape, facts.outputs, common=False, data=True
    )
    return facts, result


def _view(
    inference: Inference, path: tuple[int], node: fx.Node, dim: int, sizes: tuple[int, int], labels: str
) -> Operand:
    """An operand with its channels taken apart into groups and channels of a group."""
    shape = inference.shape(node)
    after = (*shape[:dim], *sizes, *shape[dim + 1 :])
    factors = tuple(reshape_ids(ids, shape, after) for ids in inference.factors(node))
    return Operand(path, None, labels, after, factors, inference.is_common(node), node in inference.data)


def _same_length(node: fx.Node, kernel: tuple[int, ...], first: int) -> list[int]:
    """Dimensions of space as long after a convolution as before, each entry in the middle of its window."""
    stride, padding, dilation = (
        argument(node, place, name, default)
        for place, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
    )

    def each(value: Any) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * len(kernel) if len(values) == 1 else values

    if isinstance(padding, str):
        return [first + place for place in range(len(kernel))] if padding == "same" else []
    found = zip(kernel, each(stride), each(padding), each(dilation), strict=True)
    return [
        first + place for place, (size, step, pad, gap) in enumerate(found)
        if step == 1 and 2 * pad == gap * (size - 1)
    ]  # fmt: skip


def _drop_space(
    inference: Inference, facts: Facts, factors: Factors, channel: int, same: list[int]
) -> Factors:
    """Units along space: a sub-model convolves over its own where the length stays, else they are shared."""
    kept: list[Ids] = []
    for ids in factors:
        over = tuple(dim for dim in varying(ids) if dim > channel)
        if not over:
            kept.append(ids)
        elif set(over) <= set(same):
            facts.mixes.append((ids, over))
            kept.append(ids)
        else:
            inference.units.share(np.asarray(ids))
            facts.whole = OVER_SPACE
    return tuple(kept)
