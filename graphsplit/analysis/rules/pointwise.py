"""Element-wise ops with broadcasting: aligned dimensions index the same units."""

from __future__ import annotations

import numpy as np
from torch import fx

from graphsplit.analysis.facts import Facts, Path, argument, rule
from graphsplit.analysis.inference import Inference, operands, whole
from graphsplit.analysis.units import Factors, Ids, seen_by, varying
from graphsplit.graphs import base_name, node_arg, node_list_arg

# One tensor in, one of the same shape out, each entry by itself.
UNARY = [
    "abs", "acos", "alias", "angle", "asin", "atan", "bitwise_not", "ceil", "celu", "clone", "contiguous",
    "cos", "deg2rad", "detach", "dropout", "elu", "erf", "erfc", "exp", "exp2", "expm1", "feature_dropout",
    "alpha_dropout", "feature_alpha_dropout", "floor", "frac", "gelu", "hardshrink", "hardsigmoid",
    "hardswish", "hardtanh", "isfinite", "isinf", "isnan", "leaky_relu", "log", "log10", "log1p", "log2",
    "log_sigmoid", "logical_not", "logit", "mish", "neg", "negative", "positive", "reciprocal", "relu",
    "relu6", "round", "rrelu", "rsqrt", "selu", "sgn", "sigmoid", "sign", "silu", "sin", "sinc", "sinh",
    "softplus", "softshrink", "softsign", "special_expit", "special_erf", "sqrt", "square", "tan", "tanh",
    "tanhshrink", "threshold", "trunc", "nan_to_num", "zeros_like", "ones_like", "full_like", "empty_like",
    "rand_like", "randn_like", "bernoulli", "cosh", "asinh", "acosh", "atanh", "real", "imag", "conj",
    "conj_physical", "resolve_conj", "resolve_neg", "isposinf", "isneginf", "signbit", "rad2deg", "erfinv",
    "lgamma", "digamma", "i0", "special_i0e", "special_i1", "special_i1e", "special_entr",
    "special_log_ndtr", "special_ndtr", "special_ndtri", "arccos", "arcsin", "arctan", "arccosh", "arcsinh",
    "arctanh", "absolute", "fix", "special_erfc", "special_expm1", "special_exp2", "special_sinc",
    "special_log1p", "special_round", "special_digamma", "special_gammaln", "lift_fresh_copy",
    "isreal", "special_erfcx", "special_airy_ai", "special_spherical_bessel_j0", "mvlgamma",
    *(f"special_bessel_{kind}{n}" for kind in "jy" for n in (0, 1)),
    *(f"special_modified_bessel_{kind}{n}" for kind in "ik" for n in (0, 1)),
    *(f"special_scaled_modified_bessel_k{n}" for n in (0, 1)),
]  # fmt: skip

# Several tensors, broadcast against each other.
NARY = [
    "add", "sub", "mul", "div", "rsub", "pow", "maximum", "minimum", "fmod", "remainder", "floor_divide",
    "true_divide", "atan2", "eq", "ne", "lt", "le", "gt", "ge", "less", "greater", "less_equal",
    "greater_equal", "not_equal", "equal", "logical_and", "logical_or", "logical_xor", "bitwise_and",
    "bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__", "where", "masked_fill", "addcmul", "addcdiv",
    "lerp", "multiply", "divide", "subtract", "copysign", "hypot", "logaddexp", "xlogy", "clamp", "clamp_min",
    "clamp_max", "clip", "fill", "copy", "heaviside", "complex", "polar", "logaddexp2", "fmax", "fmin",
    "float_power", "ldexp", "nextafter", "isclose", "gcd", "lcm", "bitwise_left_shift",
    "bitwise_right_shift", "__lshift__", "__rshift__", "special_xlog1py", "special_xlogy", "special_zeta",
    "arctan2", "igamma", "igammac",
]  # fmt: skip

# Zero in, zero out: such an op keeps cross weights at zero.
KEEPS_ZERO = {
    "abs", "alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "floor", "neg", "relu",
    "sign", "sin", "sqrt", "square", "tan", "tanh", "trunc", "mul", "multiply", "div", "divide",
    "true_divide", "gelu", "silu", "leaky_relu", "elu", "hardtanh", "erf", "expm1", "log1p", "round", "ceil",
    "sgn", "asin", "atan", "sinh", "to", "real", "imag", "conj", "conj_physical", "resolve_conj",
    "resolve_neg", "lift_fresh_copy",
}  # fmt: skip

