"""When fusing pays: each op of one model, and of the fused one, measured where they are.

The time of a kernel is no function of its FLOPs: on a CPU a grouped convolution may take longer than several
plain ones, on a GPU launching small kernels takes longer than running them. So ops are measured, forward and
backward, one by one (`graphsplit.costs.seconds`), and their times added up. The optimizer is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphsplit import costs
from graphsplit.program import Program, TensorMeta


@dataclass(frozen=True)
class FusionCost:
    """What a forward and backward pass of K models takes in both ways.

    Attributes:
        in_turn: Seconds of one model after the other.
        fused: Seconds of all at once.
    """

    in_turn: float
    fused: float

    @property
    def speedup(self) -> float:
        """How many times as fast the fused module is."""
        return self.in_turn / self.fused if self.fused else 1.0

    @property
    def pays(self) -> bool:
        """True where fusing is faster."""
        return self.fused < self.in_turn

    def __str__(self) -> str:
        fused, in_turn = 1e3 * self.fused, 1e3 * self.in_turn
        return f"fused {fused:.2f} ms, in turn {in_turn:.2f} ms: {self.speedup:.2f} times as fast"


def fusion_cost(
    single: Program, fused: Program, k: int, inputs: Sequence[Tensor] | None = None, *, runs: int = 5
) -> FusionCost:
    """Measure both ways in train mode.

    Args:
        single: One of the models.
        fused: All K as one.
        k: How many.
        inputs: Of one model, in order; by default random ones of the traced sizes, indices being 0 or 1.
        runs: Of which the median is taken.

    Raises:
        UserError: The model is on the meta device, which computes nothing.
    """
    given = list(inputs) if inputs is not None else [_random(meta) for meta in single.signature.inputs]
    stacked = [
        value if value.ndim == meta.ndim else value.expand(k, *value.shape).clone()
        for value, meta in zip(given, fused.signature.inputs, strict=True)
    ]
    one = sum(costs.seconds(single, single.graph("train"), given, runs).values())
    return FusionCost(k * one, sum(costs.seconds(fused, fused.graph("train"), stacked, runs).values()))


def _random(meta: TensorMeta) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if meta.dtype.is_floating_point:
        return torch.randn(meta.shape, generator=generator).to(meta.device, meta.dtype)
    return torch.randint(0, 2, meta.shape, generator=generator).to(meta.device, meta.dtype)
