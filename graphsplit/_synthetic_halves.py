"""The public face of training parts by synthetic intermediate labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from graphsplit import costs
from graphsplit._layer_groups import LayerGroups, layer_groups
from graphsplit.bundle import DepthBundle
from graphsplit.depth.plan import Tied
from graphsplit.drawing import snippet
from graphsplit.drawing.division import Division
from graphsplit.emission import ProgramModule
from graphsplit.errors import PartitionError, UserError
from graphsplit.graphs import base_name
from graphsplit.memory import Optimizer, training_memory
from graphsplit.program import Program, TensorMeta
from graphsplit.train.history import Epoch
from graphsplit.train.learner import OptimizerFactory, adam
from graphsplit.train.loop import Batches, Metric, evaluate, fit
from graphsplit.train.synthetic import Labels, Relabelled, draw_points

NONNEGATIVE = {"relu", "relu6", "sigmoid", "softplus", "softmax", "square", "abs", "exp"}
"""Ops that give no negative number."""
PASSING = {
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "flatten", "view", "reshape", "dropout", "feature_dropout",
    "permute", "transpose", "contiguous", "squeeze", "unsqueeze",
}  # fmt: skip
"""Ops that give none where they are given none."""


@dataclass(frozen=True)
class PartCost:
    """What a part takes, against the whole model.

    Attributes:
        memory: Bytes of a training step, with the batch of the example.
        flops: Of a forward pass, with the batch of the example.
        parameters: Number of scalars.
    """

    memory: int
    flops: int
    parameters: int


class SyntheticHalves:
    """Parts of a model that train apart on synthetic labels, and are joined. Made by `synthetic_halves`.

    The first part learns to give a point for each class, by squared error; the last one learns the true
    classes from points with noise; one in between learns from points to points. No part sees another one.

    Attributes:
        groups: The parts.
        labels: How points are drawn.
        points: For each cut a point for each class. ``[classes, ...]``
    """

    def __init__(self, groups: LayerGroups, labels: Labels) -> None:
        self.groups = groups
        self.labels = labels
        self.nonnegative = tuple(_is_nonnegative(groups, cut) for cut in range(groups.n - 1))
        self.points: tuple[Tensor, ...] = tuple(
            draw_points(
                labels, _features(frontier, cut).shape[1:], cut, nonnegative=self.nonnegative[cut]
            ).to(frontier[0].dtype)
            for cut, frontier in enumerate(groups.frontiers)
        )

    def to_bundle(self) -> DepthBundle:
        """The parts as they are now, to be saved."""
        return replace(self.groups.to_bundle(), options={"labels": asdict(self.labels)})

    @classmethod
    def from_bundle(cls, found: DepthBundle) -> SyntheticHalves:
        """What a bundle holds."""
        return cls(LayerGroups.from_bundle(found), Labels(**found.options["labels"]))

    def drawn(self) -> tuple[Program, Division]:
        """What a figure shows."""
        return self.groups.drawn()

    def _repr_html_(self) -> str:
        """A small figure, for notebooks."""
        return snippet(*self.drawn())

    @property
    def parts(self) -> list[ProgramModule]:
        """The parts as modules."""
        return self.groups.modules

    def data_of(self, part: int, data: Batches) -> Batches:
        """Batches to train a part with, for a loop of one's own."""
        return Relabelled(
            data,
            given=self.points[part - 1] if part else None,
            wanted=self.points[part] if part < self.groups.n - 1 else None,
            noise=self.labels.noise,
            nonnegative=bool(part) and self.nonnegative[part - 1],
        )

    def fit_part(
        self,
        part: int,
        data: Batches,
        epochs: int,
        *,
        loss: Metric = F.cross_entropy,
        optimizer: OptimizerFactory = adam,
        device: str | torch.device = "cpu",
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> list[Epoch]:
        """Train one part by itself.

        Args:
            part: Its number.
            data: Batches of inputs and classes; parts but the first look at the classes alone.
            epochs: How many.
            loss: Of the last part.
            optimizer: Makes the optimizer of the part.
            device: Where batches are sent, and where the part is.
            on_epoch: Called with the record of every epoch.
        """
        module = self.parts[part]
        metric = loss if part == self.groups.n - 1 else F.mse_loss
        return fit(
            module, optimizer(module), metric, self.data_of(part, data), epochs,
            device=device, seed=self.labels.seed, on_epoch=on_epoch,
        )  # fmt: skip

    def fit(
        self,
        data: Batches,
        epochs: int,
        *,
        recovery: int = 0,
        test: Batches | None = None,
        loss: Metric = F.cross_entropy,
        error: Metric | None = None,
        optimizer: OptimizerFactory = adam,
        device: str | torch.device = "cpu",
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> Joined:
        """Train every part, join them, and train the whole for some recovery epochs.

        Returns:
            The joined model, with its test loss and error before and after recovery.
        """
        for part in range(self.groups.n):
            self.fit_part(
                part, data, epochs, loss=loss, optimizer=optimizer, device=device, on_epoch=on_epoch
            )
        model = self.join().to(device)
        before = None if test is None else evaluate(model, loss, test, error=error, device=device)
        records = []
        if recovery:
            records = fit(
                model, optimizer(model), loss, data, recovery, test=test, error=error, device=device,
                seed=self.labels.seed, on_epoch=on_epoch,
            )  # fmt: skip
        return Joined(model, before, records)

    def join(self) -> ProgramModule:
        """The whole model, with the weights that the parts have now."""
        return self.groups.recompose()

    def costs(self, optimizer: Optimizer = "adam") -> tuple[PartCost, ...]:
        """What each part takes to train; the last row is the whole model."""
        programs: list[Program] = [*self.groups.programs, self.groups.program]
        return tuple(
            PartCost(
                training_memory(program, optimizer).total,
                costs.graph_flops(program.graph("train")),
                program.parameter_count(),
            )
            for program in programs
        )

    def __repr__(self) -> str:
        groups = ", ".join(f"{group.parameters:,}" for group in self.groups.plan.groups)
        return f"SyntheticHalves of {self.groups.program.name}: {self.groups.n} parts of {groups} parameters"


@dataclass(frozen=True)
class Joined:
    """What is left of training parts.

    Attributes:
        model: The joined model.
        before: Its test loss and error before recovery; None without test data.
        recovery: The records of the recovery epochs.
    """

    model: ProgramModule
    before: tuple[float, float | None] | None
    recovery: Sequence[Epoch]


def synthetic_halves(
    model: nn.Module | Program,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    at: str | Sequence[str] | None = None,
    labels: Labels | int,
    n: int | None = None,
    tied: Tied = "refuse",
    outputs: Sequence[str] | None = None,
) -> SyntheticHalves:
    """Cut a model into parts that train apart on synthetic labels (Karadag & Topaloglu, arXiv 2403.11204).

    Args:
        model: The user's module, which is not changed, or a traced `Program`.
        args: Example inputs: a tensor, a tuple by position or a dict by keyword.
        kwargs: Further example inputs by keyword.
        at: Path, or paths, of the modules at whose start a part begins; by default parts of equal memory.
        labels: How labels are drawn, or just the number of classes.
        n: Number of parts where ``at`` is not given, 2 by default.
        tied: See `layer_groups`.
        outputs: Names of the outputs to keep, as for `trace`.

    Raises:
        PartitionError: The model cannot be cut so, or several tensors cross a cut.
        TraceError, UnsupportedError, InputError: The model cannot be traced.
    """
    places = [at] if isinstance(at, str) else at
    groups = layer_groups(model, args, kwargs, n=n, at=places, balance="memory", tied=tied, outputs=outputs)
    if isinstance(labels, bool) or not isinstance(labels, (int, Labels)):
        raise UserError(f"labels is {labels!r}", hint="give a number of classes, or Labels")
    return SyntheticHalves(groups, Labels(labels) if isinstance(labels, int) else labels)


def _features(frontier: Sequence[TensorMeta], cut: int) -> TensorMeta:
    """The one tensor that crosses a cut, of fixed sizes but for the batch, which comes first."""
    crossing = ", ".join(map(str, frontier))
    if len(frontier) != 1 or not frontier[0].dtype.is_floating_point:
        raise PartitionError(
            f"{crossing} cross cut {cut}, and labels stand in for one tensor of numbers",
            hint="cut where nothing skips over the cut",
        )
    (features,) = frontier
    if features.ndim < 2 or any(dim.symbol is not None for dim in features.dims[1:]):
        raise PartitionError(
            f"{crossing} crosses cut {cut}, and labels need fixed sizes behind the batch",
            hint="cut elsewhere",
        )
    return features


def _is_nonnegative(groups: LayerGroups, cut: int) -> bool:
    """True where what crosses a cut comes out of an op that gives no negative number."""
    node: fx.Node | None = groups.cuts.crossing(0, cut)[0]
    while node is not None and node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        if base_name(node) in NONNEGATIVE:
            return True
        first = node.args[0] if node.args and base_name(node) in PASSING else None
        node = first if isinstance(first, fx.Node) else None
    return False
