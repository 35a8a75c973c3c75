"""`PartitionSchedule`: K sub-models for some epochs, one merge, and the full model for the rest."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree

from graphsplit.errors import UserError
from graphsplit.train.checkpoints import Checkpoints, check_same
from graphsplit.train.history import Epoch, History
from graphsplit.train.learner import learning_facts, made
from graphsplit.train.loop import Batches, Metric, SchedulerFactory, Settings, run_epochs
from graphsplit.train.processes import Watch, gather, naming_the_lost, process_group, share

if TYPE_CHECKING:
    from graphsplit._api import Partition

Mode = Literal["in_turn", "parallel"]
OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass
class Trained:
    """What a schedule leaves.

    Attributes:
        model: The full model, trained.
        optimizer: Its optimizer, to go on with.
        submodels: The sub-models as they were merged.
        history: A record for each epoch.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    submodels: list[nn.Module]
    history: History


class PartitionSchedule:
    """Pre-training by partition (arXiv 1511.02954, section 2.1).

    Each sub-model is trained by itself for ``merge_at`` epochs. Then weights, buffers and optimizer states
    are merged, and the full model is trained up to ``epochs``. Where there is a scheduler, the merged model
    goes on with the learning rate and the count of steps of sub-model 0, as in one training.

    Example::

        part = gs.partition(model, x, k=2, init="fresh")
        schedule = gs.train.PartitionSchedule(
            part, lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9),
            torch.nn.functional.cross_entropy, merge_at=5, epochs=20, error=gs.train.misclassified,
        )
        trained = schedule.fit(train_loader, test_loader)

    Those with a loop of their own need three calls: ``part.submodels``, ``part.merge(...)`` and
    ``part.plan.merge_optimizer_states(...)``; see ``examples/train_apart_then_merge.py``, and for the Trainer
    of transformers ``examples/trainer_partition.py``.

    Args:
        partition: Its sub-models, with the weights that they have now, are where training starts. They are
            copied, so that a schedule can run again.
        optimizer: Makes the optimizer of a model; called for each sub-model and for the merged one.
        loss: Of outputs and targets the mean over a batch.
        merge_at: Epochs of each sub-model, 0 to ``epochs``; 0 merges untrained sub-models.
        epochs: Of the whole schedule.
        mode: ``"in_turn"`` trains sub-models one after the other. ``"parallel"`` deals them out to the
            processes of torchrun (there may be fewer than sub-models); process 0 trains the full model, and
            all return the same. Under one seed both give the same weights.
        duplicate: Merge exactly, with cross-unit ops duplicated, or into the original architecture.
        scheduler: Makes the learning-rate scheduler of an optimizer.
        step_every_batch: Step the scheduler after every batch, not after every epoch.
        error: A second number to record, such as `misclassified`.
        device: Where models are trained; in parallel it may differ between processes.
        seed: Of the order of the data and of dropout; each sub-model has an order of its own.
        on_epoch: Called with every `Epoch`, in the process that trained it; ``print`` shows progress.

    Raises:
        UserError: ``merge_at``, ``epochs`` or ``mode`` is out of range.
    """

    def __init__(
        self,
        partition: Partition,
        optimizer: OptimizerFactory,
        loss: Metric,
        *,
        merge_at: int,
        epochs: int,
        mode: Mode = "in_turn",
        duplicate: bool = True,
        scheduler: SchedulerFactory | None = None,
        step_every_batch: bool = False,
        error: Metric | None = None,
        device: str | torch.device = "cpu",
        seed: int = 0,
        on_epoch: Callable[[Epoch], None] | None = None,
    ) -> None:
        if mode not in ("in_turn", "parallel"):
            raise UserError(f"mode is {mode!r}, expected 'in_turn' or 'parallel'")
        if not 0 <= merge_at <= epochs:
            raise UserError(
                f"merge_at is {merge_at} of {epochs} epochs",
                hint="give a number from 0 to the number of epochs",
            )
        self.partition = partition
        self.merge_at = merge_at
        self.epochs = epochs
        self.mode: Mode = mode
        self.duplicate = duplicate
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._settings = Settings(loss, error, torch.device(device), step_every_batch, seed, on_epoch)

    def fit(
        self, data: Batches, test: Batches | None = None, *, checkpoint: str | Path | None = None
    ) -> Trained:
        """Run the schedule.

        Args:
            data: Batches of ``(inputs, targets)``, iterated over once in every epoch of every model. A
                DataLoader that shuffles does so by the schedule's seed.
            test: Batches to evaluate on after every epoch; its time is not counted.
            checkpoint: A folder to save every epoch of every model in, and to go on from: a run that was
                killed ends bit-equal to one that was not.

        Raises:
            UserError: The data gives nothing, ``mode="parallel"`` without torchrun, another process is gone,
                or a checkpoint is of another training.
        """
        folder = None if checkpoint is None else Path(checkpoint)
        if self.mode == "in_turn":
            run = _Fit(self, data, test, folder)
            return run.finish(self._merge([run.train_part(part) for part in range(self.partition.k)]))
        with process_group() as (rank, world), Watch(f"process {rank}") as watch:
            who = f"process {rank}"
            run = _Fit(self, data, test, folder, watch)
            mine = {part: run.train_part(part) for part in range(rank, self.partition.k, world)}
            with naming_the_lost(who):
                states = gather(mine, self.partition.k)
            merging = self._merge(states)
            if rank == 0:
                trained = run.finish(merging)
                with naming_the_lost(who):
                    share([_to_cpu(merging.take()), trained.history.epochs])
            else:
                with naming_the_lost(who):
                    state, epochs = share(None)
                merging.put(state)
                history = History(epochs, merging.seconds)
                trained = Trained(merging.model, merging.optimizer, merging.submodels, history)
            return trained

    def _trainee(self, model: nn.Module) -> _Trainee:
        with torch.random.fork_rng():
            model = model.to(self._settings.device)
            optimizer = made("optimizer", self._optimizer, model)
            scheduler = None if self._scheduler is None else made("scheduler", self._scheduler, optimizer)
            return _Trainee(model, optimizer, scheduler, learning_facts(optimizer, scheduler))

    def _merge(self, states: list[_State]) -> _Merging:
        """The full model from the sub-models, ready to be trained on."""
        trainees = [self._trainee(copy.deepcopy(submodel)) for submodel in self.partition.submodels]
        for trainee, state in zip(trainees, states, strict=True):
            trainee.put(state.values)
        start = time.perf_counter()
        submodels = [trainee.model for trainee in trainees]
        model = self.partition.merge(submodels, duplicate=self.duplicate)
        whole = self._trainee(model)
        first = trainees[0]
        self.partition.plan.merge_optimizer_states(
            [trainee.optimizer for trainee in trainees], submodels, whole.model, whole.optimizer
        )
        _carry_on(first, whole)
        epochs = [epoch for state in states for epoch in state.epochs]
        return _Merging(
            whole.model,
            whole.optimizer,
            whole.scheduler,
            whole.facts,
            submodels,
            epochs,
            time.perf_counter() - start,
        )


