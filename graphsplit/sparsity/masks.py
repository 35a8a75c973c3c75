"""From scores to masks: exactly as many weights as asked for, whatever ties there are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from graphsplit.errors import UserError

Scope = Literal["global", "layer"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


def check_sparsity(sparsity: object) -> float:
    """The sparsity, if it is a number in [0, 1).

    Raises:
        UserError: It is not.
    """
    if not isinstance(sparsity, (int, float)) or isinstance(sparsity, bool) or not 0 <= sparsity < 1:
        raise UserError(
            f"the sparsity is {sparsity!r}, expected a number of at least 0 and below 1",
            hint="0.9 removes nine weights in ten",
        )
    return float(sparsity)


def kept_count(size: int, sparsity: float) -> int:
    """How many of ``size`` weights stay, at least one.

    >>> kept_count(1000, 0.9), kept_count(3, 0.99)
    (100, 1)
    """
    return max(size - round(size * sparsity), 1)


def top_k(saliency: Mapping[str, Tensor], sparsity: float, scope: Scope = "global") -> dict[str, Tensor]:
    """Keep the weights of the largest saliency.

    Args:
        saliency: By name, of any shape; larger is kept. Among equal ones those that come first are kept.
        sparsity: Share of the weights to remove, of all (``"global"``) or of each tensor (``"layer"``).
        scope: See above.

    Returns:
        Masks of the same shapes, true where a weight is kept.
    """
    if scope == "layer":
        return {name: _largest(values, sparsity) for name, values in saliency.items()}
    mask = _largest(torch.cat([values.reshape(-1) for values in saliency.values()]), sparsity)
    pieces = mask.split([values.numel() for values in saliency.values()])
    return {
        name: piece.reshape(values.shape)
        for (name, values), piece in zip(saliency.items(), pieces, strict=True)
    }


def _largest(values: Tensor, sparsity: float) -> Tensor:
    flat = values.reshape(-1)
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    if flat.numel():
        order = torch.sort(flat, descending=True, stable=True).indices
        mask[order[: kept_count(flat.numel(), sparsity)]] = True
    return mask.reshape(values.shape)


def cut_layers(masks: Mapping[str, Tensor], weights: Iterable[str]) -> tuple[str, ...]:
    """Weights of which nothing is left, so that nothing passes through their layer."""
    return tuple(name for name in weights if name in masks and not bool(masks[name].any()))
