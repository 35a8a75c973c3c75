"""Rules of fusion: how an op of one model is done for K models at once."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import torch
from torch import fx

from graphsplit.analysis.rules.pointwise import NARY, UNARY
from graphsplit.builder import aten
from graphsplit.fusion.fuser import Fuser, Layout, Result, Value, rule
from graphsplit.graphs import base_name, draws, overload_of
from graphsplit.program import Dim, TensorMeta, meta_of

Arguments = dict[str, Any]
SAME, STACK, JOIN, MATRIX, FOLD = Layout.SAME, Layout.STACK, Layout.JOIN, Layout.MATRIX, Layout.FOLD


def _values(arguments: Arguments) -> list[Value]:
    """Tensors among arguments, those of lists too."""
    found = []
    for argument in arguments.values():
        items = argument if isinstance(argument, (list, tuple)) else [argument]
        found += [item for item in items if isinstance(item, Value)]
    return found


def _with(arguments: Arguments, change: Any) -> Arguments:
    """Arguments with every value changed to a node."""

    def changed(item: Any) -> Any:
        if isinstance(item, Value):
            return change(item)
        if isinstance(item, (list, tuple)):
            return [changed(each) for each in item]
        return item

    return {name: changed(argument) for name, argument in arguments.items()}


# -- entry by entry ------------------------------------------------------------------------------------------

_BY_CHANNEL = {"feature_dropout", "feature_alpha_dropout"}


@rule(*(name for name in (*UNARY, *NARY) if name not in _BY_CHANNEL), "to", "_to_copy")
def pointwise(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Broadcasting as in one model, in the layout of an operand where all can be in it, else on stacks."""
    meta = node.meta.get("value")
    values = _values(arguments)
    if not isinstance(meta, TensorMeta) or _promotes(values, meta):
        return None
    if base_name(node) in ("fill", "copy", "masked_fill"):  # into the first, in its shape
        first, *others = values
        if any(value.layout is not SAME and value.meta.ndim == 0 for value in others):
            return None
        if first.layout is SAME:
            whole = Value(fuser.stack(first), STACK, first.meta)
            arguments = {**arguments, "self": whole}
            values = [whole, *others]
    if any(value.layout is FOLD for value in values) and fuser.can_fold(meta):
        nodes = {value: _foldable(fuser, value, meta) for value in values}
        if all(found is not None for found in nodes.values()):
            return fuser.invoke(node, _with(arguments, nodes.__getitem__), FOLD)
    for layout, operand in ((MATRIX, _as_matrix), (JOIN, _joinable)):
        led = next((value for value in values if value.layout is layout), None)
        if led is not None:
            nodes = {value: operand(fuser, value, meta) for value in values}
            if all(found is not None for found in nodes.values()):
                return fuser.invoke(node, _with(arguments, nodes.__getitem__), layout, led.sizes)

    def stacked(value: Value) -> fx.Node:
        if value.layout is SAME and not (draws(node) and value.meta.ndim == meta.ndim):
            return value.node
        return fuser.aligned(value, meta.ndim)

    return fuser.invoke(node, _with(arguments, stacked), STACK)


def _promotes(values: list[Value], result: TensorMeta) -> bool:
    """True where a stack would choose another dtype: tensors without dimensions yield to those with some."""
    if result.ndim == 0:
        return len({value.meta.dtype for value in values}) > 1
    dtypes = {value.meta.dtype for value in values if value.meta.ndim}
    return any(not v.meta.ndim and v.layout is not SAME and v.meta.dtype not in dtypes for v in values)


