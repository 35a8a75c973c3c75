"""An op of the full model as the op of one sub-model: sizes among its arguments become local ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from graphsplit.analysis.facts import argument, indexed, rolled, written_places
from graphsplit.analysis.kinds import Kinds, layouts_of
from graphsplit.analysis.layout import Cut, Indices, Layout
from graphsplit.builder import GraphBuilder
from graphsplit.errors import UnsupportedError
from graphsplit.graphs import int_arg, node_arg
from graphsplit.program import Dim, TensorMeta, meta_of, op_name, source_of

aten = torch.ops.aten


class Local:
    """What a localizer sees: one node, one sub-model, and the new graph.

    Attributes:
        node: The node of the full program.
        part: Number of the sub-model.
        args: Its arguments, already mapped to the new graph.
        constant: Values of a node of the full program that are known.
    """

    def __init__(
        self,
        node: fx.Node,
        kinds: Kinds,
        part: int,
        build: GraphBuilder,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        constant: Callable[[fx.Node], NDArray[Any] | None],
    ) -> None:
        self.node, self.kinds, self.part, self.build = node, kinds, part, build
        self.args, self.kwargs = args, kwargs
        self.constant = constant

    def layout(self, node: Any) -> Layout | None:
        """Layout of an operand of the full program."""
        found = self.kinds.layout.get(node)
        return found if isinstance(found, Layout) else None

    def shape(self, layout: Layout) -> tuple[int, ...]:
        """Sizes of a tensor in the sub-model."""
        return layout.local_shape(self.part)

    def indices(self, cut: Cut) -> Indices:
        """Indices of one dimension that the sub-model holds; the graph is then made for it alone."""
        self.build.for_one_part = True
        return cut[self.part]

    @property
    def output(self) -> Layout:
        """Layout of the node's one result."""
        found = self.kinds.layout[self.node]
        assert isinstance(found, Layout)
        return found

    @property
    def outputs(self) -> list[Layout]:
        """Layouts of the node's several results."""
        found = self.kinds.layout[self.node]
        assert isinstance(found, list)
        return found

    def sizes(self, given: Any, first: int = 0) -> list[Any]:
        """A list of sizes of the output, from dimension ``first`` on, made local."""
        layout = self.output
        local = self.shape(layout)
        result = []
        for place, size in enumerate(given):
            dim = first + place
            if layout.cuts[dim] is None or (isinstance(size, int) and size == -1):
                result.append(size)
            elif isinstance(size, int):
                result.append(local[dim])
            else:
                result.append(self.build.scaled_size(size, local[dim], layout.shape[dim]))
        return result

    def refuse(self, reason: str) -> UnsupportedError:
        """The error to raise where the op has no local form."""
        return UnsupportedError(
            f"{op_name(self.node)}: {reason}",
            where=str(source_of(self.node)),
            hint="write the op so that it keeps whole units together, or choose another K",
        )


Change = tuple[Any, tuple[Any, ...], dict[str, Any]]
Localizer = Callable[[Local], Change]
LOCALIZERS: dict[str, Localizer] = {}


def localizer(*names: str) -> Callable[[Localizer], Localizer]:
    """Register a localizer for ops by name."""

    def register(function: Localizer) -> Localizer:
        for name in names:
            LOCALIZERS[name] = function
        return function

    return register


def localize(local: Local) -> Change:
    """Target, arguments, keywords of the op in a sub-model; no target: the first argument is the result."""
    node = local.node
    found = LOCALIZERS.get(op_name(node))
    concerned = [layout for item in (node, *node.all_input_nodes) for layout in layouts_of(local.kinds, item)]
    if found is None or not any(layout.active for layout in concerned):
        return node.target, local.args, local.kwargs
    return found(local)


