"""Running the trials of a cell: all at once, by fusing, each with its own metaparameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphsplit._fuse import FusedModule, fuse, known
from graphsplit.bundle import program_of
from graphsplit.emission import ProgramModule
from graphsplit.errors import UserError
from graphsplit.passes.sparsify import masked
from graphsplit.scaling.plan import Cell, Outcome, Plan, Settings, Trial
from graphsplit.signature import as_call
from graphsplit.train.loop import Metric, read_batch, take
from graphsplit.train.per_model import PerModelSGD

Pair = tuple[Any, Any]
"""Inputs and targets, all of a data set."""


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        model: As it is at initialisation; a module, as it goes to other processes.
        train: Inputs and targets to train on.
        held: Inputs and targets to validate on.
        loss: Of outputs and targets the mean over a batch.
        error: Of outputs and targets the mean over a batch; the goal is about it.
    """

    model: ProgramModule
    train: Pair
    held: Pair
    loss: Metric
    error: Metric


def run_trials(
    task: Task,
    masks: Mapping[str, Tensor],
    plan: Plan,
    cell: Cell,
    numbers: Sequence[int],
    best: int | None = None,
) -> list[Trial]:
    """Run some trials of a cell at once.

    All see the same batches. A model whose trial has ended goes on idly until all have.

    Args:
        task: What is learned.
        masks: Of the cell's sparsity.
        plan: Of the study.
        cell: What is tried.
        numbers: Of the trials.
        best: The fewest steps of trials of the cell that have ended before.

    Raises:
        UserError: The goal is met before the first step.
    """
    settings = [plan.settings(cell.optimizer)[number] for number in numbers]
    count = len(settings)
    model = fuse([masked(program_of(task.model), masks)] * count).train()
    optimizer = PerModelSGD(
        model,
        [one.rate for one in settings],
        momentum=[one.momentum for one in settings],
        nesterov=cell.optimizer == "nesterov",
    )
    rates = torch.tensor([one.rate for one in settings], dtype=torch.float64)
    order = _Order(task.train, cell.batch, plan.seed)
    held_inputs, held_targets, _ = read_batch(torch.device("cpu"), task.held)
    lowest = [math.inf] * count
    ended: dict[int, tuple[Outcome, int, bool]] = {}
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        for step in range(plan.budget + 1):
            if plan.is_due(step):
                errors = _each(model.eval(), held_inputs, held_targets, task.error)
                model.train()
                for place, error in enumerate(errors.tolist()):
                    if place in ended:
                        continue
                    lowest[place] = min(lowest[place], error if math.isfinite(error) else math.inf)
                    if error <= plan.goal:
                        if not step:
                            raise UserError(
                                f"the goal, an error of {plan.goal:g}, is met before the first step",
                                hint="choose a smaller error as the goal",
                            )
                        ended[place] = ("complete", step, False)
                        best = step if best is None else min(best, step)
                late = best is not None and step >= plan.patience * best
                if late or step == plan.budget:
                    for place in set(range(count)) - ended.keys():
                        ended[place] = ("not reached", step, step < plan.budget)
            if len(ended) == count:
                break
            share = torch.tensor([_share(one, step / plan.budget) for one in settings], dtype=torch.float64)
            optimizer.param_groups[0]["rate"] = rates * share
            inputs, targets = order.next()
            losses = _each(model, inputs, targets, task.loss)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            for place in (~torch.isfinite(losses.detach())).nonzero()[:, 0].tolist():
                ended.setdefault(place, ("diverged", step + 1, False))
    bests = [error if math.isfinite(error) else None for error in lowest]
    return [
        Trial(cell, number, settings[place], plan.seed, *ended[place], bests[place])
        for place, number in enumerate(numbers)
    ]


def _each(model: FusedModule, inputs: Any, targets: Any, metric: Metric) -> Tensor:
    """A number for each of the fused models."""
    args, kwargs = as_call(inputs, None)
    with torch.set_grad_enabled(model.training):
        outputs = model(*args, **kwargs)
        try:
            found: Tensor = torch.vmap(metric, (0, None), randomness="different")(outputs, targets)
        except (RuntimeError, ValueError):  # a loss of the user's that looks at values, say
            each = [
                pytree.tree_map_only(Tensor, _select(number), outputs) for number in range(known(model).k)
            ]
            found = torch.stack([metric(output, targets) for output in each])
    return found


def _select(number: int) -> Callable[[Tensor], Tensor]:
    """One model's part of a fused output."""
    return lambda tensor: tensor[number]


def _share(one: Settings, done: float) -> float:
    """What is left of the learning rate."""
    return 1 - (1 - one.end) * min(done / one.horizon, 1.0)


class _Order:
    """Batches in an order that depends on the seed alone; what is left at the end of an epoch is dropped."""

    def __init__(self, data: Pair, batch: int, seed: int) -> None:
        self.inputs, self.targets, self.size = read_batch(torch.device("cpu"), data)
        if batch > self.size:
            raise UserError(f"a batch of {batch} from {self.size} examples", hint="choose smaller batches")
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)
        self.waiting: list[Tensor] = []

    def next(self) -> tuple[Any, Any]:
        """Inputs and targets of the next batch."""
        if not self.waiting:
            order = torch.randperm(self.size, generator=self.generator)
            self.waiting = list(order[: self.size // self.batch * self.batch].split(self.batch))
        index = self.waiting.pop(0)
        inputs, targets = take((self.inputs, self.targets), index, self.size)
        return inputs, targets
