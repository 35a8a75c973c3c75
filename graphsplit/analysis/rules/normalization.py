"""Normalisation: per channel, over groups of channels, or over all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from graphsplit.analysis.facts import Facts, argument, place_of, rule
from graphsplit.analysis.inference import Inference
from graphsplit.analysis.units import Factors, Ids, reshape_ids, varying
from graphsplit.graphs import base_name, node_arg


def _affine(inference: Inference, node: Any, ids: Ids | None) -> None:
    """A weight or bias ``[C]`` belongs to the units ``ids``; None: it is the same for all."""
    if not isinstance(node, fx.Node) or inference.is_common(node):
        return
    if node.op == "get_attr" and (ids is None or ids.ndim == 1):
        inference.adopt(node, 0, ids)
        return
    for own in inference.factors(node):
        if ids is None:
            inference.units.share(own)
        else:
            inference.units.couple(ids, own.reshape(-1, *([1] * (ids.ndim - 1))))


def _settled(inference: Inference, factors: Factors, mixed: list[int]) -> Factors:
    settled = [inference.units.settle(ids, mixed) for ids in factors]
    return tuple(ids for ids in settled if varying(ids))


@rule("batch_norm.default", "instance_norm.default")
def batch_norm(inference: Inference, node: fx.Node) -> Facts:
    """Statistics per channel (dimension 1), over all other dimensions."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    mixed = [dim for dim in range(rank) if dim != 1]
    if base_name(node) == "instance_norm":
        mixed = mixed[1:]
    factors = _settled(inference, inference.factors(x), mixed)
    facts = Facts(factors)
    channels = [ids for ids in factors if ids.shape[1] > 1]
    for position in range(1, 5):
        state = argument(node, position, ("input", "weight", "bias", "running_mean", "running_var")[position])
        if channels and isinstance(state, fx.Node) and inference.is_common(state):
            facts.expects[(position,)] = (channels[0].ravel(),)
        _affine(inference, state, channels[0].ravel() if channels else None)
    facts.mixes = [(ids, tuple(dim for dim in varying(ids) if dim in mixed)) for ids in factors]
    return facts


@rule("layer_norm.default", "rms_norm.default")
def layer_norm(inference: Inference, node: fx.Node) -> Facts:
    """Statistics over the last dimensions."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    count = len(argument(node, 1, "normalized_shape"))
    mixed = list(range(rank - count, rank))
    factors = _settled(inference, inference.factors(x), mixed)
    facts = Facts(factors)
    facts.mixes = [(ids, tuple(dim for dim in varying(ids) if dim in mixed)) for ids in factors]
    for position, name in ((2, "weight"), (3, "bias")):
        affine = argument(node, position, name)
        if not isinstance(affine, fx.Node):
            continue
        tails = [
            ids.reshape(ids.shape[rank - count :])
            for ids in factors
            if any(d >= rank - count for d in varying(ids))
        ]
        if inference.is_common(affine):
            if tails:
                facts.expects[place_of(node, position, name)] = tuple(tails)
        elif count == 1:
            _affine(inference, affine, tails[0] if tails else None)
        else:
            for own in inference.factors(affine):
                match = [tail for tail in tails if set(varying(tail)) & set(varying(own))]
                for tail in match:
                    inference.units.couple(tail, own)
                if not match:
                    inference.units.share(own)
    return facts


@rule("group_norm.default")
def group_norm(inference: Inference, node: fx.Node) -> Facts:
    """Statistics over the channels of a group and over space."""
    x = node_arg(node)
    groups = int(argument(node, 1, "num_groups"))
    shape = inference.shape(x)
    channels = shape[1]
    apart = (shape[0], groups, channels // groups, *shape[2:])
    facts = Facts(())
    outputs = []
    lines: list[Ids] = []
    for ids in inference.factors(x):
        taken = reshape_ids(ids, shape, apart)
        mixed = list(range(2, len(apart)))
        taken = inference.units.settle(taken, mixed)
        facts.mixes.append((taken, tuple(dim for dim in varying(taken) if dim in mixed)))
        back = reshape_ids(taken, apart, shape)
        if varying(back):
            outputs.append(back)
            if back.shape[1] > 1:
                lines.append(back)
    facts.outputs = tuple(outputs)
    line = np.broadcast_to(lines[0], (1, channels, *lines[0].shape[2:])).ravel() if lines else None
    for position, name in ((2, "weight"), (3, "bias")):
        affine = argument(node, position, name)
        if isinstance(affine, fx.Node) and inference.is_common(affine) and lines:
            facts.expects[place_of(node, position, name)] = (lines[0].ravel(),)
        _affine(inference, affine, line)
    return facts


@rule("_weight_norm.default", "_weight_norm_interface.default")
def weight_norm(inference: Inference, node: fx.Node) -> Facts:
    """``v * g / norm(v)``, a norm for each row: with cross weights at zero it is that of the row's block."""
    v, g = node.args[:2]
    assert isinstance(v, fx.Node) and isinstance(g, fx.Node)
    dim = int(argument(node, 2, "dim", 0))
    for own in inference.factors(g):
        for ids in inference.factors(v):
            if ids.shape[dim] > 1:
                inference.units.couple(ids, own)
    return Facts(inference.factors(v), keeps_zero=True)
