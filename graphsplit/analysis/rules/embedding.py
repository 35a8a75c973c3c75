"""Look-up tables."""

from __future__ import annotations

import numpy as np
from torch import fx

from graphsplit.analysis.facts import Facts, rule
from graphsplit.analysis.inference import Inference, whole


@rule("embedding.default")
def embedding(inference: Inference, node: fx.Node) -> Facts:
    """``y[..., d] = w[index[...], d]``: every sub-model knows the whole vocabulary."""
    weight, index = node.args[:2]
    assert isinstance(weight, fx.Node) and isinstance(index, fx.Node)
    if weight in inference.common or inference.factors(index):
        return whole(inference, node, "the indices of an embedding are units themselves")
    if weight.op == "get_attr":
        inference.adopt(weight, 0, None)
    rank = len(inference.shape(index))
    outputs = []
    for ids in inference.factors(weight):
        if ids.shape[0] > 1 and ids.shape[1] > 1:
            ids = inference.units.tie(ids, [0])
        elif ids.shape[0] > 1:
            inference.units.share(ids)
            ids = ids[:1]
        outputs.append(np.reshape(ids, (1,) * rank + ids.shape[1:]))
    return Facts(tuple(outputs))


@rule("embedding_bag.padding_idx", "embedding_bag.default")
def embedding_bag(inference: Inference, node: fx.Node) -> Facts:
    """``y[b, d]`` is a sum, mean or largest entry of ``w[index[i], d]`` over the indices of a bag."""
    weight, *others = node.all_input_nodes
    if weight in inference.common or any(inference.factors(other) for other in others):
        return whole(inference, node, "the indices of an embedding are units themselves")
    factors, _ = inference.hold(weight, [0])
    results = [factors if item.ndim == 2 else () for item in node.meta["value"]]
    return Facts(results)
