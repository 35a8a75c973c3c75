"""Who goes where in a trained model: keep what belongs together inside the parts.

A weight between units of two sub-models is lost. The dealer of this file looks for the division that loses
least: it maximises the affinity inside of the parts, summed over all pairs of axes that a weight joins, with
the shares of every axis as given. Affinity is the magnitude of the weights, or how strongly two units are
active together on given data. The search is coordinate ascent: one axis at a time is dealt out anew with all
others fixed, which for two parts is solved exactly by sorting, and for more by doing so for every pair of
parts; it starts from the contiguous division and from random ones, and keeps the best end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor, fx

from graphsplit.analysis.dealing import Dealer, Deck, Parts, contiguous, random
from graphsplit.errors import PartitionError
from graphsplit.program import TRAINING, Program, TensorMeta

Matrix = NDArray[np.float64]
STARTS = 4
SWEEPS = 50


def cluster(seed: int, data: Sequence[Tensor] | None = None) -> Dealer:
    """Deal out units so that affinity stays inside the parts.

    Args:
        seed: Of the random starts.
        data: A batch of the program's flat inputs, for co-activation in place of weight magnitude.
    """

    def deal(deck: Deck) -> list[Parts]:
        affinity = _magnitudes(deck) if data is None else _coactivations(deck, data)
        starts = [contiguous(deck), *(random(seed + number)(deck) for number in range(STARTS))]
        ends = [_ascend(affinity, start, deck.k) for start in starts]
        return max(ends, key=affinity.inside)

    return deal


@dataclass(frozen=True)
class _Affinity:
    """Matrices ``[units of axis a, units of axis b]`` for pairs of axes, ``a <= b``."""

    pairs: Mapping[tuple[int, int], Matrix]

    def inside(self, parts: Sequence[Parts]) -> float:
        """Affinity of all pairs of units in the same part."""
        return sum(
            float(matrix[parts[a][:, None] == parts[b][None, :]].sum())
            for (a, b), matrix in self.pairs.items()
        )

    def to_parts(self, axis: int, parts: Sequence[Parts], k: int) -> Matrix:
        """What each unit of an axis gains in each part, the others being where they are; ``[units, K]``."""
        gain = np.zeros((parts[axis].size, k))
        for (a, b), matrix in self.pairs.items():
            if a == axis:
                gain += matrix @ np.eye(k)[parts[b]]
            if b == axis:
                gain += matrix.T @ np.eye(k)[parts[a]]
        return gain


def _ascend(affinity: _Affinity, start: Sequence[Parts], k: int) -> list[Parts]:
    parts = list(start)
    best = affinity.inside(parts)
    for _ in range(SWEEPS):
        before = best
        for axis in range(len(parts)):
            gain = affinity.to_parts(axis, parts, k)
            proposed = parts[axis].copy()
            for p, q in combinations(range(k), 2):
                _exchange(proposed, gain, p, q)
            trial = [*parts[:axis], proposed, *parts[axis + 1 :]]
            value = affinity.inside(trial)
            if value > best:  # an axis that meets itself may lose by it
                parts, best = trial, value
        if best <= before * (1 + 1e-9):
            break
    return parts


def _exchange(parts: Parts, gain: Matrix, p: int, q: int) -> None:
    """Deal the units of two parts out anew: the best for ``p`` are those that gain most over ``q``."""
    both = np.flatnonzero((parts == p) | (parts == q))
    count = int((parts == p).sum())
    order = both[np.argsort(gain[both, q] - gain[both, p], kind="stable")]
    parts[order[:count]] = p
    parts[order[count:]] = q


def _magnitudes(deck: Deck) -> _Affinity:
    """Sums of absolute weights between the units of two axes."""
    slot, axis_of = _slots(deck)
    found: dict[tuple[int, int], Matrix] = {}
    for name, dims in deck.inference.state.items():
        entry = deck.inference.program.state[name]
        if entry.kind != "parameter" or entry.tensor.dim() < 2:
            continue
        if entry.tensor.device.type == "meta":
            raise PartitionError(
                "the strategy 'cluster' looks at the weights, and the model is on the meta device",
                hint="load the trained weights, or choose another strategy",
            )
        for first, second in combinations(range(entry.tensor.dim()), 2):
            ids = dims[first], dims[second]
            if ids[0] is None or ids[1] is None:
                continue
            rest = [dim for dim in range(entry.tensor.dim()) if dim not in (first, second)]
            magnitude = entry.tensor.detach().abs().to(torch.float64)
            matrix = (magnitude.sum(rest) if rest else magnitude).cpu().numpy()
            left = _selections(deck.labels[ids[0]], slot, axis_of, deck)
            right = _selections(deck.labels[ids[1]], slot, axis_of, deck)
            for a, rows in left.items():
                for b, columns in right.items():
                    block = rows @ matrix @ columns.T
                    key, block = ((a, b), block) if a <= b else ((b, a), block.T)
                    found[key] = found.get(key, 0.0) + np.asarray(block)
    return _Affinity(found)


def _slots(deck: Deck) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each unit its place within its axis, and the axis; -1 where it is not dealt out."""
    count = int(deck.labels.max()) + 1
    slot, axis_of = np.full(count, -1), np.full(count, -1)
    for axis, units in enumerate(deck.axes):
        slot[units], axis_of[units] = np.arange(units.size), axis
    return slot, axis_of


