"""Rules of fusion for products, attention, look-ups, and norms of rows."""

from __future__ import annotations

import string

import numpy as np
import torch
from torch import fx

from graphsplit.builder import aten
from graphsplit.fusion.fuser import Fuser, Result, Value, rule
from graphsplit.fusion.rules.operands import (
    FOLD,
    JOIN,
    MATRIX,
    SAME,
    STACK,
    WEAVE,
    Arguments,
    joinable,
    one_batch,
    values_of,
    with_nodes,
)
from graphsplit.graphs import node_arg
from graphsplit.program import Dim, TensorMeta, meta_of


@rule("linear")
def linear(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """One product of K matrices; of an input that is the same for all, one of a K times larger matrix."""
    x, weight, bias = arguments["input"], arguments["weight"], arguments["bias"]
    meta = meta_of(node)
    if weight.layout is SAME or weight.meta.ndim != 2 or x.meta.ndim < 2:
        return None
    if isinstance(bias, Value) and bias.layout is SAME:
        return None
    if x.layout is SAME and len(node_arg(node, 1).users) == 1:  # read once: elsewhere it stands transposed
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
    (x, y), meta = values_of(arguments), meta_of(node)
    if min(x.meta.ndim, y.meta.ndim) < 2:
        return None
    rank = max(x.meta.ndim, y.meta.ndim)
    if y.meta.ndim == 2 and rank > 2 and SAME not in (x.layout, y.layout):
        nodes = [fuser.matrix(x), fuser.stack(y)]
        return fuser.call(aten.bmm.default, tuple(nodes), MATRIX, meta, fuser.sizes(x))
    for layout in (JOIN, WEAVE):
        if rank > 2 and layout in (x.layout, y.layout):
            joined = [joinable(fuser, value, meta, layout) for value in (x, y)]
            if None not in joined:
                return fuser.call(aten.matmul.default, tuple(joined), layout, meta)
    nodes = [
        value.node if value.layout is SAME and rank > 2 else fuser.aligned(value, rank) for value in (x, y)
    ]
    return fuser.call(aten.matmul.default, tuple(nodes), STACK, meta)


@rule("baddbmm")
def baddbmm(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """As one batch of K times as many products."""
    values = values_of(arguments)
    if any(value.meta.ndim != 3 or value.meta.dims[0] != values[0].meta.dims[0] for value in values):
        return None
    return fuser.invoke(node, with_nodes(arguments, fuser.join), JOIN)


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
    layout = one_batch(operands)
    rank, batch = operands[0].meta.ndim, operands[0].meta.dims[0]
    if rank < 3 or any(value.meta.ndim != rank or value.meta.dims[0] != batch for value in operands):
        return None
    if isinstance(mask, Value):
        alike = mask.layout is SAME and (mask.meta.ndim < rank or mask.meta.dims[0] == Dim(1))
        if not alike and (mask.meta.ndim != rank or mask.meta.dims[0] != batch):
            return None
        mask = mask.node if alike else fuser.join(mask, layout)
    nodes = {name: fuser.join(arguments[name], layout) for name in ("query", "key", "value")}
    return fuser.invoke(node, {**arguments, **nodes, "attn_mask": mask}, layout)


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
