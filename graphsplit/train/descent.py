"""Do local critics point downhill? The sufficient descent of arXiv 2102.01963, section V-A.

A group follows the gradient ``g`` of its critic's loss, where backpropagation follows the gradient ``d`` of
the model's. The step makes the model's loss smaller, and training converges, as long as

    <d, g>  >=  mu |d|^2     for some mu > 0.

The largest such mu is ``<d, g> / |d|^2``: 1 for backpropagation, negative where a critic points uphill.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphsplit.errors import UserError
from graphsplit.train.local import LocalEpoch
from graphsplit.train.loop import Batches, evaluating, no_test_batch, read_batch

if TYPE_CHECKING:
    from graphsplit._local_critics import LocalCritics


class SufficientDescent:
    """The largest mu of every group, measured after each epoch: give it to ``fit`` as ``on_epoch``.

    Gradients are those of the mean over the given data, in eval mode, so that statistics stay as they are.

    Attributes:
        values: For each epoch the mu of each group but the last, for which it is 1; NaN where the model's
            gradient is zero.
        cosines: The same for the cosine between both gradients.
    """

    def __init__(self, local: LocalCritics, data: Batches) -> None:
        """Args:
        local: What is trained, in this process.
        data: Batches of inputs and targets; a part of the training data will do.
        """
        self._local = local
        self._data = data
        self.values: list[tuple[float, ...]] = []
        self.cosines: list[tuple[float, ...]] = []

    def __call__(self, record: LocalEpoch) -> None:
        """Measure, after an epoch."""
        self.measure()

    def measure(self) -> tuple[float, ...]:
        """The mu of each group now; they are added to the record.

        Raises:
            UserError: There are no data.
        """
        stages = self._local.stages
        downhill, local = (
            [[torch.zeros_like(parameter) for parameter in stage.group.parameters()] for stage in stages[:-1]]
            for _ in range(2)
        )
        examples = 0
        with ExitStack() as modes:
            for module in (module for stage in stages for module in stage.modules):
                modes.enter_context(evaluating(module))
            for batch in self._data:
                inputs, targets, size = read_batch(torch.device("cpu"), batch)
                values = self._local.flatten(inputs)
                losses = []
                for stage in stages:
                    values = stage.run(values, 0)
                    losses.append(stage.losses(stage.features(values), targets, 0).sum())
                for number, stage in enumerate(stages[:-1]):
                    _add(downhill[number], _gradients(losses[-1], stage.group))
                    _add(local[number], _gradients(losses[number], stage.group))
                examples += size
        if not examples:
            raise no_test_batch()
        products = [
            (_product(down, own), _product(down, down), _product(own, own))
            for down, own in zip(downhill, local, strict=True)
        ]
        found = tuple(cross / square if square else math.nan for cross, square, _ in products)
        self.values.append(found)
        self.cosines.append(
            tuple(cross / math.sqrt(a * b) if a and b else math.nan for cross, a, b in products)
        )
        return found

    def plot(self, path: str | Path) -> None:
        """Write a figure of mu over the epochs, a line for each group: ``.svg``, ``.png`` or ``.pdf``.

        Raises:
            UserError: Nothing has been measured, or matplotlib is not installed.
        """
        if not self.values:
            raise UserError("nothing has been measured", hint="give the check to fit as on_epoch")
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise UserError(
                "figures of training need matplotlib", hint="pip install 'graphsplit[plots]'"
            ) from None
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        epochs = range(1, len(self.values) + 1)
        for group, values in enumerate(zip(*self.values, strict=True)):
            axes.plot(epochs, values, marker=".", label=f"group {group}")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel("epoch")
        axes.set_ylabel("largest $\\mu$")
        axes.legend()
        figure.savefig(path)


def _gradients(loss: Tensor, module: torch.nn.Module) -> list[Tensor]:
    parameters = list(module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    given = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True) if trained else ()
    found = dict(zip(trained, given, strict=True))
    return [
        torch.zeros_like(parameter) if found.get(parameter) is None else found[parameter]
        for parameter in parameters
    ]


def _add(sums: list[Tensor], more: list[Tensor]) -> None:
    for total, tensor in zip(sums, more, strict=True):
        total += tensor


def _product(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
