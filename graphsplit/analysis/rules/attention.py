"""Scaled dot product attention, with grouped queries."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import fx

from graphsplit.analysis.facts import Facts, Path, argument, place_of, rule
from graphsplit.analysis.inference import Inference
from graphsplit.analysis.rules.contraction import LETTERS, Operand, contract, operand_of
from graphsplit.analysis.units import Factors, Ids, seen_by, varying


@rule("scaled_dot_product_attention.default")
def attention(inference: Inference, node: fx.Node) -> Facts:
    """``softmax(q kᵀ) v``: heads are units; where a head itself is cut, each sub-model attends by itself."""
    q, k, v = node.args[:3]
    mask = argument(node, 3, "attn_mask")
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    rank = len(inference.shape(q))
    lost = False
    if argument(node, 5, "is_causal", False):
        # Which keys a query sees depends on its place.
        for operand in (q, k, v):
            lost |= inference.hold(operand, [rank - 2])[1]
    lead = LETTERS[: rank - 2]
    heads = _heads(inference, node, q, k, v)
    query = operand_of(inference, (0,), q, lead + "te")
    key, value = heads
    key.labels, value.labels = lead + "se", lead + "sf"
    scores = contract(inference, [query, key], lead + "ts")
    facts = scores.facts
    attended = scores.result
    for path, ids in _batch_of_value(inference, value, attended, {(0,): query, (1,): key}):
        facts.expects[path] = (*facts.expects.get(path, ()), ids)
    if isinstance(mask, fx.Node):
        attended.factors = _mask(inference, facts, place_of(node, 3, "attn_mask"), mask, attended)
    for ids in attended.factors:
        over = tuple(dim for dim in varying(ids) if attended.labels[dim] == "s")
        if over:
            inference.units.share(ids)
    attended.factors = tuple(ids for ids in attended.factors if ids.shape[-1] == 1)
    result = contract(inference, [attended, value], lead + "tf")
    facts.mixes += scores.facts.contracts + result.facts.mixes + result.facts.contracts
    facts.contracts = []
    facts.expects |= result.facts.expects
    facts.outputs = result.facts.outputs
    facts.whole = "causal attention over units" if lost else facts.whole or result.facts.whole
    return facts


def _batch_of_value(
    inference: Inference, value: Operand, scores: Operand, beside: dict[Path, Operand]
) -> Iterator[tuple[Path, Ids]]:
    """Units along the heads that the values alone have: the scores get them, and query and key are cut."""
    factors = []
    for ids in value.factors:
        ids = inference.units.settle(ids, [ids.ndim - 2, ids.ndim - 1])
        factors.append(ids)
        lead = value.spread(ids, scores.labels[:-2])
        if varying(lead) and not any(scores.varies(scores.labels[dim]) for dim in varying(lead)):
            scores.factors = (*scores.factors, lead[..., None, None])
            for path, operand in beside.items():
                assert operand.node is not None
                repeated = operand.shape[-3] // inference.shape(operand.node)[-3]
                cut = seen_by(lead[..., None, None], operand.shape)[..., ::repeated, :, :]
                if varying(cut):
                    yield path, cut
    value.factors = tuple(ids for ids in factors if varying(ids))


def _heads(inference: Inference, node: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node) -> list[Operand]:
    """Key and value with as many heads as the query has (grouped queries repeat them)."""
    rank = len(inference.shape(q))
    found = []
    for position, operand in ((1, k), (2, v)):
        given = operand_of(inference, (position,), operand, LETTERS[:rank])
        if node.kwargs.get("enable_gqa") and rank > 3:
            times = inference.shape(q)[-3] // given.shape[-3]
            given.factors = tuple(
                np.repeat(ids, times, axis=rank - 3) if ids.shape[rank - 3] > 1 else ids
                for ids in given.factors
            )
            given.shape = (*given.shape[:-3], given.shape[-3] * times, *given.shape[-2:])
        found.append(given)
    return found


def _mask(inference: Inference, facts: Facts, path: Path, mask: fx.Node, scores: Operand) -> Factors:
    """A mask or bias, broadcast against the scores; it may have units along the heads."""
    shape = inference.shape(mask)
    rank = len(scores.labels)
    offset = rank - len(shape)
    outputs = scores.factors
    lifted = [own.reshape((1,) * offset + own.shape) for own in inference.factors(mask)]
    for own in lifted:
        match = [ids for ids in outputs if set(varying(ids)) & set(varying(own))]
        for ids in match:
            inference.units.couple(ids, own)
        if not match:
            inference.units.share(own)
    covered = {dim for own in inference.factors(mask) for dim in varying(own)}
    wanted = []
    for ids in scores.factors:
        cut = seen_by(ids, shape)
        if varying(cut) and not set(varying(cut)) <= covered:
            wanted.append(cut)
    if wanted:
        facts.expects[path] = tuple(wanted)
    return outputs
