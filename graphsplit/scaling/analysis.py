"""What the trials of a study say: steps against batch size, with intervals.

The fewest steps to the goal are taken to be ``K(B) = c1 / B + c2`` (Lee, Torr & Jaggi, arXiv 2003.11316,
eq. 8: the first term is the variance of the gradient, the second what no batch can save). The critical batch
size ``c1 / c2`` is where both are equal. The slope of log K against log B is ``-1 / (1 + B / critical)``:
*perfect scaling* where it is below -0.9, *maximal data parallelism* where it is above -0.1, and *diminishing
returns* in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graphsplit.scaling.plan import Cell, OptimizerName, Trial, fewest

Regime = Literal["perfect scaling", "diminishing returns", "maximal data parallelism"]
Interval = tuple[float, float]
STEEP, FLAT = -0.9, -0.1
LEVEL = 95.0


@dataclass(frozen=True)
class Fit:
    """``K(B) = c1 / B + c2``."""

    c1: float
    c2: float

    def __call__(self, batch: float) -> float:
        """Steps at a batch size."""
        return self.c1 / batch + self.c2

    @property
    def critical(self) -> float:
        """Batch size at which both terms are equal; infinite where nothing is lost at any size."""
        return self.c1 / self.c2 if self.c2 > 0 else math.inf

    def regime(self, batch: float) -> Regime:
        """By the slope of log K at a batch size."""
        slope = -(self.c1 / batch) / max(self(batch), 1e-300)
        if slope <= STEEP:
            return "perfect scaling"
        return "diminishing returns" if slope < FLAT else "maximal data parallelism"


@dataclass(frozen=True)
class Curve:
    """One sparsity and optimizer.

    Attributes:
        steps: Fewest steps by batch size, where any trial reached the goal.
        fit: None for fewer than two points.
        c1, c2, critical: Intervals of 95 %, by resampling the trials of every cell.
        samples: Critical batch sizes of the resampled fits.
    """

    sparsity: float
    optimizer: OptimizerName
    steps: Mapping[int, int]
    fit: Fit | None
    c1: Interval = (math.nan, math.nan)
    c2: Interval = (math.nan, math.nan)
    critical: Interval = (math.nan, math.nan)
    samples: tuple[float, ...] = ()

    def regimes(self) -> dict[int, Regime]:
        """Of each batch size."""
        return {} if self.fit is None else {batch: self.fit.regime(batch) for batch in self.steps}


def fit(steps: Mapping[int, float]) -> Fit | None:
    """Least squares of the relative error, with neither term below zero; None for fewer than two points.

    >>> found = fit({batch: 1000 / batch + 20 for batch in (1, 4, 16, 64, 256)})
    >>> round(found.c1), round(found.c2), round(found.critical)
    (1000, 20, 50)
    """
    if len(steps) < 2:
        return None
    batches = np.array(list(steps), np.float64)
    counts = np.array([steps[batch] for batch in steps], np.float64)
    rows = np.stack([1 / (batches * counts), 1 / counts], 1)
    wanted = np.ones(len(steps))
    c1, c2 = np.linalg.lstsq(rows, wanted)[0].tolist()
    if c1 < 0 or c2 < 0:  # the other one alone
        place = int(c1 < 0)
        alone = float(rows[:, place] @ wanted / (rows[:, place] @ rows[:, place]))
        c1, c2 = (0.0, alone) if place else (alone, 0.0)
    return Fit(c1, c2)


def curves(trials: Sequence[Trial], *, resamples: int = 1000, seed: int = 0) -> list[Curve]:
    """A curve for each sparsity and optimizer, with intervals.

    Args:
        trials: Of a study.
        resamples: Of the trials of each cell, with replacement. A trial that did not reach the goal counts as
            none; a cell of which no resampled trial did is left out of that fit.
        seed: Of the resampling.
    """
    cells: dict[Cell, list[Trial]] = {}
    for trial in trials:
        cells.setdefault(trial.cell, []).append(trial)
    found = []
    for optimizer, sparsity in sorted({(cell.optimizer, cell.sparsity) for cell in cells}):
        own = {c.batch: t for c, t in cells.items() if (c.optimizer, c.sparsity) == (optimizer, sparsity)}
        found.append(_curve(sparsity, optimizer, dict(sorted(own.items())), resamples, seed))
    return found


def _curve(
    sparsity: float, optimizer: OptimizerName, own: Mapping[int, Sequence[Trial]], resamples: int, seed: int
) -> Curve:
    best = {batch: fewest(trials) for batch, trials in own.items()}
    steps = {batch: count for batch, count in best.items() if count is not None}
    fitted = fit(steps)
    if fitted is None:
        return Curve(sparsity, optimizer, steps, None)
    random = np.random.default_rng(seed)
    counts = {
        batch: np.array([t.steps if t.outcome == "complete" else math.inf for t in own[batch]])
        for batch in steps
    }
    samples: list[Fit] = []
    for _ in range(resamples):
        drawn = {batch: float(random.choice(values, values.size).min()) for batch, values in counts.items()}
        again = fit({batch: count for batch, count in drawn.items() if math.isfinite(count)})
        if again is not None:
            samples.append(again)
    critical = np.array([sample.critical for sample in samples])
    return Curve(
        sparsity,
        optimizer,
        steps,
        fitted,
        _interval(np.array([sample.c1 for sample in samples])),
        _interval(np.array([sample.c2 for sample in samples])),
        _interval(critical),
        tuple(critical.tolist()),
    )


def _interval(values: NDArray[np.float64]) -> Interval:
    if not values.size:
        return math.nan, math.nan
    low, high = np.quantile(values, [(100 - LEVEL) / 200, (100 + LEVEL) / 200], method="nearest")
    return float(low), float(high)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, for one sparsity and optimizer against the dense model.

    Attributes:
        text: What is claimed.
        ratio: Critical batch size over that of the dense model.
        interval: Of the ratio, 95 %.
        verdict: ``confirmed`` where all of the interval agrees, ``contradicted`` where none does.
    """

    text: str
    optimizer: OptimizerName
    sparsity: float
    ratio: float
    interval: Interval
    verdict: Literal["confirmed", "contradicted", "open"]


def claims(found: Sequence[Curve]) -> list[Claim]:
    """The paper's two claims.

    Sparse models scale no worse than dense ones: their critical batch size is not smaller, but for a tenth,
    which is the margin here. With momentum that of very sparse models (90 % and more) is larger.
    """
    dense = {curve.optimizer: curve for curve in found if curve.sparsity == 0}
    result = []
    for curve in found:
        base = dense.get(curve.optimizer)
        if curve.sparsity == 0 or base is None or base.fit is None or curve.fit is None:
            continue
        pairs = zip(curve.samples, base.samples, strict=False)
        ratios = np.array([own / other for own, other in pairs if other > 0])
        interval = _interval(ratios[np.isfinite(ratios)])
        ratio = curve.fit.critical / base.fit.critical if base.fit.critical > 0 else math.inf
        result.append(_claim("scales no worse than dense", curve, ratio, interval, 0.9))
        if curve.optimizer != "sgd" and curve.sparsity >= 0.9:
            result.append(_claim("has a larger critical batch than dense", curve, ratio, interval, 1.0))
    return result


def _claim(text: str, curve: Curve, ratio: float, interval: Interval, bound: float) -> Claim:
    low, high = interval
    verdict: Literal["confirmed", "contradicted", "open"] = (
        "confirmed" if low >= bound else "contradicted" if high < bound else "open"
    )
    return Claim(text, curve.optimizer, curve.sparsity, ratio, interval, verdict)
