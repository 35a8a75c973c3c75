"""Units: which indices of which tensor dimensions belong together.

Every tensor carries a tuple of *factors*. A factor is an integer array of the tensor's rank whose size along
each dimension is the tensor's size or 1; its entry is the id of the unit that this part of the tensor belongs
to. An activation of shape ``[N, C, H, W]`` has one factor of shape ``[1, C, 1, 1]``; a weight ``[O, I]`` has
two, ``[O, 1]`` and ``[1, I]``; heads and head dimensions after a view have one, ``[1, H, 1, D]``. A dimension
along which no factor varies is *shared*. Reshapes, slices and concatenations move ids by the same array
operation that moves the data, so nothing has to be decided where a dimension is taken apart; only an op that
mixes a part of a factor's dimensions does (see `UnitBuilder.settle`).

Ids that must stay together are edges; the connected components are the units. Id 0 is the component of all
that is shared by every sub-model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Ids = NDArray[np.int64]
Factors = tuple[Ids, ...]

SHARED = 0


def varying(ids: Ids) -> tuple[int, ...]:
    """Dimensions along which a factor may vary."""
    return tuple(dim for dim, size in enumerate(ids.shape) if size > 1)


def factor_key(ids: Ids) -> tuple[int, ...]:
    """Identity of the ids of a factor, which its reshaped views share."""
    if not ids.flags.c_contiguous:
        return array_key(ids)
    pointer: int = ids.__array_interface__["data"][0]
    return pointer, ids.size


def array_key(ids: Ids) -> tuple[int, ...]:
    """Identity of a factor: address, shape and strides; good while the array lives."""
    return (ids.__array_interface__["data"][0], *ids.shape, *ids.strides)


@dataclass
class UnitBuilder:
    """Collects ids and edges during inference."""

    k: int
    count: int = 1
    _whole: dict[tuple[int, ...], Ids] = field(default_factory=dict)
    _known: NDArray[np.bool_] = field(default_factory=lambda: np.ones(1, bool))
    _left: list[Ids] = field(default_factory=list)
    _right: list[Ids] = field(default_factory=list)

    def fresh(self, size: int) -> Ids:
        """New ids, not yet joined to anything; shape ``[size]``."""
        ids = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return ids

    def couple(self, a: Ids, b: Ids) -> None:
        """The entries of ``a`` and ``b``, broadcast against each other, belong together."""
        if a is b:
            return
        a, b = np.broadcast_arrays(a, b)
        self._left.append(a.ravel())
        self._right.append(b.ravel())

    def share(self, ids: Ids) -> None:
        """These units are in every sub-model."""
        self._whole[factor_key(ids)] = ids
        flat = ids.ravel()
        if self._known.size < self.count:
            self._known = np.append(self._known, np.zeros(2 * self.count - self._known.size, bool))
        self._known[flat] = True
        self._left.append(flat)
        self._right.append(np.zeros_like(flat))

    @property
    def shares(self) -> int:
        """How many factors `share` was told of."""
        return len(self._whole)

    def is_shared(self, ids: Ids) -> bool:
        """True for a factor of units that `share` was told of, of this factor or another of the same."""
        if factor_key(ids) in self._whole:
            return True
        return bool(ids.size) and int(ids.max()) < self._known.size and bool(self._known[ids].all())

    def tie(self, ids: Ids, dims: Sequence[int]) -> Ids:
        """Units that differ only along ``dims`` become one; returns the factor without these dimensions."""
        kept = ids
        for dim in dims:
            kept = kept[(slice(None),) * dim + (slice(0, 1),)]
        self.couple(ids, kept)
        return kept

    def settle(self, ids: Ids, mixed: Sequence[int]) -> Ids:
        """Choose which dimensions of a factor carry the units where an op mixes the dimensions ``mixed``.

        An op that contracts, normalises or reduces over a part of a factor's dimensions leaves two ways to
        divide it: along the other dimensions (heads, groups), with the mixed ones kept whole, or along the
        mixed ones. The first is taken where K divides the number of positions, else the second where K
        divides that, else the one that is long enough; a factor that varies along one kind only is left as
        it is.
        """
        mixed = [dim for dim in mixed if ids.shape[dim] > 1]
        others = [dim for dim in varying(ids) if dim not in mixed]
        if not mixed or not others:
            return ids
        outer = self._positions(ids, others)
        inner = self._positions(ids, mixed)
        if outer % self.k == 0:
            drop = mixed
        elif inner % self.k == 0:
            drop = others
        else:
            drop = mixed if outer >= self.k else others
        return self.tie(ids, drop)

    @staticmethod
    def _positions(ids: Ids, dims: Sequence[int]) -> int:
        line = ids[tuple(slice(None) if dim in dims else 0 for dim in range(ids.ndim))]
        return int(np.unique(line).size)

    def components(self) -> NDArray[np.int32]:
        """Component number of every id; those joined to `SHARED` have the number 0."""
        if self._left:
            left, right = np.concatenate(self._left), np.concatenate(self._right)
            keep = left != right
            left, right = left[keep], right[keep]
            self._left, self._right = [left], [right]
            graph = coo_matrix((np.ones(left.size, np.int8), (left, right)), shape=(self.count, self.count))
            labels: NDArray[np.int32] = connected_components(graph.tocsr(), directed=False)[1]
        else:
            labels = np.arange(self.count, dtype=np.int32)
        shared = labels[SHARED]
        if shared != 0:
            swap = labels == 0
            labels[labels == shared] = 0
            labels[swap] = shared
        return labels


def seen_by(ids: Ids, shape: Sequence[int]) -> Ids:
    """A factor of a broadcast result as one of an operand of this shape.

    Along dimensions that the operand lacks, or has with size 1, it meets the units of the first entry.
    """
    offset = ids.ndim - len(shape)
    index = tuple(
        slice(None) if dim >= offset and shape[dim - offset] > 1 else slice(0, 1) for dim in range(ids.ndim)
    )
    cut = ids[index]
    return cut.reshape(cut.shape[offset:])


def reshape_blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Factor a reshape into blocks of equal product: lists of (input dims, output dims), in order.

    >>> reshape_blocks((2, 12, 7, 7), (2, 588))
    [([0], [0]), ([1, 2, 3], [1])]
    """
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        product_left = product_right = 1
        if i < len(before):
            left.append(i)
            product_left = before[i]
            i += 1
        if j < len(after):
            right.append(j)
            product_right = after[j]
            j += 1
        while product_left != product_right:
            if (product_left < product_right and i < len(before)) or j >= len(after):
                left.append(i)
                product_left *= before[i]
                i += 1
            else:
                right.append(j)
                product_right *= after[j]
                j += 1
        blocks.append((left, right))
    return blocks


def reshape_ids(ids: Ids, before: Sequence[int], after: Sequence[int]) -> Ids:
    """Move a factor through a reshape of its tensor; dimensions along which it is constant stay of size 1."""
    steps: list[int] = []
    target: list[int] = []
    for left, right in reshape_blocks(before, after):
        if all(ids.shape[dim] == 1 for dim in left):
            target += [1] * len(right)
            steps += [1] * len(left)
        else:
            target += [after[dim] for dim in right]
            steps += [before[dim] for dim in left]
    moved = np.broadcast_to(ids, steps).reshape(target)
    return _squeeze_constant(moved) if math.prod(target) > max(target, default=1) else moved


def _squeeze_constant(ids: Ids) -> Ids:
    """Reduce dimensions along which the ids do not change to size 1."""
    for dim, size in enumerate(ids.shape):
        if size > 1:
            first = ids[(slice(None),) * dim + (slice(0, 1),)]
            if bool((ids == first).all()):
                ids = first
    return ids
