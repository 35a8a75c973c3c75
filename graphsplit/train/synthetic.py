"""Synthetic intermediate labels: what stands in for the features at a cut while parts train apart.

Karadag & Topaloglu, "Partitioned Neural Network Training via Synthetic Intermediate Labels", arXiv
2403.11204. Only the abstract was at hand. What is taken from it: a model is cut into parts, labels for the
cut are drawn at random, and each part is trained with them, by itself. How labels are drawn, and everything
in `Labels`, is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from graphsplit.errors import UserError
from graphsplit.train.loop import Batches

Distribution = Literal["normal", "uniform", "sign"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)


@dataclass(frozen=True)
class Labels:
    """How synthetic labels are drawn: a point in the space of features for each class.

    Attributes:
        classes: How many.
        distribution: Of the entries of a point: ``"normal"``, ``"uniform"`` (both of unit variance), or
            ``"sign"`` (-1 or 1).
        scale: The points' entries are multiplied by it.
        separation: Share of what classes have of their own: at 1 points are independent, at 0 all are one.
        noise: Standard deviation of what is added, anew for every example, where labels are a part's inputs.
        seed: Of the points and the noise.
    """

    classes: int
    distribution: Distribution = "normal"
    scale: float = 1.0
    separation: float = 1.0
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise UserError(f"synthetic labels for {self.classes} classes", hint="give two or more")
        if self.distribution not in DISTRIBUTIONS:
            raise UserError(
                f"the distribution is {self.distribution!r}", hint=f"give one of {', '.join(DISTRIBUTIONS)}"
            )
        if self.scale <= 0 or self.noise < 0 or not 0 < self.separation <= 1:
            raise UserError(
                f"labels of scale {self.scale}, noise {self.noise} and separation {self.separation}",
                hint="scale is above 0, noise not below, separation above 0 and at most 1",
            )


def draw_points(labels: Labels, shape: tuple[int, ...], cut: int, *, nonnegative: bool) -> Tensor:
    """A point for each class. ``[classes, *shape]``

    Args:
        labels: How to draw.
        shape: Of the features of one example.
        cut: Number of the cut, which has points of its own.
        nonnegative: Features come out of an op that gives no negative number: neither do points.
    """
    generator = torch.Generator().manual_seed(labels.seed * 1_003 + cut)
    common = _draw(labels.distribution, (1, *shape), generator)
    own = _draw(labels.distribution, (labels.classes, *shape), generator)
    mixed: Tensor = labels.separation**0.5 * own + (1 - labels.separation) ** 0.5 * common
    points: Tensor = labels.scale * mixed
    return points.clamp_min(0) if nonnegative else points


def _draw(distribution: Distribution, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if distribution == "normal":
        return torch.randn(shape, generator=generator)
    uniform = torch.empty(shape).uniform_(-1, 1, generator=generator)
    if distribution == "sign":
        return uniform.sign()
    scaled: Tensor = uniform * math.sqrt(3)
    return scaled


@dataclass(frozen=True)
class Relabelled:
    """Batches for one part: its inputs and targets are points of the example's class, or those of the data.

    Attributes:
        data: Batches of inputs and classes ``[N]`` or ``[N, T]``.
        given: Points that take the place of the inputs; None for the first part.
        wanted: Points that take the place of the targets; None for the last part.
        noise: Standard deviation of what is added to ``given``.
        nonnegative: Neither is what was added below zero.
    """

    data: Batches
    given: Tensor | None
    wanted: Tensor | None
    noise: float
    nonnegative: bool

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for inputs, classes in self.data:
            points = self.given
            if points is not None:
                inputs = _look_up(points, classes)
                inputs = inputs + self.noise * torch.randn_like(inputs)
                inputs = inputs.clamp_min(0) if self.nonnegative else inputs
            yield inputs, classes if self.wanted is None else _look_up(self.wanted, classes)


def _look_up(points: Tensor, classes: Any) -> Tensor:
    """The point of each example; of classes ``[N, T]`` that of each position, ``points[class, position]``."""
    if not isinstance(classes, Tensor) or classes.dtype.is_floating_point:
        raise UserError("synthetic labels are for classes", hint="targets are whole numbers, one class each")
    if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < len(points):
        raise UserError(
            f"classes from {int(classes.min())} to {int(classes.max())}, and labels for {len(points)}",
            hint="give Labels(classes=...) as many as there are",
        )
    points = points.to(classes.device)
    if classes.dim() == 1:
        return points[classes]
    if classes.dim() != 2 or points.dim() < 3 or points.shape[1] != classes.shape[1]:
        raise UserError(
            f"classes {tuple(classes.shape)} do not fit features {tuple(points.shape[1:])} of an example",
            hint="targets are [N], or [N, T] where the features have T positions",
        )
    return points[classes, torch.arange(classes.shape[1], device=classes.device)]