class _Fit:
    """One run of a schedule on its data."""

    def __init__(
        self,
        schedule: PartitionSchedule,
        data: Batches,
        test: Batches | None,
        folder: Path | None,
        watch: Watch | None = None,
    ) -> None:
        self._schedule = schedule
        self._data = data
        self._test = test
        self._folder = folder
        self._settings = replace(schedule._settings, alive=None if watch is None else watch.check)

    def train_part(self, part: int) -> _State:
        """Train one sub-model for its epochs."""
        schedule = self._schedule
        trainee = schedule._trainee(copy.deepcopy(schedule.partition.submodels[part]))
        epochs = self._train(trainee, range(schedule.merge_at), part)
        return _State(_to_cpu(trainee.take()), epochs)

    def finish(self, merging: _Merging) -> Trained:
        """Train the full model for the rest of the epochs."""
        epochs = self._train(merging, range(self._schedule.merge_at, self._schedule.epochs), None)
        history = History([*merging.epochs, *epochs], merging.seconds)
        return Trained(merging.model, merging.optimizer, merging.submodels, history)

    def _train(self, trainee: _Trainee, numbers: range, part: int | None) -> list[Epoch]:
        """Epochs of one model, from its last checkpoint on."""
        if self._folder is None:
            return run_epochs(*trainee.parts(), self._settings, self._data, self._test, numbers, part=part)
        number = self._schedule.partition.k if part is None else part  # the full model comes last
        store = Checkpoints(self._folder, "part", "epoch", [number], lambda value: [value])
        epochs: list[Epoch] = []
        found = store.newest()
        if found is not None:
            with store.loading(found, number, self._settings.device) as state:
                check_same(state["facts"], self._facts(trainee), self._folder)
                trainee.put(state["values"])
                epochs = [Epoch(**row) for row in state["epochs"]]
            store.refuse_more(found, numbers.stop)

        def keep(epoch: Epoch) -> None:
            epochs.append(epoch)
            values = {"values": _to_cpu(trainee.take()), "epochs": [asdict(row) for row in epochs]}
            store.save(epoch.number, number, {"facts": self._facts(trainee), **values})
            if self._settings.on_epoch is not None:
                self._settings.on_epoch(epoch)

        settings = replace(self._settings, on_epoch=keep)
        left = range(numbers.start if found is None else found + 1, numbers.stop)
        run_epochs(*trainee.parts(), settings, self._data, self._test, left, part=part)
        return epochs

    def _facts(self, trainee: _Trainee) -> dict[str, Any]:
        """What the numbers depend on; the data is not known before it is read."""
        schedule = self._schedule
        return {
            "k": schedule.partition.k, "merge_at": schedule.merge_at, "duplicate": schedule.duplicate,
            "seed": self._settings.seed, "step_every_batch": self._settings.step_every_batch,
            **trainee.facts,
        }  # fmt: skip


