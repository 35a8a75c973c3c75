"""Rules of fusion for ops that change shapes, and that read them."""

from __future__ import annotations

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
    is_for_products,
    one_batch,
    rows_of_models,
    values_of,
    with_nodes,
)
from graphsplit.graphs import base_name
from graphsplit.program import meta_of


@rule("permute")
def permute(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """The models stay in front."""
    x = arguments["self"]
    if x.layout in (JOIN, WEAVE) and arguments["dims"][0] == 0:
        return fuser.call(aten.permute.default, (x.node, arguments["dims"]), x.layout, meta_of(node))
    order = [0, *(dim % x.meta.ndim + 1 for dim in arguments["dims"])]
    meta = meta_of(node)
    return Value(fuser.permuted(fuser.stack(x), order, fuser.stacked(meta)), STACK, meta)


@rule("t", "numpy_T", "mT")
def transposed(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """The last two dimensions."""
    (x,) = values_of(arguments)
    if x.meta.ndim != 2:
        return None
    return fuser.call(aten.transpose.int, (fuser.stack(x), 1, 2), STACK, meta_of(node))


@rule("unsqueeze", "stack")
def new_dimension(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """One further on."""
    values = values_of(arguments)
    dim = arguments["dim"] % (values[0].meta.ndim + 1)
    if dim >= 2 and all(value.layout is FOLD for value in values):
        nodes = with_nodes(arguments, lambda value: value.node)
        return fuser.invoke(node, {**nodes, "dim": dim}, FOLD)
    batch = values[0].meta.dims[:1]
    layout = one_batch(values)
    fitting = (JOIN,) if layout is JOIN else (WEAVE, FOLD)
    if dim and all(value.layout in fitting and value.meta.dims[:1] == batch for value in values):
        nodes = with_nodes(arguments, lambda value: fuser.join(value, layout))
        return fuser.invoke(node, {**nodes, "dim": dim}, layout)
    return fuser.invoke(node, {**with_nodes(arguments, fuser.stack), "dim": dim + 1}, STACK)


@rule("view", "reshape", "_unsafe_view")
def reshape(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """The same sizes behind K; what becomes one row for each example stays folded."""
    x, meta = arguments["self"], meta_of(node)
    if "dtype" in arguments:
        return of_the_last(fuser, node, arguments)
    sizes = list(arguments["size"] if "size" in arguments else arguments["shape"])
    if x.layout is FOLD and meta.ndim == 2 and meta.dims[0] == x.meta.dims[0] and fuser.can_fold(meta):
        if is_for_products(node):
            return rows_of_models(fuser, x, meta)
        return fuser.call(aten.flatten.using_ints, (x.node, 1, -1), FOLD, meta)
    sizes = [size if dim.symbol is not None else dim.hint for size, dim in zip(sizes, meta.dims, strict=True)]
    given = x.node if x.layout in (JOIN, MATRIX) else fuser.stack(x)
    last = meta.dims[-1] if meta.ndim > 2 else None
    if last is not None and last.symbol is None and is_for_products(node):
        args = (given, [fuser.k, -1, last.hint])
        return fuser.call(aten.reshape.default, args, MATRIX, meta, tuple(sizes[:-1]))
    keeps_batch = x.layout is not STACK and last is not None and meta.dims[0] == x.meta.dims[0]
    if meta.ndim and (keeps_batch or _is_for_attention(node)):
        first, *rest = sizes
        if isinstance(first, int) and first > 0:
            first *= fuser.k
        elif -1 not in rest:
            first = -1
        if isinstance(first, int):
            layout = one_batch([x]) if keeps_batch else JOIN
            source = given if layout is JOIN else x.node  # a fold is the same in memory
            return fuser.call(aten.reshape.default, (source, [first, *rest]), layout, meta)
    return fuser.call(aten.reshape.default, (given, [fuser.k, *sizes]), STACK, meta)


def _is_for_attention(node: fx.Node) -> bool:
    """Does nothing but attention read the value?"""
    return {base_name(user) if user.op == "call_function" else "" for user in node.users} == {
        "scaled_dot_product_attention"
    }


@rule("expand", "broadcast_to")
def expand(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """The same sizes behind K."""
    x, meta = arguments["self"], meta_of(node)
    sizes = arguments["size"]
    if x.layout in (JOIN, WEAVE) and x.meta.ndim == meta.ndim and x.meta.dims[0] == meta.dims[0]:
        return fuser.call(aten.expand.default, (x.node, [-1, *sizes[1:]]), x.layout, meta)
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
    (x,) = values_of(arguments)
    if x.layout in (JOIN, WEAVE) and x.meta.ndim > 2 and "dtype" not in arguments:
        return fuser.invoke(node, with_nodes(arguments, lambda value: value.node), x.layout)
    return fuser.invoke(node, with_nodes(arguments, fuser.stack), STACK)


@rule("sym_size")
def size(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Of the dimension of one model."""
    x, dim = arguments["self"], arguments["dim"]
    dim %= x.meta.ndim
    if x.layout is FOLD and dim == 1:
        return None
    as_it_is = x.layout in (SAME, FOLD) or (x.layout in (JOIN, WEAVE) and dim > 0)
    args = (x.node, dim) if as_it_is else (fuser.stack(x), dim + 1)
    return fuser.build.call(aten.sym_size.int, args, node.meta["value"])


@rule("index")
def index(fuser: Fuser, node: fx.Node, arguments: Arguments) -> Result | None:
    """Indices that are the same for all, behind the dimension of the models, or each model's own."""
    x, indices = arguments["self"], arguments["indices"]
    places = [place for place, item in enumerate(indices) if isinstance(item, Value)]
    if places != list(range(places[0], places[-1] + 1)):
        return None  # the indexed dimension would come first, before that of the models
    if all(indices[place].layout is SAME for place in places):
        given = [None, *(item.node if isinstance(item, Value) else item for item in indices)]
        return fuser.call(aten.index.Tensor, (fuser.stack(x), given), STACK, meta_of(node))
    chosen = [indices[place] for place in places]
    if places[0] or any(item.meta.dtype == torch.bool for item in chosen):
        return None
    rank = max(item.meta.ndim for item in chosen)
    nodes = [item.node if item.layout is SAME else fuser.aligned(item, rank) for item in chosen]
    if x.layout is SAME:
        return fuser.call(aten.index.Tensor, (x.node, nodes), STACK, meta_of(node))
    numbers = fuser.build.index(np.arange(fuser.k).reshape(-1, *[1] * rank), x.meta.device)
    return fuser.call(aten.index.Tensor, (fuser.stack(x), [numbers, *nodes]), STACK, meta_of(node))
