"""What a study tries: cells of sparsity, batch size and optimizer, with the same metaparameters in each.

Metaparameters are points of a scrambled Sobol sequence, drawn once for the study (Lee, Torr & Jaggi, arXiv
2003.11316, section 3; Shallue et al., arXiv 1811.03600): learning rate, and where the optimizer has one, one
minus the momentum, both log-uniform; for a decayed rate its end and the steps until then.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch

from graphsplit.errors import UserError
from graphsplit.sparsity import METHODS, Method

OptimizerName = Literal["sgd", "momentum", "nesterov"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
Decay = Literal["constant", "linear"]
Outcome = Literal["complete", "not reached", "diverged"]
FINENESS = 16
"""A number of steps is known to one part in so many, where checks are not further apart than that."""


@dataclass(frozen=True)
class Cell:
    """One workload: the fewest steps over its trials are what is looked for."""

    sparsity: float
    batch: int
    optimizer: OptimizerName


@dataclass(frozen=True)
class Settings:
    """Metaparameters of one trial.

    Attributes:
        rate: Learning rate at the start.
        momentum: Zero for plain SGD.
        end: The rate falls to this share of itself; 1 for a constant one.
        horizon: Over this share of the budget of steps, and stays there.
    """

    rate: float
    momentum: float = 0.0
    end: float = 1.0
    horizon: float = 1.0


@dataclass(frozen=True)
class Plan:
    """All that decides what the trials of a study give.

    Attributes:
        batches: Batch sizes.
        sparsities: Shares of the weights that are removed at initialisation.
        optimizers: Some of ``"sgd"``, ``"momentum"`` and ``"nesterov"``.
        trials: Sets of metaparameters for each cell.
        goal: The validation error to reach.
        budget: Steps that a trial may take.
        check: The validation error is looked at every so many steps, and more often at the start: at the
            latest after another sixteenth of the steps so far, so that few are counted as exactly as many.
        method: How weights are chosen.
        decay: Of the learning rate.
        rates: Smallest and largest learning rate.
        momenta: Smallest and largest momentum.
        patience: A trial stops at this multiple of the fewest steps of its cell so far, as it cannot win.
            More than 1 leaves second-best trials, from which intervals are made.
        seed: Of weights, of the order of the data and of the metaparameters.
        model: Digest of the model and the data, filled in by the study.
    """

    batches: tuple[int, ...]
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.7, 0.9)
    optimizers: tuple[OptimizerName, ...] = ("sgd", "momentum", "nesterov")
    trials: int = 16
    goal: float = 0.1
    budget: int = 4000
    check: int = 8
    method: Method = "snip"
    decay: Decay = "constant"
    rates: tuple[float, float] = (1e-3, 10.0)
    momenta: tuple[float, float] = (0.5, 0.99)
    patience: float = 1.5
    seed: int = 0
    model: str = ""

    def checked(self) -> Plan:
        """The plan, if there is sense in it.

        Raises:
            UserError: The first option that is out of range.
        """
        _require(
            bool(self.batches) and all(b >= 1 for b in self.batches), "batches", self.batches, "1 or more"
        )
        good = all(0 <= sparsity < 1 for sparsity in self.sparsities)
        _require(bool(self.sparsities) and good, "sparsities", self.sparsities, "in [0, 1)")
        known = all(name in OPTIMIZERS for name in self.optimizers)
        _require(
            bool(self.optimizers) and known, "optimizers", self.optimizers, f"some of {', '.join(OPTIMIZERS)}"
        )
        _require(self.trials >= 1, "trials", self.trials, "1 or more")
        _require(0 <= self.goal < 1, "goal", self.goal, "in [0, 1)")
        _require(self.check >= 1, "check", self.check, "1 or more")
        _require(self.budget >= self.check, "budget", self.budget, "at least one check")
        _require(self.method in METHODS, "method", self.method, f"one of {', '.join(METHODS)}")
        _require(self.decay in get_args(Decay), "decay", self.decay, "'constant' or 'linear'")
        _require(0 < self.rates[0] <= self.rates[1], "rates", self.rates, "positive and in order")
        _require(
            0 <= self.momenta[0] <= self.momenta[1] < 1, "momenta", self.momenta, "in [0, 1) and in order"
        )
        _require(self.patience >= 1, "patience", self.patience, "1 or more")
        return self

    def is_due(self, step: int) -> bool:
        """Is the validation error looked at after this step?"""
        return step % max(1, min(self.check, step // FINENESS)) == 0 or step == self.budget

    def cells(self) -> list[Cell]:
        """Every combination; small batches, which take longest, come first."""
        return [
            Cell(sparsity, batch, optimizer)
            for batch in sorted(set(self.batches))
            for sparsity in sorted(set(self.sparsities))
            for optimizer in dict.fromkeys(self.optimizers)
        ]

    def settings(self, optimizer: OptimizerName) -> list[Settings]:
        """The metaparameters of the trials of a cell, the same for all cells of an optimizer."""
        points = torch.quasirandom.SobolEngine(4, scramble=True, seed=self.seed).draw(self.trials).double()
        found = []
        for rate, momentum, end, horizon in points.tolist():
            less = _between(1 - self.momenta[1], 1 - self.momenta[0], momentum)
            linear = self.decay == "linear"
            found.append(
                Settings(
                    rate=_between(*self.rates, rate),
                    momentum=0.0 if optimizer == "sgd" else 1 - less,
                    end=_between(1e-3, 1.0, end) if linear else 1.0,
                    horizon=0.1 + 0.9 * horizon if linear else 1.0,
                )
            )
        return found

    def digest(self) -> str:
        """Identity of the plan."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def _between(low: float, high: float, share: float) -> float:
    """Log-uniform."""
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))


def _require(good: bool, name: str, value: object, expected: str) -> None:
    if not good:
        raise UserError(f"{name} is {value!r}, expected {expected}")


@dataclass(frozen=True)
class Trial:
    """The record of one trial.

    Attributes:
        cell: What was tried.
        number: Of the set of metaparameters.
        settings: The metaparameters.
        seed: Of the order of the data.
        outcome: The goal was reached, or not within the budget, or the loss was no number.
        steps: At the check that reached the goal; else those that were taken.
        stopped: It was stopped because it could not win any more.
        best: Smallest validation error; None where it was never a number.
    """

    cell: Cell
    number: int
    settings: Settings
    seed: int
    outcome: Outcome
    steps: int
    stopped: bool
    best: float | None

    @property
    def name(self) -> str:
        """Of the file it is stored in."""
        return name_of(self.cell, self.number)


def name_of(cell: Cell, number: int) -> str:
    """Of the file of a trial."""
    return f"{cell.optimizer}-s{cell.sparsity:g}-b{cell.batch}-{number:03d}.json"


def fewest(trials: Sequence[Trial]) -> int | None:
    """The fewest steps to the goal; None where no trial reached it."""
    return min((trial.steps for trial in trials if trial.outcome == "complete"), default=None)


def how_far(trials: Sequence[Trial]) -> str:
    """What trials came to that did not reach the goal, in words."""
    lowest = min((trial.best for trial in trials if trial.best is not None), default=None)
    diverged = sum(trial.outcome == "diverged" for trial in trials)
    best = "no error was a number" if lowest is None else f"the lowest error was {lowest:.4g}"
    return best + (f", {diverged} of {len(trials)} diverged" if diverged else "")