def _selections(
    units: NDArray[np.int32], slot: NDArray[np.int64], axis_of: NDArray[np.int64], deck: Deck
) -> dict[int, csr_matrix]:
    """For each axis in a dimension the matrix that sums its entries by unit."""
    found = {}
    for axis in np.unique(axis_of[units]).tolist():
        if axis >= 0:
            here = np.flatnonzero(axis_of[units] == axis)
            shape = (deck.axes[axis].size, units.size)
            found[axis] = csr_matrix((np.ones(here.size), (slot[units[here]], here)), shape=shape)
    return found


def _coactivations(deck: Deck, data: Sequence[Tensor]) -> _Affinity:
    """Absolute correlations of the units' activity over the examples, for axes that a weight joins."""
    activity = _activity(deck, data)
    found = {}
    for a, b in _magnitudes(deck).pairs:
        if a in activity and b in activity:
            found[a, b] = np.abs(activity[a].T @ activity[b]) / len(activity[a])
    return _Affinity(found)


def _activity(deck: Deck, data: Sequence[Tensor]) -> dict[int, Matrix]:
    """Mean absolute value of each unit in each example, standardised; ``[examples, units]`` by axis."""
    slot, axis_of = _slots(deck)
    total: dict[int, Matrix] = {}
    for node, value in _run(deck.inference.program, data):
        facts = deck.inference.facts.get(node)
        factors = facts.outputs if facts is not None and isinstance(facts.outputs, tuple) else ()
        meta = node.meta.get("value")
        if len(factors) != 1 or not isinstance(meta, TensorMeta) or node not in deck.inference.data:
            continue
        (ids,) = factors
        if not isinstance(value, Tensor) or not value.is_floating_point() or ids.shape[0] != 1:
            continue
        if meta.dims[0].symbol is None or tuple(value.shape[1:]) != meta.shape[1:]:
            continue
        shared = [dim for dim in range(1, value.dim()) if ids.shape[dim] == 1]
        magnitude = value.abs().to(torch.float64)
        mean = (magnitude.mean(shared) if shared else magnitude).flatten(1).cpu().numpy()
        for axis, columns in _selections(deck.labels[ids.ravel()], slot, axis_of, deck).items():
            total[axis] = total.get(axis, 0.0) + np.asarray(mean @ columns.T)
    return {axis: _standardised(values) for axis, values in total.items()}


def _standardised(values: Matrix) -> Matrix:
    spread = values.std(0)
    centred: Matrix = (values - values.mean(0)) / np.where(spread > 0, spread, 1.0)
    return centred


@torch.no_grad()
def _run(program: Program, data: Sequence[Tensor]) -> list[tuple[fx.Node, Any]]:
    """Every value of the evaluation graph."""
    values: dict[fx.Node, Any] = {}
    inputs = iter(data)
    for node in program.graph("eval").nodes:
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "get_attr":
            name = str(node.target)
            values[node] = False if name == TRAINING else program.state[name].tensor.detach().clone()
        elif node.op == "call_function":
            args = fx.map_arg(node.args, values.__getitem__)
            values[node] = node.target(*args, **fx.map_arg(node.kwargs, values.__getitem__))
    return list(values.items())
