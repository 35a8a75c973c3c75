"""The loop of local critic training: batches, epochs, tests, checkpoints, in one process or several."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphsplit.errors import UserError
from graphsplit.program import TensorMeta
from graphsplit.train.checkpoints import Checkpoints, check_same
from graphsplit.train.learner import Learner
from graphsplit.train.local_processes import Chain
from graphsplit.train.loop import (
    Batches,
    Metric,
    evaluating,
    no_batch,
    no_test_batch,
    read_batch,
    seed_epoch,
)
from graphsplit.train.losses import PerSample, checked
from graphsplit.train.methods import LocalCriticTraining, Method, method_of
from graphsplit.train.processes import process_group
from graphsplit.train.stage import Recipe, Stage, diverged


@dataclass(frozen=True)
class LocalLosses:
    """Losses of one batch.

    Attributes:
        groups: Mean loss of each group, by its critic; of the model for the last. ``[n + 1]``
        critics: Mean difference of each critic to what it estimates. ``[n]``
    """

    groups: Tensor
    critics: Tensor

    @property
    def loss(self) -> float:
        """Loss of the model."""
        return float(self.groups[-1])


@dataclass(frozen=True)
class LocalEpoch:
    """One pass over the data; means over the training examples, in train mode, while they were learned.

    Attributes:
        number: From 0.
        losses: Of each sub-model; the last is the model.
        critic_losses: Mean difference of each critic to what it estimates.
        test_losses: Of each sub-model on the test data, in eval mode; empty without test data.
        test_errors: The same for the error; empty without one.
        seconds: Wall time of training, without the test.
        examples: Training examples seen.
        bytes_down: Handed on between processes; 0 where there is one.
        bytes_up: Losses that went back.
    """

    number: int
    losses: tuple[float, ...]
    critic_losses: tuple[float, ...]
    test_losses: tuple[float, ...] = ()
    test_errors: tuple[float, ...] = ()
    seconds: float = 0.0
    examples: int = 0
    bytes_down: int = 0
    bytes_up: int = 0

    def __str__(self) -> str:
        def row(values: Sequence[float], form: str) -> str:
            return " ".join(format(value, form) for value in values)

        text = f"epoch {self.number + 1}: losses {row(self.losses, '.4f')}"
        if self.test_losses:
            text += f", test {row(self.test_losses, '.4f')}"
        if self.test_errors:
            text += f", errors {row(self.test_errors, '.2%')}"
        return text


@dataclass
class Watch:
    """Says when training collapses: a group that does worse than guessing, or ever worse than it did."""

    best: list[float] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)

    def look(self, losses: Sequence[float]) -> None:
        """Take in the losses of an epoch, and warn of a group that has been above its first for three."""
        if not self.best:
            self.best, self.bad = list(losses), [0] * len(losses)
            return
        for group, loss in enumerate(losses):
            self.bad[group] = self.bad[group] + 1 if loss > 1.2 * self.best[group] + 1e-3 else 0
            self.best[group] = min(self.best[group], loss)
            if self.bad[group] == 3:
                warnings.warn(
                    f"training collapses: the loss of group {group} has been above its best of "
                    f"{self.best[group]:.4g} for three epochs; lower the learning rate of its critic and its "
                    "own, clip gradients, or cut into fewer groups",
                    stacklevel=3,
                )


class InTurn:
    """All stages in this process, one after the other."""

    def __init__(self, stages: Sequence[Stage], method: Method) -> None:
        self.mine = stages
        self._method = method

    def train(self, values: Sequence[Any], targets: Any, step: int) -> Tensor:
        """Train on a batch."""
        return self._method.train(self.mine, values, targets, step)

    def finish(self) -> Tensor:
        """Nothing is open."""
        return torch.zeros(2, len(self.mine), dtype=torch.float64)

    def evaluate(self, values: Sequence[Any]) -> list[tuple[int, Tensor]]:
        """Scores of every sub-model."""
        found = []
        for stage in self.mine:
            values = stage.group.run_flat([value.to(stage.device) for value in values])
            found.append((stage.number, stage.scores(values)))
        return found

    def total(self, sums: Tensor) -> Tensor:
        """There is one process."""
        return sums

    def traffic(self) -> tuple[int, int]:
        """Nothing goes between processes."""
        return 0, 0

    def gather(self, value: Any) -> list[Any]:
        """The value of the one process."""
        return [value]

    def spread(self, stages: Sequence[Stage]) -> None:
        """The one process has all weights."""


Flatten = Callable[[Any], Sequence[Any]]
"""Of the inputs of a batch the values of the model's inputs, in order."""


