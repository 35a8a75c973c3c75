"""When fusing pays: the forward and backward pass of K models, measured where they are, in both ways.

The time of a kernel is no function of its FLOPs: on a CPU a grouped convolution may take longer than several
plain ones, on a GPU launching small kernels takes longer than running them. Ops measured one by one do not
add up either, as the backward pass of a view costs nothing in a graph and much by itself. So whole passes are
measured, both ways in turn, so that what else the machine does meets both. The optimizer is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphsplit import costs
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import UserError
from graphsplit.program import Program
from graphsplit.verification import random_input


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
        return self.in_turn / self.fused

    @property
    def pays(self) -> bool:
        """True where fusing is faster."""
        return self.fused < self.in_turn

    def __str__(self) -> str:
        fused, in_turn = 1e3 * self.fused, 1e3 * self.in_turn
        return f"fused {fused:.2f} ms, in turn {in_turn:.2f} ms: {self.speedup:.2f} times as fast"


def fusion_cost(
    programs: Sequence[Program], fused: Program, inputs: Sequence[Tensor] | None = None, *, runs: int = 7
) -> FusionCost:
    """Measure both ways in train mode, on copies.

    Args:
        programs: The models.
        fused: All of them as one.
        inputs: Of one model, in order; by default random ones of the traced sizes, indices being 0 or 1.
        runs: Of which the median is taken, after one to warm up.

    Raises:
        UserError: The models are on the meta device, which computes nothing.
    """
    if any(entry.tensor.is_meta for entry in fused.state.values()):
        raise UserError("a model on the meta device takes no time", hint="fuse it without measuring")
    metas, generator = programs[0].signature.inputs, torch.Generator().manual_seed(0)
    given = inputs
    if given is None:
        given = [random_input(meta, generator).to(meta.device, meta.dtype) for meta in metas]
    stacked = [
        value if value.ndim == meta.ndim else value.expand(len(programs), *value.shape).clone()
        for value, meta in zip(given, fused.signature.inputs, strict=True)
    ]
    apart, whole = [emit(program) for program in programs], emit(fused)
    ways: list[Callable[[], None]] = [
        lambda: _passes(apart, given),
        lambda: _passes([whole], stacked),
    ]
    waits = any(entry.tensor.device.type != "cpu" for entry in fused.state.values())
    times: list[list[float]] = [[], []]
    with torch.random.fork_rng():
        for _ in range(runs + 1):
            for way, found in zip(ways, times, strict=True):
                found.append(_seconds(way, waits=waits))
    return FusionCost(*(statistics.median(found[1:]) for found in times))


def _passes(modules: Sequence[ProgramModule], inputs: Sequence[Tensor]) -> None:
    """Forward and backward, which leave no trace but in buffers."""
    for module in modules:
        outputs = costs.with_gradient(module.run_flat(inputs))
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        module.zero_grad()


def _seconds(way: Callable[[], None], *, waits: bool) -> float:
    start = costs.now(waits=waits)
    way()
    return costs.now(waits=waits) - start