# Affine in the first operand: f(mean of x) = mean of f(x).
LINEAR = {
    "alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "neg", "negative", "positive",
    "to", "real", "imag", "conj", "conj_physical", "resolve_conj", "resolve_neg", "lift_fresh_copy",
}  # fmt: skip
LINEAR_JOINTLY = {"add", "sub", "subtract", "rsub", "complex"}
LINEAR_IN_FIRST = {"div", "divide", "true_divide"}
LINEAR_IN_ONE = {"mul", "multiply"}


def align(
    inference: Inference, rank: int, parts: list[tuple[Path, fx.Node]]
) -> tuple[Factors, dict[Path, Factors]]:
    """Couple operands that are broadcast against each other.

    Returns:
        Factors of a result of rank ``rank``, and for operands without units in a dimension where the result
        has them the factors by which they are sliced.
    """
    for _, node in parts:
        _choose_dimension(inference, node, rank, parts)
    for _, node in parts:
        _adopt_from_others(inference, node, rank, parts)
    for _, node in parts:
        _yield_to_data(inference, node, rank, parts)
    return meet(inference, rank, [(path, inference.shape(n), inference.factors(n)) for path, n in parts])


Met = tuple[Path, tuple[int, ...], Factors]
"""An operand among others: its place, its shape, its factors."""


def meet(inference: Inference, rank: int, given: list[Met]) -> tuple[Factors, dict[Path, Factors]]:
    """`align` for operands whose factors are known."""
    groups: list[tuple[set[int], list[Ids]]] = []
    for _, shape, own in given:
        for ids in own:
            lifted = ids.reshape((1,) * (rank - len(shape)) + ids.shape)
            groups = _join(groups, set(varying(lifted)), lifted)
    factors = []
    for _, members in groups:
        for other in members[1:]:
            inference.units.couple(members[0], other)
        factors.append(_settle_for(inference, _widest(members), rank, given))
    factors = [ids for ids in factors if varying(ids)]
    return tuple(factors), _slices(given, factors)


def _choose_dimension(
    inference: Inference, node: fx.Node, rank: int, parts: list[tuple[Path, fx.Node]]
) -> None:
    """A parameter is divided along one dimension where units lie across several of its own: by heads, say."""
    if node in inference.data or inference.is_common(node):
        return
    shape = inference.shape(node)
    for _, other in parts:
        if other not in inference.data:
            continue
        shift = len(shape) - len(inference.shape(other))
        for ids in inference.factors(other):
            across = {dim + shift for dim in varying(ids) if dim + shift >= 0 and shape[dim + shift] > 1}
            known = inference.known_factors(node) if node.op == "get_attr" else inference.factors(node)
            if len(across) < 2 or any(len(across & set(varying(own))) > 1 for own in known):
                continue
            kept = ids
            while len(varying(kept)) > 1:
                kept = inference.units.settle(kept, varying(kept)[1:])
            across -= {dim + shift for dim in varying(kept)}
            for dim in across:
                if inference.unset(node, dim):
                    inference.adopt(node, dim, None)
            for own in known:
                if varying(own) and set(varying(own)) <= across:
                    inference.units.share(own)


def _adopt_from_others(
    inference: Inference, node: fx.Node, rank: int, parts: list[tuple[Path, fx.Node]]
) -> None:
    """A parameter met for the first time takes the ids of what it is combined with."""
    shape = inference.shape(node)
    for dim in range(len(shape)):
        if inference.unset(node, dim):
            place = dim + rank - len(shape)
            for _, other in parts:
                if other is node or other.op == "get_attr":
                    continue
                offset = rank - len(inference.shape(other))
                for ids in inference.factors(other):
                    if varying(ids) == (place - offset,) and inference.unset(node, dim):
                        inference.adopt(node, dim, ids.ravel())