class LocalTraining:
    """Trains stages, by local critics or by another method.

    Attributes:
        stages: Each group with its critic.
        steps: Batches seen so far.
        recipe: How they are trained.
    """

    def __init__(
        self, stages: Sequence[Stage], flatten: Flatten, loss: PerSample, output: TensorMeta, seed: int
    ) -> None:
        self.stages = list(stages)
        self.steps = 0
        self._output = output
        self._flatten = flatten
        self._loss = loss
        self._seed = seed
        self.recipe = Recipe()
        self._method = method_of(self.recipe.method)

    def configure(self, recipe: Recipe) -> None:
        """Choose optimizers, schedules, precision and clipping; states of earlier ones are dropped."""
        method = method_of(recipe.method)
        if recipe.amp == torch.float16 and not isinstance(method, LocalCriticTraining):
            raise UserError(
                f"{type(method).__name__} has no scaling of losses, which float16 needs",
                hint="give amp=torch.bfloat16",
            )
        method.prepare(self.stages, self._output)
        self.recipe = recipe
        self._method = method
        for stage in self.stages:
            stage.configure(recipe)

    def step(self, inputs: Any, targets: Any, *, update: bool = True) -> LocalLosses:
        """One batch: gradients, and updates where they are wanted."""
        if update:
            self._configured()
        learn = self._method.train if update else self._method.gradients
        found = learn(self.stages, self._flatten(inputs), targets, self.steps)
        self.steps += 1
        return LocalLosses(found[0], found[1, :-1])

    def fit(
        self,
        data: Batches,
        epochs: int,
        *,
        test: Batches | None,
        error: Metric | None,
        parallel: bool,
        queue: int,
        checkpoint: Path | None,
        on_epoch: Callable[[LocalEpoch], None] | None,
    ) -> list[LocalEpoch]:
        """Epochs of training, with a record of each."""
        self._configured()
        watch = Watch()
        records = []
        with self._runner(parallel, queue) as runner:
            store = None if checkpoint is None else _store(checkpoint, runner)
            start = 0 if store is None else self._resume(store, runner.mine, epochs)
            for number in range(start, epochs):
                with torch.random.fork_rng():
                    seed_epoch(self._seed, None, number, data)
                    record = self._epoch(runner, data, number)
                watch.look(record.losses)
                if test is not None:
                    losses, errors = self.evaluate(test, error, runner)
                    record = replace(record, test_losses=losses, test_errors=errors)
                if store is not None:
                    for stage in runner.mine:
                        state = {"steps": self.steps, "learners": _state(stage), "facts": self._facts(stage)}
                        store.save(number, stage.number, state)
                records.append(record)
                if on_epoch is not None and runner.mine[0].number == 0:
                    on_epoch(record)
            runner.spread(self.stages)
        return records

    def _configured(self) -> None:
        if not self.stages[0].learners:
            self.configure(self.recipe)

    @contextmanager
    def _runner(self, parallel: bool, queue: int) -> Iterator[InTurn | Chain]:
        if not parallel:
            yield InTurn(self.stages, self._method)
            return
        if self._method.waits:
            raise UserError(
                f"{type(self._method).__name__} trains in one process, as groups need what those behind give",
                hint="train by local critics, or leave out parallel",
            )
        with process_group() as (rank, size):
            if size != len(self.stages):
                raise UserError(
                    f"{size} processes for {len(self.stages)} groups",
                    hint=f"start the script with torchrun --nproc-per-node={len(self.stages)}",
                )
            yield Chain(self.stages[rank], size, queue)

    def _epoch(self, runner: InTurn | Chain, data: Batches, number: int) -> LocalEpoch:
        for stage in runner.mine:
            stage.train()
        sums = torch.zeros(2, len(self.stages), dtype=torch.float64)
        examples = batches = 0
        start = time.perf_counter()
        for batch in data:
            inputs, targets, size = read_batch(torch.device("cpu"), batch)
            sums += runner.train(self._flatten(inputs), targets, self.steps).cpu()
            examples, batches, self.steps = examples + size, batches + 1, self.steps + 1
            self._schedule(runner, every_batch=True)
        sums += runner.finish()
        if not examples:
            raise no_batch()
        seconds = time.perf_counter() - start
        self._schedule(runner, every_batch=False)
        means = runner.total(sums) / batches
        losses = tuple(means[0].tolist())
        for group, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise diverged(group)
        down, up = runner.traffic()
        return LocalEpoch(
            number, losses, tuple(means[1, :-1].tolist()), seconds=seconds, examples=examples,
            bytes_down=down, bytes_up=up,
        )  # fmt: skip

    def _schedule(self, runner: InTurn | Chain, *, every_batch: bool) -> None:
        if self.recipe.step_every_batch == every_batch:
            for learner in _learners(runner.mine):
                if learner.scheduler is not None:
                    learner.scheduler.step()

    def evaluate(
        self, data: Batches, error: Metric | None, runner: InTurn | Chain | None = None
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Loss, and error where one is given, of every sub-model; one pass over the data."""
        runner = runner or InTurn(self.stages, self._method)
        sums = torch.zeros(2, len(self.stages), dtype=torch.float64)
        examples = 0
        with torch.no_grad(), ExitStack() as modes:
            for module in (module for stage in runner.mine for module in stage.modules):
                modes.enter_context(evaluating(module))
            for batch in data:
                inputs, targets, size = read_batch(torch.device("cpu"), batch)
                for number, scores in runner.evaluate(self._flatten(inputs)):
                    own = targets.to(scores.device) if isinstance(targets, Tensor) else targets
                    sums[0, number] += size * checked(self._loss, scores, own).double().mean().cpu()
                    if error is not None:
                        sums[1, number] += size * error(scores, own).double().cpu()
                examples += size
        if not examples:
            raise no_test_batch()
        losses, errors = (tuple(row.tolist()) for row in runner.total(sums) / examples)
        return losses, errors if error is not None else ()

    def state_dict(self) -> dict[str, Any]:
        """Everything that training needs to go on: modules, optimizers, schedules, number of steps."""
        self._configured()
        return {"steps": self.steps, "stages": [_state(stage) for stage in self.stages]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, under the same recipe."""
        self._configured()
        if len(state["stages"]) != len(self.stages):
            raise UserError(f"a state of {len(state['stages'])} groups for {len(self.stages)}")
        self.steps = int(state["steps"])
        for stage, own in zip(self.stages, state["stages"], strict=True):
            _load(stage, own)

    def _facts(self, stage: Stage) -> dict[str, Any]:
        """What the numbers of a stage depend on, the data left aside."""
        names = {id(stage.group): "", id(stage.critic): "critic's "}
        facts = {
            names.get(id(learner.module), "helper's ") + fact: value
            for learner in stage.learners
            for fact, value in learner.facts.items()
        }
        recipe = self.recipe
        return facts | {
            "method": type(self._method).__name__, "seed": self._seed, "clip": recipe.clip,
            "amp": str(recipe.amp), "step_every_batch": recipe.step_every_batch,
        }  # fmt: skip

    def _resume(self, store: Checkpoints, mine: Sequence[Stage], epochs: int) -> int:
        """Load the newest epoch that every stage has; the number of the epoch to go on with."""
        found = store.newest()
        if found is None:
            store.refuse_gaps()
            return 0
        for stage in mine:
            with store.loading(found, stage.number, stage.device) as state:
                check_same(state["facts"], self._facts(stage), store.folder)
                self.steps = int(state["steps"])
                _load(stage, state["learners"])
        store.refuse_more(found, epochs)
        return found + 1


def _store(folder: Path, runner: InTurn | Chain) -> Checkpoints:
    return Checkpoints(folder, "stage", "epoch", [stage.number for stage in runner.mine], runner.gather)


def _learners(stages: Sequence[Stage]) -> list[Learner]:
    return [learner for stage in stages for learner in stage.learners]


def _state(stage: Stage) -> list[dict[str, Any]]:
    return [learner.state_dict() for learner in stage.learners]


def _load(stage: Stage, state: Sequence[dict[str, Any]]) -> None:
    for learner, own in zip(stage.learners, state, strict=True):
        learner.load_state_dict(own)
