"""Ops that move data without changing it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from graphsplit.analysis.facts import Facts, argument, rule
from graphsplit.analysis.inference import Inference, whole
from graphsplit.analysis.units import Factors, Ids, reshape_ids, varying
from graphsplit.graphs import int_arg, node_arg
from graphsplit.program import TensorMeta


def _moved(node: fx.Node, factors: Factors) -> Facts:
    """A result that is linear in the first operand."""
    x = node_arg(node)
    return Facts(factors, linear=(x,), keeps_zero=True)


@rule(
    "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int",
    "squeeze.dim", "squeeze.default", "squeeze.dims", "unsqueeze.default", "view_as.default",
    "reshape_as.default",
)  # fmt: skip
def reshape(inference: Inference, node: fx.Node) -> Facts:
    """Elements keep their order; sizes are those of the traced example, so every reshape is this one."""
    x = node_arg(node)
    before, after = inference.shape(x), node.meta["value"].shape
    if 0 in before:
        return _moved(node, ())  # an empty tensor belongs to nobody
    return _moved(node, tuple(reshape_ids(ids, before, after) for ids in inference.factors(x)))


@rule("permute.default")
def permute(inference: Inference, node: fx.Node) -> Facts:
    """Dimensions in another order."""
    given: Any = node.args[1]
    x = node_arg(node)
    rank = len(inference.shape(x))
    order = [dim % rank for dim in given]
    return _moved(node, tuple(np.transpose(ids, order) for ids in inference.factors(x)))


@rule("transpose.int", "swapaxes.default", "swapdims.default")
def transpose(inference: Inference, node: fx.Node) -> Facts:
    """Two dimensions exchanged."""
    x, first, second = node.args
    assert isinstance(first, int) and isinstance(second, int)
    return _moved(node, tuple(np.swapaxes(ids, first, second) for ids in inference.factors(x)))


@rule("t.default", "numpy_T.default", "mT.default", "matrix_H.default", "mH.default", "adjoint.default")
def transpose_last(inference: Inference, node: fx.Node) -> Facts:
    """The last two dimensions exchanged."""
    x = node_arg(node)
    factors = inference.factors(x)
    if len(inference.shape(x)) < 2:
        return _moved(node, factors)
    return _moved(node, tuple(np.swapaxes(ids, -1, -2) for ids in factors))


@rule("movedim.int", "movedim.intlist", "moveaxis.int")
def movedim(inference: Inference, node: fx.Node) -> Facts:
    """Dimensions moved to other places."""
    source: Any
    destination: Any
    x, source, destination = node.args
    return _moved(node, tuple(np.moveaxis(ids, source, destination) for ids in inference.factors(x)))


@rule("expand.default", "broadcast_to.default")
def expand(inference: Inference, node: fx.Node) -> Facts:
    """Broadcast to a shape; new and repeated dimensions have no units."""
    x = node_arg(node)
    rank = node.meta["value"].ndim
    factors = inference.factors(x)
    return _moved(node, tuple(ids.reshape((1,) * (rank - ids.ndim) + ids.shape) for ids in factors))


@rule("repeat.default", "tile.default")
def repeat(inference: Inference, node: fx.Node) -> Facts:
    """The whole tensor several times along each dimension."""
    x = node_arg(node)
    shape, out = inference.shape(x), node.meta["value"].shape
    rank = len(out)
    outputs = []
    for ids in inference.factors(x):
        lifted = ids.reshape((1,) * (rank - ids.ndim) + ids.shape)
        before = (1,) * (rank - len(shape)) + shape
        times = [out[d] // before[d] if lifted.shape[d] > 1 else 1 for d in range(rank)]
        outputs.append(np.tile(lifted, times))
    return _moved(node, tuple(outputs))


@rule("repeat_interleave.self_int")
def repeat_interleave(inference: Inference, node: fx.Node) -> Facts:
    """Each entry of a dimension several times."""
    x = node_arg(node)
    times = int_arg(node, 1)
    dim = argument(node, 2, "dim")
    shape = inference.shape(x)
    outputs: list[Ids] = []
    for ids in inference.factors(x):
        if dim is None:
            full = np.broadcast_to(ids, shape)
            outputs.append(np.repeat(full.ravel(), times))
        else:
            outputs.append(np.repeat(ids, times, axis=dim) if ids.shape[dim] > 1 else ids)
    return _moved(node, tuple(outputs))


@rule("unfold.default")
def unfold(inference: Inference, node: fx.Node) -> Facts:
    """Windows along one dimension, their entries on a new last one; windows over units must not overlap."""
    x = node_arg(node)
    shape = inference.shape(x)
    dim, size, step = (int_arg(node, place) for place in (1, 2, 3))
    dim %= max(len(shape), 1)
    outputs, reason = [], None
    for ids in inference.factors(x):
        if ids.shape[dim] == 1:
            outputs.append(ids[..., None])
        elif step == size and shape[dim] % size == 0:
            windows = np.lib.stride_tricks.sliding_window_view(ids, size, axis=dim)
            outputs.append(windows[(slice(None),) * dim + (slice(None, None, step),)])
        else:
            inference.units.share(ids)
            reason = "overlapping windows along units"
    facts = _moved(node, tuple(outputs))
    facts.whole = reason
    return facts


@rule("diff.default")
def diff(inference: Inference, node: fx.Node) -> Facts:
    """``x[1:] - x[:-1]`` along a dimension that holds no units."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    if any(argument(node, place, name) is not None for place, name in ((3, "prepend"), (4, "append"))):
        return whole(inference, node, "diff with values before or after")
    factors, lost = inference.hold(x, [int(argument(node, 2, "dim", -1)) % rank])
    return Facts(factors, linear=(x,), keeps_zero=True, whole="diff along units" if lost else None)


