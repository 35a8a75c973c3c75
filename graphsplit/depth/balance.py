"""Cutting a line of items into groups of consecutive ones, the dearest group as cheap as possible.

Exact, by dynamic programming over the places where a cut is allowed. With ``f(j, p)`` the smallest possible
cost of the dearest of ``j`` groups that end at place ``p``,

    f(j, p) = min over q < p of max(f(j - 1, q), cost(q, p)),

which is looked up for all ``q`` at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ROUNDING = 1e-12
"""By how much sums of the same costs in another order may differ, relative to them."""


@dataclass(frozen=True)
class Balance:
    """An optimal division.

    Attributes:
        cuts: Places of the cuts, in order.
        costs: Cost of each group.
        bound: No division can do better than the mean of all groups, or than the dearest stretch between two
            neighbouring places.
    """

    cuts: tuple[int, ...]
    costs: tuple[float, ...]
    bound: float


def balance(
    costs: Sequence[float],
    places: Sequence[int],
    n: int,
    prices: Sequence[float] | None = None,
    tolerance: float = 0.0,
    full: Sequence[bool] | None = None,
) -> Balance | None:
    """Divide items into ``n`` groups of neighbours so that the dearest is as cheap as it can be.

    Args:
        costs: One for each item, none negative.
        places: Where a cut is allowed, in order: before which item, from 1 to ``len(costs) - 1``.
        n: Number of groups.
        prices: Of a cut at each of ``places``; of the divisions that are as good, the one with the smallest
            sum of them is taken.
        tolerance: The dearest group may be dearer than need be by this share, where that saves on prices.
        full: For each item whether it fills a group; before prices the number of empty groups is made small.

    Returns:
        The best division; None where there are too few places.
    """
    if n < 1 or len(places) < n - 1:
        return None
    total = np.concatenate([[0.0], np.cumsum(np.asarray(costs, dtype=np.float64))])
    stops = [0, *places, len(costs)]
    sums = total[stops]
    bound = max(float(sums[-1]) / n, float(np.diff(sums).max()))
    best = _smallest_maximum(sums, n)
    cut = np.array([0.0, *(prices or [0.0] * len(places)), 0.0])
    filled = np.cumsum([0, *(full or [True] * len(costs))])[stops]
    chosen = _cheapest_cuts(sums, cut, filled, n, best * (1 + tolerance) * (1 + ROUNDING))
    cuts = tuple(stops[index] for index in chosen)
    ends = [0, *chosen, sums.size - 1]
    return Balance(cuts, tuple(float(sums[b] - sums[a]) for a, b in pairwise(ends)), bound)


def _smallest_maximum(sums: Array, n: int) -> float:
    """The cost of the dearest group in the best division; every group takes at least one stretch."""
    best = sums.copy()
    best[0] = np.inf
    for group in range(2, n + 1):
        following = np.full_like(best, np.inf)
        for place in range(group, sums.size):
            before = slice(group - 1, place)
            following[place] = np.maximum(best[before], sums[place] - sums[before]).min()
        best = following
    return float(best[-1])


def _cheapest_cuts(sums: Array, prices: Array, filled: Array, n: int, limit: float) -> list[int]:
    """Indices of the cuts with the fewest empty groups, then the smallest sum of prices, within the limit."""
    last = sums.size - 1
    empty = float(prices.sum()) + 1  # dearer than all cuts together
    lowest = np.searchsorted(sums, sums - limit)
    price = np.full(sums.size, np.inf)
    price[0] = 0.0
    origins: list[Array] = []
    for group in range(1, n + 1):
        following, origin = np.full_like(price, np.inf), np.full(sums.size, -1)
        for place in range(group, last + 1):
            low = max(group - 1, int(lowest[place]))
            if low < place:
                found = price[low:place] + empty * (filled[low:place] == filled[place])
                origin[place] = low + int(np.argmin(found))
                following[place] = found.min() + prices[place]
        price = following
        origins.append(origin)
    chosen: list[int] = []
    place = last
    for origin in reversed(origins):
        place = int(origin[place])
        chosen.append(place)
    return chosen[-2::-1]
