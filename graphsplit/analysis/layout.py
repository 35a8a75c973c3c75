"""Layouts: which slice of a tensor each sub-model holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphsplit.analysis.assignment import SHARED_PART, Assignment
from graphsplit.analysis.units import Factors, Ids, array_key, varying
from graphsplit.errors import InternalError

Indices = NDArray[np.int64]
Cut = tuple[Indices, ...]
"""Sorted indices of one dimension, for each sub-model."""


@dataclass(frozen=True)
class Layout:
    """Slices of one tensor.

    Attributes:
        shape: Sizes in the full model.
        cuts: For each dimension the indices of each sub-model, or None where all hold all of it.
        disjoint: No entry is held by two sub-models.
        factors: Number of independent kinds of units that are divided (2 for a weight between two axes).
    """

    shape: tuple[int, ...]
    cuts: tuple[Cut | None, ...]
    disjoint: bool
    factors: int

    @property
    def active(self) -> bool:
        """True where sub-models hold different slices."""
        return self.factors > 0

    def local_shape(self, part: int) -> tuple[int, ...]:
        """Sizes in sub-model ``part``."""
        return tuple(
            size if cut is None else cut[part].size for size, cut in zip(self.shape, self.cuts, strict=True)
        )

    def same_cuts(self, other: Layout) -> bool:
        """True where both cut the same dimensions in the same way."""
        return len(self.cuts) == len(other.cuts) and all(
            a is b
            or (
                a is not None
                and b is not None
                and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
            )
            for a, b in zip(self.cuts, other.cuts, strict=True)
        )


class Layouts:
    """Computes layouts from factors, and remembers them."""

    def __init__(self, assignment: Assignment, k: int) -> None:
        self.assignment = assignment
        self.k = k
        self._cuts: dict[tuple[int, ...], dict[int, Cut] | None] = {}
        self._distinct: dict[int, Cut] = {}
        self._layouts: dict[tuple[tuple[int, ...], ...], Layout] = {}
        self._keep: list[Factors] = []  # alive, as their addresses are keys

    def of(self, shape: tuple[int, ...], factors: Factors) -> Layout:
        """Layout of a tensor.

        Raises:
            InternalError: A sub-model's share is not a rectangular slice.
        """
        key = (shape, *(array_key(ids) for ids in factors))
        if key not in self._layouts:
            self._keep.append(factors)
            self._layouts[key] = self._make(shape, factors)
        return self._layouts[key]

    def _make(self, shape: tuple[int, ...], factors: Factors) -> Layout:
        cuts: list[Cut | None] = [None] * len(shape)
        active = 0
        disjoint = False
        for ids in factors:
            found = self._factor(ids)
            if not found:
                continue
            active += 1
            for dim, cut in found.items():
                if ids.shape[dim] != shape[dim]:
                    raise InternalError(f"a factor of shape {ids.shape} for a tensor of shape {shape}")
                known = cuts[dim]
                cuts[dim] = cut if known is None else tuple(
                    np.intersect1d(a, b) for a, b in zip(known, cut, strict=True)
                )  # fmt: skip
            parts = self.assignment.part[ids]
            disjoint |= not bool((parts == SHARED_PART).any())
        self._distinct.update((id(cut), cut) for cut in cuts if cut is not None)
        return Layout(shape, tuple(cuts), disjoint, active)

    def alike(self, part: int, other: int) -> bool:
        """True where two sub-models hold slices of the same sizes of every tensor asked for so far."""
        return all(cut[part].size == cut[other].size for cut in self._distinct.values())

    def _factor(self, ids: Ids) -> dict[int, Cut] | None:
        key = array_key(ids)
        if key not in self._cuts:
            self._cuts[key] = self._compute(ids)
        return self._cuts[key]

    def _compute(self, ids: Ids) -> dict[int, Cut] | None:
        parts = self.assignment.part[ids]
        if self.k == 1 or bool((parts == SHARED_PART).all()):
            return None
        dims = varying(ids)
        if len(dims) == 1:
            line = parts.ravel()
            held = (np.flatnonzero((line == part) | (line == SHARED_PART)) for part in range(self.k))
            return {dims[0]: tuple(held)}
        cuts: dict[int, Cut] = {}
        inside = [(parts == part) | (parts == SHARED_PART) for part in range(self.k)]
        for dim in dims:
            rest = tuple(d for d in range(ids.ndim) if d != dim)
            lines = [mask.any(axis=rest) for mask in inside]
            if not all(bool(line.all()) for line in lines):
                cuts[dim] = tuple(np.flatnonzero(line) for line in lines)
        return cuts

    def active_along(self, ids: Ids, dims: tuple[int, ...]) -> bool:
        """True where the entries along ``dims`` belong to different sub-models."""
        if not dims or self.k == 1:
            return False
        parts = self.assignment.part[ids]
        return bool((parts.max(axis=dims) != parts.min(axis=dims)).any())