def local_value(kinds: Kinds, node: fx.Node, part: int) -> Any:
    """Metadata of a node in a sub-model."""
    value = node.meta.get("value")
    found = kinds.layout.get(node)
    if isinstance(value, TensorMeta) and isinstance(found, Layout):
        return value.with_shape(found.local_shape(part)) if found.active else value
    if isinstance(value, tuple) and isinstance(found, list):
        return tuple(
            item.with_shape(layout.local_shape(part))
            if isinstance(item, TensorMeta) and layout.active
            else item
            for item, layout in zip(value, found, strict=True)
        )
    return value


@localizer(
    "view.default", "reshape.default", "_unsafe_view.default", "expand.default", "broadcast_to.default"
)
def _sizes(local: Local) -> Change:
    x, sizes = local.args[:2]
    return local.node.target, (x, local.sizes(sizes), *local.args[2:]), local.kwargs


@localizer("unflatten.int")
def _unflatten(local: Local) -> Change:
    x, dim, sizes = local.args
    rank = meta_of(node_arg(local.node)).ndim
    return local.node.target, (x, dim, local.sizes(sizes, dim % rank)), local.kwargs


@localizer("view_as.default", "reshape_as.default")
def _reshape_as(local: Local) -> Change:
    other = local.args[1]
    layout = local.output
    sizes: list[Any] = []
    for dim, size in enumerate(meta_of(local.node).dims):
        if size.symbol is None:
            sizes.append(local.shape(layout)[dim])
        elif layout.cuts[dim] is not None:
            raise local.refuse("a dimension of batch times units is taken from another tensor")
        else:
            sizes.append(local.build.call(aten.sym_size.int, (other, dim), size))
    return aten.reshape.default, (local.args[0], sizes), {}


@localizer("layer_norm.default", "rms_norm.default")
def _layer_norm(local: Local) -> Change:
    count = len(local.args[1])
    shape = list(local.shape(local.output)[-count:])
    return local.node.target, (local.args[0], shape, *local.args[2:]), local.kwargs