@rule("one_hot.default")
def one_hot(inference: Inference, node: fx.Node) -> Facts:
    """A class number as a line of zeros and a one, on a new last dimension."""
    return Facts(tuple(ids[..., None] for ids in inference.factors(node_arg(node))))


@rule("view_as_complex.default")
def view_as_complex(inference: Inference, node: fx.Node) -> Facts:
    """``x[..., 0] + i x[..., 1]``."""
    x = node_arg(node)
    factors, lost = inference.hold(x, [len(inference.shape(x)) - 1])
    facts = _moved(node, tuple(ids[..., 0] for ids in factors))
    facts.whole = "real and imaginary parts are units" if lost else None
    return facts


@rule("view_as_real.default")
def view_as_real(inference: Inference, node: fx.Node) -> Facts:
    """Real and imaginary part on a new last dimension."""
    return _moved(node, tuple(ids[..., None] for ids in inference.factors(node_arg(node))))


@rule("channel_shuffle.default", "native_channel_shuffle.default")
def channel_shuffle(inference: Inference, node: fx.Node) -> Facts:
    """``[N, g c, ...]`` to ``[N, c g, ...]``: one place of all groups stays together, or a whole group."""
    x = node_arg(node)
    groups = int_arg(node, 1)
    shape = inference.shape(x)
    apart = (shape[0], groups, shape[1] // groups, *shape[2:])
    outputs = []
    for ids in inference.factors(x):
        taken = np.swapaxes(inference.units.settle(reshape_ids(ids, shape, apart), [1]), 1, 2)
        outputs.append(reshape_ids(taken, (shape[0], apart[2], groups, *shape[2:]), shape))
    return _moved(node, tuple(outputs))


@rule("diagonal.default")
def diagonal(inference: Inference, node: fx.Node) -> Facts:
    """The diagonal of two dimensions that hold no units, as a new last dimension."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    dims = [int(argument(node, place, f"dim{place - 1}", place - 2)) % rank for place in (2, 3)]
    factors, lost = inference.hold(x, dims)
    outputs = []
    for ids in factors:
        outputs.append(ids.reshape([size for dim, size in enumerate(ids.shape) if dim not in dims] + [1]))
    facts = _moved(node, tuple(outputs))
    facts.whole = "a diagonal over units" if lost else None
    return facts


@rule(
    "matrix_exp.default", "linalg_matrix_exp.default", "inverse.default", "linalg_inv.default",
    "det.default", "linalg_det.default", "logdet.default", "matrix_power.default",
    "linalg_matrix_power.default", "cholesky.default", "linalg_cholesky.default", "trace.default",
    "linalg_slogdet.default", "linalg_qr.default", "linalg_svd.default", "linalg_svdvals.default",
    "linalg_eigh.default", "linalg_eigvalsh.default", "linalg_pinv.default", "svd.default", "qr.default",
    "pinverse.default", "linalg_lu.default", "linalg_cond.default", "linalg_inv_ex.default",
    "linalg_cholesky_ex.default", "linalg_pinv.atol_rtol_tensor", "linalg_matrix_rank.atol_rtol_tensor",
)  # fmt: skip
def of_matrices(inference: Inference, node: fx.Node) -> Facts:
    """A function of the matrices on the last two dimensions: a matrix belongs to one unit."""
    x = node_arg(node)
    rank = len(inference.shape(x))
    factors, lost = inference.hold(x, [rank - 2, rank - 1])

    def lead(value: TensorMeta) -> Factors:
        sizes = (1,) * (value.ndim - rank + 2)
        return tuple(ids.reshape(ids.shape[: rank - 2] + sizes) for ids in factors)

    value: Any = node.meta["value"]
    outputs = [lead(item) for item in value] if isinstance(value, tuple) else lead(value)
    return Facts(outputs, whole="a matrix of units" if lost else None)


@rule("pixel_shuffle.default")
def pixel_shuffle(inference: Inference, node: fx.Node) -> Facts:
    """``[N, C r², H, W]`` to ``[N, C, H r, W r]``."""
    factor = int_arg(node, 1)
    x = node_arg(node)
    *lead, channels, height, width = inference.shape(x)
    apart = (*lead, channels // factor**2, factor, factor, height, width)
    n = len(lead)
    order = (*range(n), n, n + 3, n + 1, n + 4, n + 2)
    moved_shape = tuple(apart[dim] for dim in order)
    outputs = []
    for ids in inference.factors(x):
        taken = reshape_ids(ids, inference.shape(x), apart)
        # A sub-model shuffles its own channels: the pieces of one output channel stay together.
        taken = inference.units.settle(taken, [n + 1, n + 2])
        if taken.shape[n + 1] > 1 or taken.shape[n + 2] > 1:
            inference.units.share(taken)
            continue
        outputs.append(reshape_ids(np.transpose(taken, order), moved_shape, node.meta["value"].shape))
    return _moved(node, tuple(ids for ids in outputs if varying(ids)))


@rule("pixel_unshuffle.default")
def pixel_unshuffle(inference: Inference, node: fx.Node) -> Facts:
    """``[N, C, H r, W r]`` to ``[N, C r², H, W]``."""
    factor = int_arg(node, 1)
    x = node_arg(node)
    dim = len(inference.shape(x)) - 3
    return _moved(node, tuple(np.repeat(ids, factor**2, axis=dim) for ids in inference.factors(x)))


@rule("im2col.default")
def im2col(inference: Inference, node: fx.Node) -> Facts:
    """``[N, C, H, W]`` to ``[N, C k, L]``: each channel as the k entries of its windows."""
    x = node_arg(node)
    kernel: Any = node.args[1]
    times = kernel[0] * kernel[1]
    rank = len(inference.shape(x))
    factors, lost = inference.hold(x, [rank - 2, rank - 1])
    outputs = (ids[..., 0] for ids in factors)
    repeated = (np.repeat(ids, times, axis=-2) if ids.shape[-2] > 1 else ids for ids in outputs)
    facts = _moved(node, tuple(repeated))
    facts.whole = "windows over units" if lost else None
    return facts


@rule("col2im.default")
def col2im(inference: Inference, node: fx.Node) -> Facts:
    """``[N, C k, L]`` to ``[N, C, H, W]``."""
    x = node_arg(node)
    shape = inference.shape(x)
    kernel: Any = node.args[2]
    times = kernel[0] * kernel[1]
    apart = (*shape[:-2], shape[-2] // times, times, shape[-1])
    outputs = []
    for ids in inference.factors(x):
        taken = reshape_ids(ids, shape, apart)
        tied = inference.units.tie(taken, [len(apart) - 2])
        outputs.append(tied)
    return _moved(node, tuple(ids for ids in outputs if varying(ids)))


@rule(
    "new_zeros.default", "new_ones.default", "new_full.default", "new_empty.default", "new_tensor.default",
)  # fmt: skip
def new(inference: Inference, node: fx.Node) -> Facts:
    """A constant that takes only dtype and device from its operand."""
    return Facts(())


@rule("sym_size.int")
def size(inference: Inference, node: fx.Node) -> Facts:
    """The size of a dimension that changes with the batch."""
    x = node_arg(node)
    dim = int_arg(node, 1)
    for ids in inference.factors(x):
        if ids.shape[dim] > 1:
            inference.units.share(ids)
    return Facts(())
