"""From ids to units to sub-models: components, axes, and who goes where."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphsplit.analysis.dealing import Dealer, Deck, Prescribed, contiguous
from graphsplit.analysis.inference import Inference
from graphsplit.analysis.units import Ids, array_key, factor_key, varying

SHARED_PART = -1


@dataclass(frozen=True)
class Axis:
    """Units that occur in the same dimensions of the same state tensors.

    Attributes:
        name: The first dimension they occur in, as ``name[dim]``.
        size: Number of units.
        counts: Units of each sub-model; empty where the axis is kept whole because it has fewer units than K.
        places: State dimensions that hold these units, as ``name[dim]``.
    """

    name: str
    size: int
    counts: tuple[int, ...]
    places: tuple[str, ...]


@dataclass(frozen=True)
class Assignment:
    """Which sub-model each id belongs to, `SHARED_PART` for those of all."""

    part: NDArray[np.int16]
    axis: NDArray[np.int32]
    unit: NDArray[np.int32]
    axes: tuple[Axis, ...]


def assign(
    inference: Inference,
    shares: tuple[float, ...] | None = None,
    deal: Dealer = contiguous,
    needed: int | None = None,
) -> Assignment:
    """Divide the units of every axis into K shares.

    Args:
        inference: Facts about the program, for a given K.
        shares: Relative sizes of the sub-models; equal ones (up to one unit) by default.
        deal: Says which unit goes to which sub-model.
        needed: How many of the sub-models, from the first, have to be models; all by default.

    Where a share would not be a rectangular slice of some tensor, the units along one of its dimensions are
    tied and the division is made again. Where a sub-model would have nothing of some tensor (a slice of
    units, one head of several), the units of this tensor are dealt out by themselves.
    """
    apart: list[Ids] = []
    while True:
        assignment = _divide(inference, shares or (1.0,) * inference.k, deal, apart)
        parts = range(inference.k if needed is None else needed)
        ragged = _ragged(inference, assignment, parts)
        # What is prescribed has gone through this before.
        missing = [] if isinstance(deal, Prescribed) else _missing(inference, assignment, parts)
        if not ragged and not missing:
            return assignment
        for ids in ragged:
            _tie(inference, ids, evenly=needed is None)
        apart += missing


def _divide(inference: Inference, shares: tuple[float, ...], deal: Dealer, apart: list[Ids]) -> Assignment:
    k = inference.k
    labels = inference.units.components()
    count = int(labels.max()) + 1
    signature = np.zeros(count, np.uint64)
    first = np.full(count, np.iinfo(np.int64).max)
    random = np.random.default_rng(0)
    occurrences = _occurrences(inference)
    starts: list[int] = []
    position = 0
    for ids, _ in occurrences:
        units = labels[ids]
        np.add.at(signature, units, random.integers(1, 2**63, dtype=np.uint64))
        np.minimum.at(first, units, np.arange(position, position + ids.size))
        starts.append(position)
        position += ids.size
    for ids in apart:
        units = np.unique(labels[ids])
        signature[units] += random.integers(1, 2**63, dtype=np.uint64) * (signature[units] > 0)
    part_of_unit = np.full(count, SHARED_PART, np.int16)
    axis_of_unit = np.full(count, -1, np.int32)
    present = np.flatnonzero(signature)
    present = present[present != 0]
    order = present[np.lexsort((first[present], signature[present]))]
    bounds = np.flatnonzero(np.diff(signature[order])) + 1
    groups = [group for group in np.split(order, bounds) if group.size]
    groups.sort(key=lambda group: int(first[group[0]]))
    for number, group in enumerate(groups):
        axis_of_unit[group] = number
    wide = [number for number, group in enumerate(groups) if group.size >= k]
    dealt = deal(Deck(inference, shares, labels, tuple(groups[number] for number in wide)))
    counts: list[tuple[int, ...]] = [()] * len(groups)
    for number, parts in zip(wide, dealt, strict=True):
        part_of_unit[groups[number]] = parts
        if parts[0] != SHARED_PART:
            counts[number] = tuple(np.bincount(parts, minlength=k).tolist())
    members: list[list[tuple[int, str]]] = [[] for _ in groups]
    for ids, places in occurrences:
        held = np.bincount(axis_of_unit[labels[ids]] + 1, minlength=len(groups) + 1)[1:]
        for number in np.flatnonzero(held).tolist():
            members[number] += places
    axes = tuple(
        Axis(
            occurrences[bisect_right(starts, int(first[group[0]])) - 1][1][0][1],
            int(group.size),
            count,
            tuple(place for _, place in sorted(member)),
        )
        for group, count, member in zip(groups, counts, members, strict=True)
    )
    return Assignment(part_of_unit[labels], axis_of_unit[labels], labels, axes)


def _occurrences(inference: Inference) -> list[tuple[Ids, list[tuple[int, str]]]]:
    """Every array of ids in the state, with the numbered dimensions (``name[dim]``) that it stands for."""
    found: dict[tuple[int, ...], tuple[Ids, list[tuple[int, str]]]] = {}
    number = 0
    for name, dims in inference.state.items():
        for dim, ids in enumerate(dims):
            assert ids is not None
            if ids.any():
                found.setdefault(factor_key(ids), (ids, []))[1].append((number, f"{name}[{dim}]"))
                number += 1
    return list(found.values())


def _arrays(inference: Inference) -> Iterator[Ids]:
    for facts in inference.facts.values():
        outputs = [facts.outputs] if isinstance(facts.outputs, tuple) else facts.outputs
        for factors in outputs:
            yield from factors
        for ids, _ in (*facts.mixes, *facts.contracts):
            yield ids


def _ragged(inference: Inference, assignment: Assignment, of: range) -> list[Ids]:
    """Factors of which some sub-model's share is no product of index sets."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for ids in _arrays(inference):
        if len(varying(ids)) < 2:
            continue
        key = array_key(ids)
        if key in seen:
            continue
        seen.add(key)
        parts = assignment.part[ids]
        for part in of:
            inside = (parts == part) | (parts == SHARED_PART)
            product = np.ones_like(inside)
            for dim in varying(ids):
                rest = tuple(d for d in range(ids.ndim) if d != dim)
                product &= inside.any(axis=rest, keepdims=True)
            if not np.array_equal(product, inside):
                found.append(ids)
                break
    return found


def _missing(inference: Inference, assignment: Assignment, of: range) -> list[Ids]:
    """Factors of which some sub-model holds nothing."""
    seen: set[tuple[int, ...]] = set()
    found = []
    for ids in _arrays(inference):
        key = factor_key(ids)
        if key not in seen:
            seen.add(key)
            held = np.bincount(assignment.part[ids].ravel() - SHARED_PART, minlength=inference.k + 1)
            if not held[0] and not held[1 + of.start : 1 + of.stop].all():
                found.append(ids)
    return found


def _tie(inference: Inference, ids: Ids, *, evenly: bool) -> None:
    """Units vary along one dimension from now on: one that K divides if this matters, else the longest."""
    dims = varying(ids)
    positions = {dim: inference.units._positions(ids, [dim]) for dim in dims}
    carriers = [dim for dim in dims if evenly and positions[dim] % inference.k == 0]
    carriers += sorted(dims, key=lambda dim: -positions[dim])
    inference.units.tie(ids, [dim for dim in dims if dim != carriers[0]])
