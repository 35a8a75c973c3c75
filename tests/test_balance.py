"""Exact balance: the dynamic program against brute force, and against a rule that is not exact."""

import itertools
import random
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from graphsplit.depth.balance import Balance, balance


def sizes(costs: list[float], cuts: tuple[int, ...]) -> list[float]:
    return [sum(costs[a:b]) for a, b in pairwise((0, *cuts, len(costs)))]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], list[int], int, list[float], float, list[bool]]:
    count = draw(st.integers(2, 8))
    costs = draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0, 7.0]), min_size=count, max_size=count))
    places = sorted(draw(st.sets(st.integers(1, count - 1), max_size=count - 1)))
    prices = draw(st.lists(st.sampled_from([0.0, 1.0, 3.0]), min_size=len(places), max_size=len(places)))
    full = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return costs, places, draw(st.integers(1, 5)), prices, draw(st.sampled_from([0.0, 0.3])), full


@given(problems())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_no_other_division_is_better(
    problem: tuple[list[float], list[int], int, list[float], float, list[bool]],
) -> None:
    costs, places, n, prices, tolerance, full = problem
    price_of = dict(zip(places, prices, strict=True))

    def empty(cuts: tuple[int, ...]) -> int:
        return sum(not any(full[a:b]) for a, b in pairwise((0, *cuts, len(costs))))

    found = balance(costs, places, n, prices, tolerance, full)
    every = list(itertools.combinations(places, n - 1))
    if not every:
        assert found is None
        return
    assert isinstance(found, Balance)
    best = min(max(sizes(costs, cuts)) for cuts in every)
    within = [cuts for cuts in every if max(sizes(costs, cuts)) <= best * (1 + tolerance)]
    assert found.cuts in within
    assert list(found.costs) == sizes(costs, found.cuts)
    assert found.bound <= best
    ranks = [(empty(cuts), sum(price_of[place] for place in cuts)) for cuts in within]
    assert (empty(found.cuts), sum(price_of[place] for place in found.cuts)) == min(ranks)


def block_partition(costs: list[float], n: int) -> list[float]:
    """Block partition (Barany & Grinberg, 2015), the rule of torchgpipe: boundaries move one item at a time."""
    ends = [len(costs) * (group + 1) // n for group in range(n)]
    for _ in range(len(costs) ** 2):
        now = sizes(costs, tuple(ends[:-1]))
        dearest = max(range(n), key=now.__getitem__)
        moved = False
        for side in (-1, 1):
            if not 0 <= dearest + side < n:
                continue
            trial = ends.copy()
            trial[min(dearest, dearest + side)] -= side
            if all(a < b for a, b in pairwise([0, *trial])):
                then = sizes(costs, tuple(trial[:-1]))
                if max(then[dearest], then[dearest + side]) < now[dearest]:
                    ends, moved = trial, True
                    break
        if not moved:
            break
    return sizes(costs, tuple(ends[:-1]))


def test_never_behind_block_partition_and_often_ahead() -> None:
    rng = random.Random(0)
    ratios = []
    for _ in range(200):
        costs = [rng.expovariate(1.0) for _ in range(16)]
        found = balance(costs, range(1, 16), 4)
        assert found is not None
        ratios.append(max(block_partition(costs, 4)) / max(found.costs))
    assert min(ratios) >= 1 - 1e-12
    assert sum(ratio > 1 + 1e-9 for ratio in ratios) > 20


def test_a_single_group_needs_no_cut() -> None:
    found = balance([1.0, 2.0], [1], 1)
    assert found == Balance((), (3.0,), 3.0)