def _yield_to_data(inference: Inference, node: fx.Node, rank: int, parts: list[tuple[Path, fx.Node]]) -> None:
    """A parameter (or what is made of some) has no units along dimensions in which an activation has none."""
    if node in inference.data or inference.is_common(node):
        return
    whole: set[int] = set()
    for _, other in parts:
        if other in inference.data:
            shape = inference.shape(other)
            offset = rank - len(shape)
            own = {dim for ids in inference.factors(other) for dim in varying(ids)}
            whole |= {dim + offset for dim, size in enumerate(shape) if size > 1 and dim not in own}
    offset = rank - len(inference.shape(node))
    for dim in range(len(inference.shape(node))):
        if dim + offset in whole and inference.unset(node, dim):
            inference.adopt(node, dim, None)
    for ids in inference.factors(node):
        if {dim + offset for dim in varying(ids)} <= whole:
            inference.units.share(ids)


def _join(
    groups: list[tuple[set[int], list[Ids]]], dims: set[int], ids: Ids
) -> list[tuple[set[int], list[Ids]]]:
    """Add a factor; groups that vary along a common dimension become one."""
    rest = [group for group in groups if not group[0] & dims]
    for group in groups:
        if group[0] & dims:
            dims = dims | group[0]
    members = [member for group in groups if group[0] & dims for member in group[1]]
    return [*rest, (dims, [*members, ids])]


def _settle_for(inference: Inference, ids: Ids, rank: int, given: list[Met]) -> Ids:
    """Choose what carries a factor of several dimensions where an operand without units has only some of them
    (a rotary table ``[S, D]`` met by heads ``[H, D]``)."""
    for _, shape, factors in given:
        offset = rank - len(shape)
        own = {dim + offset for factor in factors for dim in varying(factor)}
        met = [dim for dim in varying(ids) if dim >= offset and shape[dim - offset] > 1]
        if met and not own & set(met):
            ids = inference.units.settle(ids, met)
    return ids


def _widest(members: list[Ids]) -> Ids:
    shape = np.broadcast_shapes(*(member.shape for member in members))
    for member in members:
        if member.shape == shape:
            return member
    return np.broadcast_to(members[0], shape)


def _slices(given: list[Met], factors: list[Ids]) -> dict[Path, Factors]:
    """For operands without units where the result has some: the factors by which they are sliced."""
    expects: dict[Path, Factors] = {}
    for path, shape, held in given:
        own = {dim for ids in held for dim in varying(ids)}
        lacking = False
        wanted = []
        for ids in factors:
            cut = seen_by(ids, shape)
            dims = varying(cut)
            if dims:
                wanted.append(cut)
                lacking |= any(dim not in own for dim in dims)
        if lacking:
            expects[path] = tuple(wanted)
    return expects


@rule(
    *(f"{name}.default" for name in UNARY),
    "to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy.default", "bernoulli.p",
    "round.decimals", "normal_functional.default", "log_normal.default", "uniform.default",
    "exponential.default",
)  # fmt: skip
def unary(inference: Inference, node: fx.Node) -> Facts:
    """``y = f(x)``: same factors."""
    operand = node_arg(node)
    name = base_name(node)
    return Facts(
        inference.factors(operand),
        linear=(operand,) if name in LINEAR else (),
        keeps_zero=name in KEEPS_ZERO and (name != "hardtanh" or _within_bounds(node)),
    )


def _within_bounds(node: fx.Node) -> bool:
    """Does a ``hardtanh`` leave zero as it is?"""
    return bool(argument(node, 1, "min_val", -1) <= 0 <= argument(node, 2, "max_val", 1))


@rule(
    *(f"{name}.{overload}" for name in NARY for overload in ("default", "Tensor", "Scalar", "self", "other")),
    "pow.Tensor_Scalar", "pow.Tensor_Tensor", "where.ScalarOther", "where.ScalarSelf", "max.other",
    "min.other", "div.Tensor_mode", "div.Scalar_mode", "lerp.Scalar_", "remainder.Scalar_Tensor",
    "clamp.Tensor_minmax", "_prelu_kernel.default", "float_power.Tensor_Tensor", "float_power.Tensor_Scalar",
)  # fmt: skip
def nary(inference: Inference, node: fx.Node) -> Facts:
    """``y = f(a, b, ...)`` with broadcasting."""
    value = node.meta["value"]
    parts = list(operands(node))
    factors, expects = align(inference, value.ndim, parts)
    name = base_name(node)
    varied = [part for _, part in parts if not inference.is_common(part)]
    linear = tuple(varied) if _is_linear(node, name, varied) else ()
    return Facts(factors, expects, linear=linear, keeps_zero=_keeps_zero(inference, node, name))