@rule("type_as")
def type_as(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Of the other tensor only the dtype matters."""
    x = arguments["self"]
    return fuser.invoke(node, {"self": x.node, "other": arguments["other"].node}, x.layout, x.sizes)


def _foldable(fuser: Fuser, value: Value, result: TensorMeta) -> fx.Node | None:
    """An operand that broadcasts against folded values; None where it has to be a stack."""
    channels, own = result.shape[1], value.meta
    if value.layout is FOLD:
        return value.node if own.ndim == result.ndim and own.shape[1] == channels else None
    place = 1 - (result.ndim - own.ndim)  # where the operand's channels are
    many = place >= 0 and own.shape[place] == channels and channels > 1
    if value.layout is SAME and not many:
        return value.node
    if not many:
        return None
    if place == 1:
        return fuser.fold(value) if own.dims[1].symbol is None else None
    return fuser.join(value) if value.layout is STACK else None


def _as_matrix(fuser: Fuser, value: Value, result: TensorMeta) -> fx.Node | None:
    """An operand that broadcasts against matrices; None where it has to be a stack."""
    own = value.meta
    if own.ndim <= 1:
        return value.node if value.layout is SAME else fuser.aligned(value, 2)
    if value.layout in (SAME, FOLD) or own.dims[:-1] != result.dims[:-1]:
        return None
    return fuser.matrix(value)


def _joinable(fuser: Fuser, value: Value, result: TensorMeta) -> fx.Node | None:
    """An operand that broadcasts against all models as one batch; None where it has to be a stack."""
    own = value.meta
    if value.layout is SAME:
        return value.node if own.ndim < result.ndim or own.dims[0] == Dim(1) else None
    if value.layout is FOLD or own.ndim != result.ndim or own.dims[0] != result.dims[0]:
        return None
    return fuser.join(value)


# -- images --------------------------------------------------------------------------------------------------


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
    return fuser.invoke_as_one_batch(node, {**arguments, first: fuser.join(x)})


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
        return fuser.invoke_as_one_batch(node, {**arguments, first: fuser.join(x)})
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
    x, *others = _values(arguments)
    if not fuser.can_fold(x.meta) or any(value.layout is SAME for value in others):
        return None
    changed = _with(arguments, lambda value: fuser.fold(value) if value is x else fuser.join(value))
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
    return fuser.invoke_as_one_batch(node, _with(arguments, fuser.join))


@rule("rand", "randn")
def random_numbers(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Each model's own, drawn together."""
    return fuser.invoke(node, {**arguments, "size": [fuser.k, *arguments["size"]]}, STACK)


# -- products ------------------------------------------------------------------------------------------------


@rule("linear")
def linear(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """One product of K matrices; of an input that is the same for all, one of a K times larger matrix."""
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    meta = meta_of(node)
    if weight.layout is SAME or weight.meta.ndim != 2 or x.meta.ndim < 2:
        return None
    if isinstance(bias, Value) and bias.layout is SAME:
        return None
    if x.layout is SAME:
        return _of_one_input(fuser, node, x, weight, bias)
    build, k = fuser.build, fuser.k
    turned = TensorMeta((Dim(k), *reversed(weight.meta.dims)), weight.meta.dtype, weight.meta.device)
    given, matrix = fuser.matrix(x), build.call(aten.transpose.int, (fuser.stack(weight), 1, 2), turned)
    layout, sizes = (STACK, ()) if meta.ndim == 2 else (MATRIX, fuser.sizes(x))
    if bias is None:
        return fuser.call(aten.bmm.default, (given, matrix), layout, meta, sizes)
    row = TensorMeta((Dim(k), Dim(1), *bias.meta.dims), bias.meta.dtype, bias.meta.device)
    lifted = build.call(aten.unsqueeze.default, (fuser.stack(bias), 1), row)
    return fuser.call(aten.baddbmm.default, (lifted, given, matrix), layout, meta, sizes)


def _of_one_input(fuser: Fuser, node: fx.Node, x: Value, weight: Value, bias: Value | None) -> Value:
    meta = meta_of(node)
    *batch, width = meta.dims
    wide = TensorMeta((*batch, Dim(fuser.k * width.hint)), meta.dtype, meta.device)
    rows = None if bias is None else fuser.join(bias)
    made = fuser.build.call(aten.linear.default, (x.node, fuser.join(weight), rows), wide)
    if meta.ndim == 2:
        return Value(made, FOLD, meta)
    apart = TensorMeta((*batch, Dim(fuser.k), width), meta.dtype, meta.device)
    made = fuser.build.call(aten.unflatten.int, (made, meta.ndim - 1, [fuser.k, width.hint]), apart)
    order = [meta.ndim - 1, *range(meta.ndim - 1), meta.ndim]
    return Value(fuser.build.call(aten.permute.default, (made, order), fuser.stacked(meta)), STACK, meta)


@rule("addmm")
def addmm(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """One batched product."""
    bias, x, y = arguments["self"], arguments["mat1"], arguments["mat2"]
    if arguments["beta"] != 1 or arguments["alpha"] != 1:
        return None
    nodes = (fuser.aligned(bias, 2), fuser.stack(x), fuser.stack(y))
    return fuser.call(aten.baddbmm.default, nodes, STACK, meta_of(node))


@rule("matmul", "bmm", "mm")
def matmul(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """The stack is one more dimension of the batch."""
    (x, y), meta = _values(arguments), meta_of(node)
    if min(x.meta.ndim, y.meta.ndim) < 2:
        return None
    rank = max(x.meta.ndim, y.meta.ndim)
    if y.meta.ndim == 2 and rank > 2 and SAME not in (x.layout, y.layout):
        nodes = [fuser.matrix(x), fuser.stack(y)]
        return fuser.call(aten.bmm.default, tuple(nodes), MATRIX, meta, fuser.sizes(x))
    if rank > 2 and JOIN in (x.layout, y.layout):
        joined = [_joinable(fuser, value, meta) for value in (x, y)]
        if None not in joined:
            return fuser.call(aten.matmul.default, tuple(joined), JOIN, meta)
    nodes = [
        value.node if value.layout is SAME and rank > 2 else fuser.aligned(value, rank) for value in (x, y)
    ]
    return fuser.call(aten.matmul.default, tuple(nodes), STACK, meta)


@rule("baddbmm")
def baddbmm(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """As one batch of K times as many products."""
    values = _values(arguments)
    if any(value.meta.ndim != 3 or value.meta.dims[0] != values[0].meta.dims[0] for value in values):
        return None
    return fuser.invoke_as_one_batch(node, _with(arguments, fuser.join))


@rule("einsum")
def einsum(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """One letter more, for the models."""
    equation = str(arguments["equation"]).replace(" ", "")
    if "->" not in equation or arguments["path"] is not None:
        return None
    given, wanted = equation.split("->")
    letter = next(each for each in string.ascii_letters if each not in equation)
    terms = [
        term if value.layout is SAME else letter + term
        for term, value in zip(given.split(","), arguments["tensors"], strict=True)
    ]
    nodes = [value.node if value.layout is SAME else fuser.stack(value) for value in arguments["tensors"]]
    changed = f"{','.join(terms)}->{letter}{wanted}"
    return fuser.call(aten.einsum.default, (changed, nodes), STACK, meta_of(node))


@rule("scaled_dot_product_attention")
def attention(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """All models as one batch."""
    operands = [arguments[name] for name in ("query", "key", "value")]
    mask = arguments["attn_mask"]
    batch = operands[0].meta.dims[0] if operands[0].meta.ndim else None
    if any(value.meta.ndim != 4 or value.meta.dims[0] != batch for value in operands):
        return None
    if isinstance(mask, Value):
        alike = mask.layout is SAME and (mask.meta.ndim < 4 or mask.meta.dims[0] == Dim(1))
        if not alike and (mask.meta.ndim != 4 or mask.meta.dims[0] != operands[0].meta.dims[0]):
            return None
        mask = mask.node if alike else fuser.join(mask)
    nodes = dict(zip(("query", "key", "value"), map(fuser.join, operands), strict=True))
    return fuser.invoke_as_one_batch(node, {**arguments, **nodes, "attn_mask": mask})


@rule("embedding")
def embedding(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """One table of K times as many rows, in which each model's indices start behind those before."""
    table, indices, padding = arguments["weight"], arguments["indices"], arguments["padding_idx"]
    if table.layout is SAME or arguments["scale_grad_by_freq"] or arguments["sparse"]:
        return None
    build, k = fuser.build, fuser.k
    steps = np.arange(k).reshape(k, *[1] * indices.meta.ndim) * table.meta.shape[0]
    offsets = build.index(steps, indices.meta.device)
    given = indices.node if indices.layout is SAME else fuser.stack(indices)
    moved = build.call(aten.add.Tensor, (given, offsets), fuser.stacked(indices.meta))
    found = fuser.call(aten.embedding.default, (fuser.join(table), moved), STACK, meta_of(node))
    return found if padding == -1 else _without_gradient(fuser, found, given, indices, padding)


def _without_gradient(fuser: Fuser, found: Value, given: fx.Node, indices: Value, padding: int) -> Value:
    """Rows of the padding index give values, and get no gradient."""
    dims = meta_of(given).dims
    flags = TensorMeta(dims, torch.bool, indices.meta.device)
    wide = TensorMeta((*dims, Dim(1)), torch.bool, indices.meta.device)
    chosen = fuser.build.call(aten.eq.Scalar, (given, padding), flags)
    chosen = fuser.build.call(aten.unsqueeze.default, (chosen, -1), wide)
    still = fuser.call(aten.detach.default, (found.node,), STACK, found.meta)
    return fuser.call(aten.where.self, (chosen, still.node, found.node), STACK, found.meta)


@rule("layer_norm", "rms_norm")
def norm_of_rows(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Without weights, which follow by themselves."""
    x, meta = arguments["input"], meta_of(node)
    weight, bias = arguments["weight"], arguments.get("bias")
    of_last = x.meta.ndim > 2 and len(arguments["normalized_shape"]) == 1
    layout = x.layout if x.layout is SAME or (x.layout is MATRIX and of_last) else STACK
    given = x.node if layout is x.layout else fuser.stack(x)
    bare = {**arguments, "input": given, "weight": None} | ({"bias": None} if "bias" in arguments else {})
    found = fuser.invoke(node, bare, layout, x.sizes if layout is MATRIX else ())
    assert isinstance(found, Value)
    if not isinstance(weight, Value):
        return found
    rank, layout = (2, MATRIX) if layout is MATRIX else (meta.ndim, STACK)
    factor = fuser.aligned(weight, rank)
    if not isinstance(bias, Value):
        return fuser.call(aten.mul.Tensor, (found.node, factor), layout, meta, found.sizes)
    args = (fuser.aligned(bias, rank), found.node, factor)
    return fuser.call(aten.addcmul.default, args, layout, meta, found.sizes)


# -- dimensions ----------------------------------------------------------------------------------------------

_ONE = {
    "softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "sum", "mean",
    "var", "std", "amax", "amin", "max", "min", "argmax", "argmin", "topk", "sort", "argsort", "any", "all",
    "prod", "logsumexp", "linalg_vector_norm", "norm", "squeeze", "flip", "select", "slice", "narrow",
    "split",
    "split_with_sizes", "chunk", "unbind", "cat", "glu", "cosine_similarity", "diff", "count_nonzero",
    "tensor_split", "cummax", "cummin", "roll", "gather", "transpose", "swapaxes", "movedim",
    "unfold", "flatten", "unflatten", "index_select", "scatter", "scatter_add", "repeat_interleave",
    "slice_scatter", "index_add", "index_copy",
}  # fmt: skip
_BY_INDEX = {"index_select", "index_add", "index_copy"}
_NAMES = ("dim", "dim0", "dim1", "dims", "axis0", "axis1", "source", "destination", "dimension", "start_dim",
          "end_dim")  # fmt: skip
_REDUCES_ALL = {
    "sum", "mean", "var", "std", "amax", "amin", "max", "min", "any", "all", "prod", "norm", "argmax",
    "argmin", "linalg_vector_norm", "squeeze", "flip", "roll", "count_nonzero",
}  # fmt: skip
_FOLDED = _ONE - _BY_INDEX - {"cosine_similarity", "unbind", "movedim", "norm", "unflatten"}


@rule(*_ONE)
def along(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """The same dimension, one further on; on folded values where it is behind the channels."""
    if "other" in arguments and base_name(node) in ("max", "min"):
        return pointwise(fuser, node, arguments)
    if base_name(node) == "cat":  # an empty list of numbers counts for nothing, whatever its rank
        arguments = {**arguments, "tensors": [x for x in arguments["tensors"] if x.meta.shape != (0,)]}
    keep = arguments.get("index") if base_name(node) in _BY_INDEX else None
    if keep is not None and keep.layout is not SAME:
        return None
    moving = [value for value in _values(arguments) if value is not keep]
    rank = moving[0].meta.ndim
    if not rank or any(value.meta.ndim != rank for value in moving):
        return None
    dims = {
        name: arguments[name]
        for name in _NAMES
        if name in arguments and not isinstance(arguments[name], Value)
    }
    if base_name(node) in _REDUCES_ALL and all(dim is None or dim == [] for dim in dims.values()):
        return _to_one_number(fuser, node, arguments, moving)
    places = {name: _normal(dim, rank) for name, dim in dims.items() if dim is not None}
    for layout in (_along_folded, _along_joined, _along_matrices):
        found = layout(fuser, node, arguments, moving, places)
        if found is not None:
            return found
    shifted = {name: _shift(place) for name, place in places.items()}

    def stacked(value: Value) -> fx.Node:
        return value.node if value is keep else fuser.stack(value)

    return fuser.invoke(node, {**_with(arguments, stacked), **shifted}, STACK)


def _to_one_number(fuser: Fuser, node: fx.Node, arguments: Arguments, values: list[Value]) -> Result | None:
    """Sum or mean over everything of one model."""
    target = {"sum": aten.sum.dim_IntList, "mean": aten.mean.dim}.get(base_name(node))
    if target is None or "dim" in arguments:
        return None
    (x,) = values
    dims = list(range(1, x.meta.ndim + 1))
    options = {} if arguments["dtype"] is None else {"dtype": arguments["dtype"]}
    meta = meta_of(node)
    made = fuser.build.call(target, (fuser.stack(x), dims), fuser.stacked(meta), options)
    return Value(made, STACK, meta)


def _results(node: fx.Node) -> list[Any]:
    metas = node.meta.get("value")
    return list(metas) if isinstance(metas, tuple) else [metas]


def _flat(places: dict[str, Any]) -> list[int]:
    return [place for entry in places.values() for place in (entry if isinstance(entry, list) else [entry])]


def _along_joined(
    fuser: Fuser, node: fx.Node, arguments: Arguments, values: list[Value], places: dict[str, Any]
) -> Result | None:
    """Behind the batch of all models."""
    batch = values[0].meta.dims[0]
    if any(value.layout is not JOIN or value.meta.dims[0] != batch for value in values):
        return None
    results = _results(node)
    if not all(isinstance(item, TensorMeta) and item.dims[:1] == (batch,) for item in results):
        return None
    if not places or min(_flat(places)) < 1:
        return None
    return fuser.invoke(node, {**_with(arguments, lambda value: value.node), **places}, JOIN)


def _along_matrices(
    fuser: Fuser, node: fx.Node, arguments: Arguments, values: list[Value], places: dict[str, Any]
) -> Result | None:
    """Along the last dimension."""
    *between, _ = values[0].meta.dims
    if any(value.layout is not MATRIX or list(value.meta.dims[:-1]) != between for value in values):
        return None
    if set(_flat(places)) != {len(between)}:
        return None
    if base_name(node) == "unflatten" and -1 not in {*values[0].sizes} & {*arguments["sizes"]}:
        args = (values[0].node, [fuser.k, *values[0].sizes, *arguments["sizes"]])
        return fuser.call(aten.reshape.default, args, STACK, meta_of(node))
    results = _results(node)
    if not all(isinstance(item, TensorMeta) and list(item.dims[:-1]) == between for item in results):
        return None
    last = {name: [2] if isinstance(place, list) else 2 for name, place in places.items()}
    nodes = _with(arguments, lambda value: value.node)
    return fuser.invoke(node, {**nodes, **last}, MATRIX, values[0].sizes)


def _along_folded(
    fuser: Fuser, node: fx.Node, arguments: Arguments, values: list[Value], places: dict[str, Any]
) -> Result | None:
    if base_name(node) not in _FOLDED or any(value.layout is not FOLD for value in values):
        return None
    if not all(isinstance(item, TensorMeta) and fuser.can_fold(item) for item in _results(node)):
        return None
    flat = _flat(places)
    if base_name(node) == "flatten" and _is_for_products(node) and flat == [1, values[0].meta.ndim - 1]:
        return _rows_of_models(fuser, values[0], meta_of(node))
    first = 1 if base_name(node) == "flatten" else 2
    if flat and min(flat) >= first:
        return fuser.invoke(node, {**_with(arguments, lambda value: value.node), **places}, FOLD)
    if flat == [1] and base_name(node) in ("cat", "chunk", "split", "split_with_sizes", "slice", "narrow"):
        return _along_channels(fuser, node, arguments, next(iter(places)))
    return None


def _along_channels(fuser: Fuser, node: fx.Node, arguments: Arguments, name: str) -> Result | None:
    """On ``[N, K, C, ...]``, where models and their channels are apart."""

    def apart(meta: TensorMeta) -> TensorMeta:
        batch, channels, *rest = meta.dims
        return TensorMeta((batch, Dim(fuser.k), channels, *rest), meta.dtype, meta.device)

    meta = node.meta["value"]
    given = {**_with(arguments, fuser.apart), name: 2}
    args = tuple(given[a.name] for a in overload_of(node)._schema.arguments)
    if isinstance(meta, TensorMeta):
        made = fuser.build.call(node.target, args, apart(meta))
        return Value(fuser.flat(made, 1, fuser.folded(meta)), FOLD, meta)
    made = fuser.build.call(node.target, args, tuple(apart(item) for item in meta))
    pieces = fuser.wrap(made, SAME, tuple(apart(item) for item in meta))
    assert isinstance(pieces, tuple)
    return tuple(
        Value(fuser.flat(piece.node, 1, fuser.folded(item)), FOLD, item)
        for piece, item in zip(pieces, meta, strict=True)
    )


def _normal(dim: Any, rank: int) -> Any:
    return [_normal(each, rank) for each in dim] if isinstance(dim, (list, tuple)) else dim % rank


def _shift(dim: Any) -> Any:
    return [_shift(each) for each in dim] if isinstance(dim, (list, tuple)) else dim + 1


@rule("permute")
def permute(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """The models stay in front."""
    x = arguments["self"]
    if x.layout is JOIN and arguments["dims"][0] == 0:
        return fuser.call(aten.permute.default, (x.node, arguments["dims"]), JOIN, meta_of(node))
    order = [0, *(dim % x.meta.ndim + 1 for dim in arguments["dims"])]
    meta = meta_of(node)
    return Value(fuser.permuted(fuser.stack(x), order, fuser.stacked(meta)), STACK, meta)


@rule("t", "numpy_T", "mT")
def transposed(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """The last two dimensions."""
    (x,) = _values(arguments)
    if x.meta.ndim != 2:
        return None
    return fuser.call(aten.transpose.int, (fuser.stack(x), 1, 2), STACK, meta_of(node))


@rule("unsqueeze", "stack")
def new_dimension(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """One further on."""
    values = _values(arguments)
    dim = arguments["dim"] % (values[0].meta.ndim + 1)
    if dim >= 2 and all(value.layout is FOLD for value in values):
        nodes = _with(arguments, lambda value: value.node)
        return fuser.invoke(node, {**nodes, "dim": dim}, FOLD)
    batch = values[0].meta.dims[:1]
    if dim and all(value.layout is JOIN and value.meta.dims[:1] == batch for value in values):
        return fuser.invoke(node, {**_with(arguments, lambda value: value.node), "dim": dim}, JOIN)
    return fuser.invoke(node, {**_with(arguments, fuser.stack), "dim": dim + 1}, STACK)


@rule("view", "reshape", "_unsafe_view")
def reshape(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """The same sizes behind K; what becomes one row for each example stays folded."""
    x, meta = arguments["self"], meta_of(node)
    if "dtype" in arguments:
        return of_the_last(fuser, node, arguments)
    sizes = list(arguments["size"] if "size" in arguments else arguments["shape"])
    if x.layout is FOLD and meta.ndim == 2 and meta.dims[0] == x.meta.dims[0] and fuser.can_fold(meta):
        if _is_for_products(node):
            return _rows_of_models(fuser, x, meta)
        return fuser.call(aten.flatten.using_ints, (x.node, 1, -1), FOLD, meta)
    sizes = [size if dim.symbol is not None else dim.hint for size, dim in zip(sizes, meta.dims, strict=True)]
    given = x.node if x.layout in (JOIN, MATRIX) else fuser.stack(x)
    last = meta.dims[-1] if meta.ndim > 2 else None
    if last is not None and last.symbol is None and _is_for_products(node):
        args = (given, [fuser.k, -1, last.hint])
        return fuser.call(aten.reshape.default, args, MATRIX, meta, tuple(sizes[:-1]))
    keeps_batch = x.layout in (JOIN, MATRIX) and last is not None and meta.dims[0] == x.meta.dims[0]
    if meta.ndim and (keeps_batch or _is_for_attention(node)):
        first, *rest = sizes
        if isinstance(first, int) and first > 0:
            first *= fuser.k
        elif -1 not in rest:
            first = -1
        if isinstance(first, int):
            return fuser.call(aten.reshape.default, (given, [first, *rest]), JOIN, meta)
    return fuser.call(aten.reshape.default, (given, [fuser.k, *sizes]), STACK, meta)


def _is_for_attention(node: fx.Node) -> bool:
    """Does nothing but attention read the value?"""
    return {base_name(user) if user.op == "call_function" else "" for user in node.users} == {
        "scaled_dot_product_attention"
    }


def _is_for_products(node: fx.Node) -> bool:
    """Do products read the value, or what dropout leaves of it?"""
    names = {base_name(user) if user.op == "call_function" else "" for user in node.users}
    if names == {"dropout"}:
        return all(map(_is_for_products, node.users))
    return "linear" in names


def _rows_of_models(fuser: Fuser, x: Value, meta: TensorMeta) -> Value:
    """Folded images ``[N, K * C, H, W]`` as rows of each model, ``[K, N, C * H * W]``."""
    batch, width = meta.dims
    apart = TensorMeta((batch, Dim(fuser.k), width), meta.dtype, meta.device)
    rows = fuser.build.call(aten.reshape.default, (x.node, [-1, fuser.k, width.hint]), apart)
    return Value(fuser.exchange(rows, fuser.stacked(meta)), STACK, meta)


@rule("expand", "broadcast_to")
def expand(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """The same sizes behind K."""
    x, meta = arguments["self"], meta_of(node)
    sizes = arguments["size"]
    if x.layout is JOIN and x.meta.ndim == meta.ndim and x.meta.dims[0] == meta.dims[0]:
        return fuser.call(aten.expand.default, (x.node, [-1, *sizes[1:]]), JOIN, meta)
    return fuser.call(aten.expand.default, (fuser.aligned(x, meta.ndim), [fuser.k, *sizes]), STACK, meta)


@rule("expand_as", "view_as", "reshape_as")
def like_another(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """In the shape of another tensor, of which only the shape matters."""
    x, other = arguments["self"], arguments["other"]
    lifted = fuser.aligned(x, other.meta.ndim) if base_name(node) == "expand_as" else fuser.stack(x)
    return fuser.call(node.target, (lifted, fuser.stack(other)), STACK, meta_of(node))


@rule("repeat")
def repeat(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Once along the models."""
    meta = meta_of(node)
    times = [1, *arguments["repeats"]]
    return fuser.call(aten.repeat.default, (fuser.aligned(arguments["self"], meta.ndim), times), STACK, meta)


@rule("tril", "triu", "view_as_complex", "view_as_real")
def of_the_last(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Ops on the last dimensions, for which all others are a batch."""
    (x,) = _values(arguments)
    if x.layout is JOIN and x.meta.ndim > 2 and "dtype" not in arguments:
        return fuser.invoke(node, _with(arguments, fuser.join), JOIN)
    return fuser.invoke(node, _with(arguments, fuser.stack), STACK)


@rule("sym_size")
def size(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Of the dimension of one model."""
    x, dim = arguments["self"], arguments["dim"]
    dim %= x.meta.ndim
    if x.layout is FOLD and dim == 1:
        return None
    as_it_is = x.layout in (SAME, FOLD) or (x.layout is JOIN and dim > 0)
    args = (x.node, dim) if as_it_is else (fuser.stack(x), dim + 1)
    return fuser.build.call(aten.sym_size.int, args, node.meta["value"])


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def new(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """The same for all: only dtype and device come from the tensor."""
    return fuser.invoke(node, _with(arguments, lambda value: value.node), SAME)


@rule("index")
def index(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Indices that are the same for all, with the dimension of the models left as it is."""
    x, indices = arguments["self"], arguments["indices"]
    places = [place for place, item in enumerate(indices) if isinstance(item, Value)]
    if any(indices[place].layout is not SAME for place in places):
        return None
    if places != list(range(places[0], places[-1] + 1)):
        return None  # the indexed dimension would come first, before that of the models
    given = [None, *(item.node if isinstance(item, Value) else item for item in indices)]
    return fuser.call(aten.index.Tensor, (fuser.stack(x), given), STACK, meta_of(node))
