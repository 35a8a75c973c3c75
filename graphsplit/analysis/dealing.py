"""Who goes where: the units of every axis are dealt out to K sub-models.

A dealer is given all axes at once, as a `Deck`, and returns for each axis the sub-model of every unit (-1 for
all of an axis that is to be kept whole). That is all it decides; which units there are is known before, and
slices follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from graphsplit.errors import PartitionError, PlanError

if TYPE_CHECKING:
    from graphsplit.analysis.inference import Inference

Units = NDArray[np.int64]
Parts = NDArray[np.int16]
Strategy = Literal["contiguous", "interleaved", "random", "cluster"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclass(frozen=True)
class Deck:
    """The axes that are to be dealt out.

    Attributes:
        inference: Facts about the program.
        shares: Relative sizes of the sub-models.
        labels: The unit of every id.
        axes: The units of each axis, in the order in which they stand in the state.
    """

    inference: Inference
    shares: tuple[float, ...]
    labels: NDArray[np.int32]
    axes: tuple[Units, ...]

    @property
    def k(self) -> int:
        """Number of sub-models."""
        return len(self.shares)

    def counts(self, size: int) -> list[int]:
        """Units of each sub-model for an axis of ``size`` units, at least one each."""
        return counts_of(size, self.shares)


Dealer = Callable[[Deck], list[Parts]]


def check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """The shares, if they are positive numbers.

    Raises:
        PartitionError: They are not.
    """
    if not shares or not all(_is_positive(share) for share in shares):
        raise PartitionError(
            f"shares are {shares!r}, expected positive numbers", hint="for example shares=(3, 1)"
        )
    return tuple(float(share) for share in shares)


def _is_positive(share: object) -> bool:
    return isinstance(share, (int, float)) and not isinstance(share, bool) and 0 < share < float("inf")


def dealer_of(strategy: Strategy, seed: int = 0, data: Sequence[Tensor] | None = None) -> Dealer:
    """The dealer of a name.

    Args:
        strategy: One of `STRATEGIES`.
        seed: For ``random`` and ``cluster``.
        data: A batch of flat inputs, for ``cluster`` by co-activation in place of weight magnitude.

    Raises:
        PartitionError: There is no such strategy.
    """
    from graphsplit.analysis.clustering import cluster  # which builds on this file

    dealers = {
        "contiguous": contiguous,
        "interleaved": interleaved,
        "random": random(seed),
        "cluster": cluster(seed, data),
    }
    if strategy not in dealers:
        raise PartitionError(f"strategy is {strategy!r}, expected one of {', '.join(dealers)}")
    return dealers[strategy]


def counts_of(size: int, shares: Sequence[float]) -> list[int]:
    """Divide ``size`` units as the shares say, by largest remainders, with at least one unit each.

    >>> counts_of(10, (3, 1))
    [8, 2]
    >>> counts_of(50, (1, 1, 1, 1))
    [13, 13, 12, 12]
    """
    if size < len(shares):
        raise ValueError(f"{size} units for {len(shares)} sub-models")
    exact = np.asarray(shares, np.float64) / np.sum(shares) * size
    counts = np.maximum(np.floor(exact + 1e-9), 1).astype(np.int64)
    while counts.sum() < size:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > size:  # those raised to one took it from the others
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    return [int(count) for count in counts]


def contiguous(deck: Deck) -> list[Parts]:
    """Neighbours stay together: the first units of each axis go to the first sub-model, and so on."""
    return [_in_order(deck.counts(units.size)) for units in deck.axes]


def interleaved(deck: Deck) -> list[Parts]:
    """Units are dealt out in turn, as cards are."""
    return [_in_turn(deck.counts(units.size)) for units in deck.axes]


def random(seed: int) -> Dealer:
    """Every division of an axis into shares of these sizes is equally likely."""

    def deal(deck: Deck) -> list[Parts]:
        generator = np.random.default_rng(seed)
        return [generator.permutation(parts) for parts in contiguous(deck)]

    return deal


@dataclass(frozen=True)
class Prescribed:
    """As the dimensions of the state say: for each tensor and dimension the sub-model of every index.

    Entries below zero are not known, or belong to all; an axis of which nothing is known is kept whole.
    """

    parts_of: Mapping[str, Sequence[Parts | None]]

    def __call__(self, deck: Deck) -> list[Parts]:
        """The sub-model of every unit.

        Raises:
            PlanError: Some unit that is to be dealt out is not known.
        """
        if deck.k == 1:
            return contiguous(deck)  # one sub-model has everything, so that nothing is prescribed
        part_of_unit = np.full(int(deck.labels.max()) + 1, -1, np.int16)
        for name, dims in deck.inference.state.items():
            for ids, parts in zip(dims, self.parts_of.get(name, (None,) * len(dims)), strict=True):
                if ids is None or parts is None or ids.size != parts.size:
                    continue
                known = parts >= 0
                part_of_unit[deck.labels[ids[known]]] = parts[known]
        dealt = [part_of_unit[units] for units in deck.axes]
        held = [set(np.unique(parts).tolist()) for parts in dealt]
        if set(range(deck.k)) not in held or any(here not in ({-1}, set(range(deck.k))) for here in held):
            raise PlanError(
                "the plan does not belong to this model",
                hint="it deals out other units than the model has",
            )
        return dealt


def _in_order(counts: Sequence[int]) -> Parts:
    return np.repeat(np.arange(len(counts), dtype=np.int16), counts)


def _in_turn(counts: Sequence[int]) -> Parts:
    # The j-th of n units of a share stands at (j + 1/2) / n of the axis; ties go by sub-model.
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return _in_order(counts)[np.argsort(places, kind="stable")]
