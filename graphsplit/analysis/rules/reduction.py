"""Reductions, softmax and other ops along a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from graphsplit.analysis.facts import Facts, argument, rule
from graphsplit.analysis.inference import Inference, operands
from graphsplit.analysis.rules.pointwise import align
from graphsplit.analysis.units import Factors, Ids, varying
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
    "any.dim", "prod.dim_int", "nansum.default", "count_nonzero.default", "linalg_matrix_norm.default",
    "linalg_matrix_norm.str_ord", "all.dims", "any.dims", "count_nonzero.dim_IntList", "median.default",
    "nanmedian.default",
)  # fmt: skip
def reduce(inference: Inference, node: fx.Node) -> Facts:
    """Dimensions that vanish (or stay with size 1). Along units, each sub-model reduces its own."""
    x = node_arg(node)
    shape = inference.shape(x)
    name = base_name(node)
    place = 2 if name.endswith("norm") else 1
    takes_dim = len(overload_of(node)._schema.arguments) > 1
    dim = argument(node, place, "dim", [-2, -1] if "matrix" in name else None) if takes_dim else None
    if name in ("var", "std") and isinstance(dim, bool):
        dim = None
    return _reduced(inference, x, _dims(dim, len(shape)), node.meta["value"].ndim, name)


def _reduced(inference: Inference, x: fx.Node, dims: list[int], rank: int, name: str) -> Facts:
    facts = _reduced_factors(inference, inference.factors(x), dims, rank == len(inference.shape(x)))
    facts.linear = (x,) if name in LINEAR else ()
    return facts


def _reduced_factors(inference: Inference, factors: Factors, dims: list[int], keeps: bool) -> Facts:
    """What is left of factors where some dimensions vanish, or with ``keeps`` become one long."""
    facts = Facts(())
    outputs: list[Ids] = []
    for ids in factors:
        ids = inference.units.settle(ids, dims)
        over = tuple(dim for dim in varying(ids) if dim in dims)
        if over:
            facts.mixes.append((ids, over))
        index = tuple(slice(0, 1) if dim in dims else slice(None) for dim in range(ids.ndim))
        left = ids[index] if over else ids
        if not keeps:
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


@rule(
    "max.dim", "min.dim", "median.dim", "nanmedian.dim", "mode.default", "kthvalue.default", "aminmax.default"
)
def reduce_with_indices(inference: Inference, node: fx.Node) -> Facts:
    """Values and positions (``aminmax``: smallest and largest values) along one dimension."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    values: Any = node.meta["value"]
    name = base_name(node)
    dim = argument(node, 2 if name == "kthvalue" else 1, "dim", None if name == "aminmax" else -1)
    facts = _reduced(inference, x, _dims(dim, rank), values[0].ndim, name)
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


@rule("sort.default", "sort.stable", "topk.default", "argsort.default", "argsort.stable", "msort.default")
def order(inference: Inference, node: fx.Node) -> Facts:
    """An order along a dimension that holds no units leaves the others as they are."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    name = base_name(node)
    place = 2 if name == "topk" else 1
    dim = 0 if name == "msort" else argument(node, place, "dim", -1)
    factors, lost = inference.hold(x, _dims(dim, rank) if rank else [])
    several = isinstance(node.meta["value"], tuple)
    reason = f"{name} along units" if lost else None
    return Facts([factors, factors] if several else factors, whole=reason)


@rule(
    *(f"{name}.default" for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div")),
    "binary_cross_entropy.default", "binary_cross_entropy_with_logits.default", "soft_margin_loss.default",
    "poisson_nll_loss.default",
)  # fmt: skip
def loss(inference: Inference, node: fx.Node) -> Facts:
    """``f(a, b)`` entry by entry, or the mean or sum of all entries: each sub-model has that of its own."""
    parts = list(operands(node))
    rank = max(len(inference.shape(part)) for _, part in parts)
    factors, expects = align(inference, rank, parts)
    if node.meta["value"].ndim == rank:
        return Facts(factors, expects)
    return Facts((), expects, mixes=[(ids, varying(ids)) for ids in factors])


@rule("cross_entropy_loss.default", "nll_loss_nd.default")
def class_loss(inference: Inference, node: fx.Node) -> Facts:
    """``-log p[n, target[n]]``: classes are told apart by their places, so no dimension is divided."""
    lost = False
    for operand in node.all_input_nodes:
        lost |= inference.hold(operand, range(len(inference.shape(operand))))[1]
    return Facts((), whole="classes are units" if lost else None)


@rule("cosine_similarity.default")
def compare(inference: Inference, node: fx.Node) -> Facts:
    """The angle along one dimension: each sub-model has that of its own units."""
    a, b = node.args[:2]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    rank = max(len(inference.shape(a)), len(inference.shape(b)))
    factors, expects = align(inference, rank, [((0,), a), ((1,), b)])
    dims = _dims(argument(node, 2, "dim", 1), rank)
    facts = _reduced_factors(inference, factors, dims, node.meta["value"].ndim == rank)
    facts.expects = expects
    return facts