@localizer("group_norm.default")
def _group_norm(local: Local) -> Change:
    groups = local.args[1]
    cut = local.output.cuts[1]
    if cut is not None:
        per_group = local.output.shape[1] // groups
        # A group that stands several times begins anew where indices fall.
        here = local.indices(cut)
        begins = (np.diff(here // per_group) != 0) | (np.diff(here) <= 0)
        groups = 1 + int(begins.sum())
    return local.node.target, (local.args[0], groups, *local.args[2:]), local.kwargs


_GROUPS_AT = 6


@localizer(
    "conv1d.default", "conv2d.default", "conv3d.default", "conv1d.padding", "conv2d.padding",
    "conv3d.padding", "conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input",
)  # fmt: skip
def _convolution(local: Local) -> Change:
    groups = argument(local.node, _GROUPS_AT, "groups", 1)
    if groups == 1:
        return local.node.target, local.args, local.kwargs
    weight = local.layout(local.node.args[1])
    x = local.layout(local.node.args[0])
    assert weight is not None and x is not None
    spatial = len(weight.shape) - 2
    transposed = "transpose" in op_name(local.node)
    channels = local.output if transposed else x
    here = local.shape(channels)[len(channels.shape) - spatial - 1]
    groups = here // local.shape(weight)[1]
    if len(local.args) > _GROUPS_AT:
        args = (*local.args[:_GROUPS_AT], groups, *local.args[_GROUPS_AT + 1 :])
        return local.node.target, args, local.kwargs
    return local.node.target, local.args, {**local.kwargs, "groups": groups}


@localizer(
    "split.Tensor",
    "split_with_sizes.default",
    "chunk.default",
    "tensor_split.sections",
    "tensor_split.indices",
)
def _split(local: Local) -> Change:
    x = meta_of(node_arg(local.node))
    dim = int(argument(local.node, 2, "dim", 0)) % x.ndim
    if all(layout.cuts[dim] is None for layout in local.outputs):
        return local.node.target, local.args, local.kwargs
    sizes = [local.shape(layout)[dim] for layout in local.outputs]
    return aten.split_with_sizes.default, (local.args[0], sizes, dim), {}


@localizer("slice.Tensor", "narrow.default")
def _slice(local: Local) -> Change:
    given, layout = local.layout(local.node.args[0]), local.output
    assert given is not None
    dim = int(argument(local.node, 1, "dim", 0)) % len(given.shape)
    cut = given.cuts[dim]
    if cut is None:
        return local.node.target, local.args, local.kwargs
    start, step = _start(local, given.shape[dim])
    out = layout.cuts[dim]
    kept = local.indices(out) if out is not None else np.arange(layout.shape[dim])
    return _positions(local, dim, cut, start + step * kept)


def _start(local: Local, size: int) -> tuple[int, int]:
    start = argument(local.node, 2, "start")
    start = 0 if start is None else int(start)
    step = 1 if "narrow" in op_name(local.node) else int(argument(local.node, 4, "step", 1))
    return (start + size if start < 0 else min(start, size)), step


def _positions(local: Local, dim: int, cut: Cut, wanted: Indices) -> Change:
    """Entries of the full model, taken from the slice of a sub-model."""
    taken = local.build.take(local.args[0], dim, _places(local, cut, wanted))
    return None, (taken,), {}


def _places(local: Local, cut: Cut | None, wanted: Indices) -> Indices:
    """Entries of the full model, looked up in the slice of a sub-model."""
    if cut is None or not wanted.size:
        return wanted
    places = _stands_at(local.indices(cut), wanted)
    if places is None:
        raise local.refuse("takes units of another sub-model")
    return places


def _stands_at(here: Indices, wanted: Indices) -> Indices | None:
    """Where each wanted index stands in a slice; if it stands several times, in turn."""
    if not here.size:
        return None
    if bool((np.diff(here) > 0).all()):
        at = np.minimum(np.searchsorted(here, wanted), here.size - 1)
        return at if np.array_equal(here[at], wanted) else None
    places = {key: place for place, key in enumerate(_occurrences(here))}
    found = [places.get(key) for key in _occurrences(wanted)]
    return None if None in found else np.array(found, np.int64)


def _occurrences(indices: Indices) -> list[tuple[int, int]]:
    """Each index, with how often it stood before."""
    seen: dict[int, int] = {}
    result = []
    for index in indices.tolist():
        result.append((index, seen.get(index, 0)))
        seen[index] = seen.get(index, 0) + 1
    return result


@localizer("select.int")
def _select(local: Local) -> Change:
    given = local.layout(local.node.args[0])
    assert given is not None
    dim = int_arg(local.node, 1) % len(given.shape)
    cut = given.cuts[dim]
    if cut is None:
        return local.node.target, local.args, local.kwargs
    index = int_arg(local.node, 2)
    if index < 0:
        index += given.shape[dim]
    places = _stands_at(local.indices(cut), np.array([index]))
    if places is None:
        raise local.refuse("takes a unit of another sub-model")
    return local.node.target, (local.args[0], dim, int(places[0])), local.kwargs


@localizer("unbind.int")
def _unbind(local: Local) -> Change:
    given = local.layout(local.node.args[0])
    assert given is not None
    dim = int(argument(local.node, 1, "dim", 0)) % len(given.shape)
    if given.cuts[dim] is not None:
        raise local.refuse("takes units apart one by one")
    return local.node.target, local.args, local.kwargs


@localizer("unfold.default")
def _unfold(local: Local) -> Change:
    """Windows that hold a part of their entries are as much smaller."""
    x, dim, size, step = local.args
    if local.output.cuts[-1] is not None:
        size = step = local.shape(local.output)[-1]
    return local.node.target, (x, dim, size, step), local.kwargs


@localizer("channel_shuffle.default", "native_channel_shuffle.default")
def _channel_shuffle(local: Local) -> Change:
    x, groups = local.args
    given = local.layout(local.node.args[0])
    assert given is not None
    if given.cuts[1] is not None:
        groups = int(np.unique(local.indices(given.cuts[1]) // (given.shape[1] // groups)).size)
    return local.node.target, (x, groups), local.kwargs


@localizer("roll.default")
def _roll(local: Local) -> Change:
    """A shift along units takes the entries of the sub-model from their places."""
    x = local.args[0]
    given = local.layout(local.node.args[0])
    assert given is not None
    rank = len(given.shape)
    shifts, dims = rolled(local.node, rank)
    plain = [(shift, dim) for shift, dim in zip(shifts, dims, strict=True) if given.cuts[dim] is None]
    if len(plain) == len(dims):
        return local.node.target, local.args, local.kwargs
    for shift, dim in zip(shifts, dims, strict=True):
        cut, out = given.cuts[dim], local.output.cuts[dim]
        if cut is not None and out is not None:
            wanted = (local.indices(out) - shift) % given.shape[dim]
            x = local.build.take(x, dim, _places(local, cut, wanted))
    if plain:
        value = local_value(local.kinds, local.node, local.part)
        shifts, dims = map(list, zip(*plain, strict=True))
        x = local.build.call(aten.roll.default, (x, shifts, dims), value)
    return None, (x,), {}


@localizer("index.Tensor", "index_select.default")
def _index(local: Local) -> Change:
    """Units that are taken by constant indices."""
    given = local.layout(local.node.args[0])
    assert given is not None
    dim, index = indexed(local.node, len(given.shape))
    cut = given.cuts[dim]
    if cut is None:
        return local.node.target, local.args, local.kwargs
    values = local.constant(index)
    if values is None:
        raise local.refuse("takes units by indices that are not known")
    out = local.output.cuts[dim]
    wanted = values % given.shape[dim]
    return _positions(local, dim, cut, wanted if out is None else wanted[local.indices(out)])


@localizer("slice_scatter.default", "select_scatter.default")
def _scatter(local: Local) -> Change:
    """A write into a slice of units: the sub-model's entries of both tensors, joined and put in order."""
    base, piece = local.layout(local.node.args[0]), local.layout(local.node.args[1])
    assert base is not None and piece is not None
    dim = int(argument(local.node, 2, "dim", 0)) % len(base.shape)
    out = local.output.cuts[dim]
    if out is None:
        return local.node.target, local.args, local.kwargs
    x, y = local.args[:2]
    written = written_places(local.node, base.shape[dim])
    if op_name(local.node) == "select_scatter.default":
        meta = meta_of(y)
        grown = TensorMeta((*meta.dims[:dim], Dim(1), *meta.dims[dim:]), meta.dtype, meta.device)
        y = local.build.call(aten.unsqueeze.default, (y, dim), grown)
    here = local.indices(out)
    inside = np.isin(here, written)
    source = np.full(base.shape[dim], -1)
    source[written] = np.arange(written.size)
    meta, count = meta_of(x), meta_of(y).shape[dim]
    kept = meta.shape[dim]
    places = np.empty(here.size, np.int64)
    # A tensor without units of its own is whole here, or was cut to the entries that are asked for.
    cut = base.cuts[dim] or (None if kept == base.shape[dim] else out)
    places[~inside] = _places(local, cut, here[~inside])
    wanted = source[here[inside]]
    cut = piece.cuts[dim] if len(piece.cuts) == len(base.cuts) else None
    if cut is None and count != written.size:
        wanted = np.arange(count)
    places[inside] = _places(local, cut, wanted) + kept
    both = meta.with_shape((*meta.shape[:dim], kept + count, *meta.shape[dim + 1 :]))
    joined = local.build.call(aten.cat.default, ([x, y], dim), both)
    return None, (local.build.take(joined, dim, places),), {}


@localizer("repeat_interleave.self_int")
def _repeat_interleave(local: Local) -> Change:
    """Without ``output_size``, which only spares a look at the sizes."""
    kwargs = {name: value for name, value in local.kwargs.items() if name != "output_size"}
    return local.node.target, local.args, kwargs
