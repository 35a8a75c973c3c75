"""Reductions, softmax and other ops along a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from graphsplit.analysis.facts import Facts, argument, rule
from graphsplit.analysis.inference import Inference, whole
from graphsplit.analysis.units import Ids, varying
from graphsplit.graphs import base_name, node_arg, overload_of

LINEAR = {"sum", "mean"}


def _dims(value: Any, rank: int) -> list[int]:
    if value is None or value == []:
        return list(range(rank))
    if isinstance(value, int):
        return [value % max(rank, 1)]
    return [dim % rank for dim in value]


@rule(
    "sum.default", "mean.default", "amax.default", "amin.default", "max.default", "min.default",
    "prod.default", "all.default", "any.default", "var.default", "std.default", "argmax.default",
    "argmin.default", "sum.dim_IntList", "mean.dim", "var.dim", "var.correction", "std.dim", "std.correction",
    "logsumexp.default", "linalg_vector_norm.default", "norm.ScalarOpt_dim", "norm.Scalar", "all.dim",
    "any.dim", "prod.dim_int", "nansum.default", "count_nonzero.default",
)  # fmt: skip
def reduce(inference: Inference, node: fx.Node) -> Facts:
    """Dimensions that vanish (or stay with size 1). Along units, each sub-model reduces its own."""
    x = node_arg(node)
    shape = inference.shape(x)
    name = base_name(node)
    place = {"linalg_vector_norm": 2, "norm": 2}.get(name, 1)
    takes_dim = len(overload_of(node)._schema.arguments) > 1
    dim = argument(node, place, "dim") if takes_dim else None
    if name in ("var", "std") and isinstance(dim, bool):
        dim = None
    return _reduced(inference, x, _dims(dim, len(shape)), node.meta["value"].ndim, name)


def _reduced(inference: Inference, x: fx.Node, dims: list[int], rank: int, name: str) -> Facts:
    facts = Facts((), linear=(x,) if name in LINEAR else ())
    shape = inference.shape(x)
    outputs: list[Ids] = []
    for ids in inference.factors(x):
        ids = inference.units.settle(ids, dims)
        over = tuple(dim for dim in varying(ids) if dim in dims)
        if over:
            facts.mixes.append((ids, over))
        index = tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(ids.ndim))
        left = ids[index] if over else ids
        if rank != len(shape):
            left = left.reshape([size for dim, size in enumerate(left.shape) if dim not in dims])
        if varying(left):
            outputs.append(left)
    facts.outputs = tuple(outputs)
    return facts


@rule(
    "var_mean.default", "var_mean.dim", "var_mean.correction", "std_mean.default", "std_mean.dim",
    "std_mean.correction",
)  # fmt: skip
def moments(inference: Inference, node: fx.Node) -> Facts:
    """Variance (or its root) and mean over dimensions."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    dim = argument(node, 1, "dim")
    values: Any = node.meta["value"]
    dims = _dims(None if isinstance(dim, bool) else dim, rank)
    facts = _reduced(inference, x, dims, values[0].ndim, "var")
    assert isinstance(facts.outputs, tuple)
    facts.outputs = [facts.outputs, facts.outputs]
    return facts


@rule("histc.default", "bincount.default")
def counts(inference: Inference, node: fx.Node) -> Facts:
    """How many entries fall into each class: each sub-model counts its own."""
    x = node_arg(node)
    facts = Facts(())
    for ids in inference.factors(x):
        facts.mixes.append((ids, varying(ids)))
    return facts


@rule("max.dim", "min.dim", "median.dim", "nanmedian.dim", "mode.default", "kthvalue.default")
def reduce_with_indices(inference: Inference, node: fx.Node) -> Facts:
    """Values and positions along one dimension."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    values: Any = node.meta["value"]
    place = 2 if base_name(node) == "kthvalue" else 1
    facts = _reduced(inference, x, _dims(argument(node, place, "dim", -1), rank), values[0].ndim, "max")
    assert isinstance(facts.outputs, tuple)
    facts.outputs = [facts.outputs, facts.outputs]
    return facts


@rule("aminmax.default")
def extremes(inference: Inference, node: fx.Node) -> Facts:
    """The smallest and the largest entry along a dimension, or of all."""
    x = node_arg(node)
    values: Any = node.meta["value"]
    dims = _dims(node.kwargs.get("dim"), len(inference.shape(x)))
    facts = _reduced(inference, x, dims, values[0].ndim, "max")
    assert isinstance(facts.outputs, tuple)
    facts.outputs = [facts.outputs, facts.outputs]
    return facts


@rule(
    "softmax.int", "log_softmax.int", "_softmax.default", "_log_softmax.default", "cumsum.default",
    "cumprod.default", "logcumsumexp.default", "softmin.default", "gumbel_softmax.default",
)  # fmt: skip
def along(inference: Inference, node: fx.Node) -> Facts:
    """Each entry depends on the others along one dimension; the shape stays."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    return mixed_along(inference, x, _dims(node.args[1], rank))


def mixed_along(inference: Inference, x: fx.Node, dims: Sequence[int], *, linear: bool = False) -> Facts:
    """Facts of an op that mixes the entries along some dimensions and keeps the shape."""
    facts = Facts((), linear=(x,) if linear else ())
    outputs = []
    for ids in inference.factors(x):
        ids = inference.units.settle(ids, dims)
        over = tuple(dim for dim in varying(ids) if dim in dims)
        if over:
            facts.mixes.append((ids, over))
        outputs.append(ids)
    facts.outputs = tuple(outputs)
    return facts


@rule("cummax.default", "cummin.default")
def running(inference: Inference, node: fx.Node) -> Facts:
    """The largest (smallest) entry so far along a dimension, and its place."""
    facts = along(inference, node)
    assert isinstance(facts.outputs, tuple)
    facts.outputs = [facts.outputs, facts.outputs]
    return facts


@rule("sort.default", "sort.stable", "topk.default", "argsort.default")
def order(inference: Inference, node: fx.Node) -> Facts:
    """An order along a dimension that holds no units leaves the others as they are."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    name = base_name(node)
    place = 2 if name == "topk" else 1
    dim = _dims(argument(node, place, "dim", -1), rank)[0]
    factors = inference.factors(x)
    if any(ids.shape[dim] > 1 for ids in factors):
        return whole(inference, node, f"{name} along units")
    several = isinstance(node.meta["value"], tuple)
    return Facts([factors, factors] if several else factors)


@rule("cosine_similarity.default")
def cosine_similarity(inference: Inference, node: fx.Node) -> Facts:
    """Angle along one dimension: each sub-model has that of its own units."""
    from graphsplit.analysis.rules.pointwise import align

    a, b = node.args[:2]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    rank = max(len(inference.shape(a)), len(inference.shape(b)))
    factors, expects = align(inference, rank, [((0,), a), ((1,), b)])
    dim = int(argument(node, 2, "dim", 1)) % rank
    facts = Facts((), expects)
    outputs = []
    for ids in factors:
        ids = inference.units.settle(ids, [dim])
        if ids.shape[dim] > 1:
            facts.mixes.append((ids, (dim,)))
        left = ids[tuple(0 if d == dim else slice(None) for d in range(rank))]
        if varying(left):
            outputs.append(left)
    facts.outputs = tuple(outputs)
    return facts