def _keeps_zero(inference: Inference, node: fx.Node, name: str) -> bool:
    """Is the result zero wherever an operand between two axes is? Of a quotient, the dividend may be."""
    if name not in KEEPS_ZERO:
        return False
    return name in LINEAR_IN_ONE or all(len(inference.factors(divisor)) < 2 for divisor in node.args[1:])


def _is_linear(node: fx.Node, name: str, varied: list[fx.Node]) -> bool:
    """Is an op jointly linear in the operands that are not the same in all sub-models?"""
    if name in LINEAR_JOINTLY:
        return True
    if name in LINEAR_IN_ONE:
        return len(varied) == 1
    if name in LINEAR_IN_FIRST:
        return varied == [node.args[0]] and "mode" not in str(node.target)
    if name == "where":
        return node.args[0] not in varied
    if name == "masked_fill":
        return node.args[1] not in varied
    return False


@rule("prelu.default")
def prelu(inference: Inference, node: fx.Node) -> Facts:
    """One slope, or one for each channel (dimension 1)."""
    operand, weight = node.args
    assert isinstance(operand, fx.Node) and isinstance(weight, fx.Node)
    factors = inference.factors(operand)
    shape = inference.shape(operand)
    count = inference.shape(weight)[0] if inference.shape(weight) else 1
    if count == 1:
        return Facts(factors, keeps_zero=True)
    if not any(ids.shape[1] > 1 for ids in factors):
        inference.share(weight)
        return Facts(factors, keeps_zero=True)
    lifted = (1, count, *(1,) * (len(shape) - 2))
    slopes = tuple(ids.reshape(lifted) for ids in inference.factors(weight))
    factors, expects = meet(inference, len(shape), [((0,), shape, factors), ((1,), lifted, slopes)])
    if (1,) in expects:
        expects[(1,)] = tuple(ids.ravel() for ids in expects[(1,)])
    return Facts(factors, expects, keeps_zero=True)


@rule("bucketize.Tensor")
def bucketize(inference: Inference, node: fx.Node) -> Facts:
    """The number of the interval that each entry falls into."""
    if not inference.is_common(node.args[1]):
        return whole(inference, node, "bucketize with bounds that are no constants")
    return Facts(inference.factors(node_arg(node)))


@rule("type_as.default")
def type_as(inference: Inference, node: fx.Node) -> Facts:
    """A cast; the second operand gives the dtype alone."""
    x = node_arg(node)
    return Facts(inference.factors(x), linear=(x,), keeps_zero=True)


@rule("expand_as.default")
def expand_as(inference: Inference, node: fx.Node) -> Facts:
    """``x`` broadcast to the shape of another tensor."""
    operand, other = node.args
    assert isinstance(operand, fx.Node) and isinstance(other, fx.Node)
    factors, expects = align(inference, len(inference.shape(other)), [((0,), operand), ((1,), other)])
    return Facts(factors, expects, linear=(operand,) if inference.is_common(other) else (), keeps_zero=True)


@rule("broadcast_tensors.default")
def broadcast(inference: Inference, node: fx.Node) -> Facts:
    """Tensors expanded to one shape."""
    parts: list[tuple[Path, fx.Node]] = [((0, place), x) for place, x in enumerate(node_list_arg(node))]
    values = node.meta["value"]
    factors, expects = align(inference, values[0].ndim, parts)
    linear = tuple(x for _, x in parts if not inference.is_common(x))
    return Facts([factors] * len(values), expects, linear=linear, keeps_zero=True)


@rule("glu.default")
def glu(inference: Inference, node: fx.Node) -> Facts:
    """The first half of a dimension gated by the second."""
    operand = node_arg(node)
    rank = len(inference.shape(operand))
    dim = argument(node, 1, "dim", -1) % rank
    factors = []
    for ids in inference.factors(operand):
        if ids.shape[dim] > 1:
            first, second = np.split(ids, 2, axis=dim)
            inference.units.couple(first, second)
            ids = first
        factors.append(ids)
    return Facts(tuple(factors))