@dataclass
class _State:
    """What a sub-model leaves: its values, on the CPU, and its records."""

    values: dict[str, Any]
    epochs: list[Epoch]


@dataclass
class _Trainee:
    """A model in training, with what goes along; ``facts`` are those of `learning_facts` at the start."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
    facts: dict[str, Any]

    def parts(self) -> tuple[nn.Module, torch.optim.Optimizer, LRScheduler | None]:
        return self.model, self.optimizer, self.scheduler

    def take(self) -> dict[str, Any]:
        """Everything that training has changed, as data."""
        buffers = {name: tensor.detach() for name, tensor in self.model.named_buffers()}
        return {
            "model": self.model.state_dict() | buffers,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }

    def put(self, values: Mapping[str, Any]) -> None:
        """Set what `take` gave."""
        named: dict[str, Tensor] = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        with torch.no_grad():
            for name, tensor in named.items():
                tensor.copy_(values["model"][name])
        self.optimizer.load_state_dict(values["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(values["scheduler"])


@dataclass
class _Merging(_Trainee):
    """The merged model."""

    submodels: list[nn.Module]
    epochs: list[Epoch]
    seconds: float


def _carry_on(first: _Trainee, whole: _Trainee) -> None:
    """The merged model's learning rate, and the scheduler's count, go on from those of a sub-model."""
    if whole.scheduler is None or first.scheduler is None:
        return
    for group, other in zip(whole.optimizer.param_groups, first.optimizer.param_groups, strict=True):
        group.update({name: value for name, value in other.items() if name != "params"})
    whole.scheduler.load_state_dict(first.scheduler.state_dict())


def _to_cpu(values: Any) -> Any:
    """A copy on the CPU that nobody else changes."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu().clone(), values)
