"""Losses with one number for each example, which is what goes up from group to group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from graphsplit.answers import IGNORED, classes_in
from graphsplit.errors import UserError

PerSample = Callable[[Tensor, Any], Tensor]
"""Of outputs ``[N, ...]`` and targets a loss for each example, ``[N]``."""

Named = Literal["cross_entropy", "mse"]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each example, the mean over its positions.

    Args:
        outputs: Scores ``[N, K]``, ``[N, T, K]`` (language models) or ``[N, K, ...]`` (images).
        targets: Classes ``[N]``, ``[N, T]`` or ``[N, ...]``; positions of -100 do not count.

    Raises:
        UserError: The shapes do not fit, or fit in two ways.
    """
    kind = classes_in(
        outputs.shape, targets.shape, hint="give a loss of your own, with one number for each example"
    )
    scores = outputs.movedim(-1, 1) if kind == "classes_last" else outputs
    found = F.cross_entropy(scores, targets, reduction="none")
    if found.dim() == 1:
        return found
    counted = (targets != IGNORED).flatten(1).sum(1).clamp_min(1)
    return found.flatten(1).sum(1) / counted


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of each example, the mean over its entries; both are ``[N, ...]``."""
    if outputs.shape != targets.shape:
        raise UserError(f"targets {tuple(targets.shape)} do not fit outputs {tuple(outputs.shape)}")
    error: Tensor = (outputs - targets).square()
    return error if error.dim() == 1 else error.flatten(1).mean(1)


NAMED: dict[Named, PerSample] = {"cross_entropy": cross_entropy, "mse": mean_squared_error}


def per_sample(loss: Named | PerSample) -> PerSample:
    """A loss by name, or the user's own.

    Raises:
        UserError: There is no such name.
    """
    if callable(loss):
        return loss
    if loss not in NAMED:
        raise UserError(f"there is no loss {loss!r}", hint=f"give {', '.join(NAMED)}, or a function")
    return NAMED[loss]


def checked(loss: PerSample, outputs: Tensor, targets: Any) -> Tensor:
    """The loss of each example, which has to be ``[N]``.

    Raises:
        UserError: The loss gives another shape.
    """
    found = loss(outputs, targets)
    if tuple(found.shape) != (outputs.shape[0],):
        shape = tuple(found.shape)
        raise UserError(
            f"the loss gives {shape} for {outputs.shape[0]} examples, and has to give one number for each",
            hint="use reduction='none' and take the mean over all but the first dimension",
        )
    return found
