"""Building new graphs: nodes with values and provenance, slices by index sets, constants."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from graphsplit.errors import UnsupportedError
from graphsplit.program import Dim, Source, StateEntry, TensorMeta, meta_of

aten = torch.ops.aten


class GraphBuilder:
    """A graph under construction.

    Attributes:
        graph: The new graph.
        constants: Index tensors that the graph needs, to be added to the program's state.
        taken: Names in that state, which no constant gets.
        source: Provenance given to new nodes.
        for_one_part: The graph holds indices of one sub-model; another of the same sizes needs its own.
    """

    def __init__(self, constants: dict[str, StateEntry], taken: Collection[str] = ()) -> None:
        self.graph = fx.Graph()
        self.constants = constants
        self.taken = taken
        self.source: Source | None = None
        self.for_one_part = False
        self._state: dict[str, fx.Node] = {}
        self._taken: dict[tuple[Any, ...], fx.Node] = {}

    def placeholder(self, old: fx.Node) -> fx.Node:
        """An input like one of the original graph."""
        node = self.graph.placeholder(old.name)
        node.target = node.name
        node.meta.update(old.meta)
        return node

    def state(self, name: str, meta: TensorMeta | None) -> fx.Node:
        """A read of a state tensor (one node for each)."""
        if name not in self._state:
            node = self.graph.create_node("get_attr", name)
            node.meta["value"] = meta
            self._state[name] = node
        return self._state[name]

    def call(
        self,
        target: Any,
        args: tuple[Any, ...],
        value: Any,
        kwargs: dict[str, Any] | None = None,
        name: str | None = None,
    ) -> fx.Node:
        """A new op."""
        node = self.graph.create_node("call_function", target, args, kwargs or {}, name)
        node.meta["value"] = value
        if self.source is not None:
            node.meta["source"] = self.source
        return node

    def take(self, x: fx.Node, dim: int, index: NDArray[np.int64]) -> fx.Node:
        """Entries of one dimension: a slice if they are evenly spaced, a few slices joined, or a look-up."""
        key = (x, dim, index.tobytes())
        if key not in self._taken:
            self._taken[key] = self._take(x, dim, index)
        return self._taken[key]

    def _take(self, x: fx.Node, dim: int, index: NDArray[np.int64]) -> fx.Node:
        meta = meta_of(x)
        size = meta.shape[dim]
        value = meta.with_shape((*meta.shape[:dim], index.size, *meta.shape[dim + 1 :]))
        if meta.dims[dim].symbol is not None:
            return self._take_periodic(x, dim, index, size, value)
        runs = _runs(index)
        if len(runs) == 1:
            return self._slice(x, dim, *runs[0])
        if len(runs) <= 8:
            pieces = [self._slice(x, dim, *run) for run in runs]
            return self.call(aten.cat.default, (pieces, dim), value)
        return self.call(aten.index_select.default, (x, dim, self.index(index, meta.device)), value)

    def _take_periodic(
        self, x: fx.Node, dim: int, index: NDArray[np.int64], size: int, value: TensorMeta
    ) -> fx.Node:
        """Entries of a dimension that is batch times units: taken from the units."""
        period = period_of((index,), size)
        if period is None:
            raise UnsupportedError(
                "a dimension of units times batch, with the batch inside, is cut",
                where=str(self.source),
                hint="put the batch first where dimensions are joined",
            )
        taken = self.take(self.apart(x, dim, period), dim + 1, index[index < period])
        return self.call(aten.flatten.using_ints, (taken, dim, dim + 1), value)

    def apart(self, x: fx.Node, dim: int, period: int) -> fx.Node:
        """A dimension that is batch times units as two."""
        meta = meta_of(x)
        outer = Dim(meta.shape[dim] // period, f"({meta.dims[dim].symbol})//{period}")
        dims = (*meta.dims[:dim], outer, Dim(period), *meta.dims[dim + 1 :])
        value = TensorMeta(dims, meta.dtype, meta.device)
        return self.call(aten.unflatten.int, (x, dim, [-1, period]), value)

    def _slice(self, x: fx.Node, dim: int, start: int, count: int, step: int) -> fx.Node:
        meta = meta_of(x)
        if count == meta.shape[dim]:
            return x
        value = meta.with_shape((*meta.shape[:dim], count, *meta.shape[dim + 1 :]))
        stop = start + (count - 1) * step + 1 if count else start
        args: tuple[Any, ...] = (x, dim, start, stop) if step == 1 else (x, dim, start, stop, step)
        return self.call(aten.slice.Tensor, args, value)

    def index(self, index: NDArray[np.int64], device: str) -> fx.Node:
        """A constant tensor of indices, of any shape."""
        name = self._constant_name(index)
        return self.state(name, TensorMeta(tuple(map(Dim, index.shape)), torch.int64, device))

    def _constant_name(self, index: NDArray[np.int64]) -> str:
        """Name of the constant that holds these indices; added where there is none yet."""
        for known, entry in self.constants.items():
            if entry.tensor.shape == index.shape and np.array_equal(entry.tensor.numpy(), index):
                return known
        names = map("_indices_{}".format, itertools.count())
        name = next(name for name in names if name not in self.constants and name not in self.taken)
        tensor = torch.from_numpy(index.copy())
        self.constants[name] = StateEntry(name, "constant", tensor, persistent=False)
        return name

    def scaled_size(self, size: Any, part: int, full: int) -> Any:
        """``size * part / full`` for a size that is a node or a number."""
        if not isinstance(size, fx.Node):
            return size * part // full
        value = size.meta["value"]
        product = self.call(operator.mul, (size, part), Dim(value.hint * part, f"({value})*{part}"))
        return self.call(
            operator.floordiv, (product, full), Dim(value.hint * part // full, f"({value})*{part}//{full}")
        )

    def output(self, values: Sequence[Any]) -> None:
        """Return these values from the graph."""
        self.graph.output(tuple(values))


def period_of(indices: Sequence[NDArray[np.int64]], size: int) -> int | None:
    """The shortest period with which all of these indices of one dimension come again; None for none."""
    for period in range(1, size):
        if size % period == 0 and all(
            np.array_equal(index, _repeat(index[index < period], period, size // period)) for index in indices
        ):
            return period
    return None


def _repeat(index: NDArray[np.int64], period: int, times: int) -> NDArray[np.int64]:
    offsets: NDArray[np.int64] = (np.arange(times)[:, None] * period + index[None, :]).ravel()
    return offsets


def _runs(index: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Evenly spaced indices as (start, count, step): all of them as one run, else runs of neighbours."""
    if index.size == 0:
        return [(0, 0, 1)]
    if index.size == 1:
        return [(int(index[0]), 1, 1)]
    steps = np.diff(index)
    if (steps == steps[0]).all() and steps[0] > 0:
        return [(int(index[0]), int(index.size), int(steps[0]))]
    breaks = np.flatnonzero(steps != 1) + 1
    return [(int(run[0]), int(run.size), 1) for run in np.split(index, breaks)]
