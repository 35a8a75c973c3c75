"""Rounds of replicas that train apart: what one run of an `EnsembleCompression` does, and what it leaves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from graphsplit.answers import Answers
from graphsplit.ensembles import Ensemble, InTurn, LeastSquares, averaged, combined, margin_weights
from graphsplit.errors import UserError
from graphsplit.train.checkpoints import Checkpoints, check_same
from graphsplit.train.digests import digest
from graphsplit.train.exchange import Apart, Together, mean_buffers
from graphsplit.train.loop import Batches, Metric, evaluate
from graphsplit.train.panel import DistantPanel, Panel
from graphsplit.train.replicas import Labels, Replica, Task, tensors_of
from graphsplit.train.sharding import ShardSampler
from graphsplit.train.trial import Trial, try_step

if TYPE_CHECKING:
    from graphsplit.train.ensembles import EnsembleCompression


DIVERSITY = 0.1
"""lambda of eq. 9, unless given; where answers are values, 0."""


@dataclass(frozen=True)
class Round:
    """One round of all workers.

    Attributes:
        number: From 0.
        steps: Steps that each worker has taken at the aggregation, which comes before compression.
        losses: Mean training loss of each worker in its local training.
        compression_losses: The same on true targets while it was compressed; empty without compression.
        local_losses: Of each replica on the test data at the aggregation; empty without test data.
        local_errors: The same for the error; empty without one.
        test_loss: Of the global model; None without test data.
        test_error: The same for the error.
        weights: Of the replicas in the global model.
        left_out: Workers that were left out, as they diverged.
        seconds: Wall time of each worker: local training, answers, compression; without tests.
        bytes: Between all workers together, without those of tests with predictions.
        communication_seconds: Of the first process; 0 in one process.
        learning_rate: Of the first worker, at the end.
    """

    number: int
    steps: int
    losses: tuple[float, ...]
    compression_losses: tuple[float, ...] = ()
    local_losses: tuple[float, ...] = ()
    local_errors: tuple[float, ...] = ()
    test_loss: float | None = None
    test_error: float | None = None
    weights: tuple[float, ...] = ()
    left_out: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    bytes: int = 0
    communication_seconds: float = 0.0
    learning_rate: float = 0.0

    @property
    def improvement(self) -> float | None:
        """Mean error of the replicas less that of the global model (eq. 11); None without errors."""
        if not self.local_errors or self.test_error is None:
            return None
        return sum(self.local_errors) / len(self.local_errors) - self.test_error

    def numbers(self) -> dict[str, Any]:
        """All of it, with a place for every worker, for logs: a 1 says who was left out, and has no test."""
        tested = [worker for worker in range(len(self.losses)) if worker not in self.left_out]

        def placed(values: Sequence[float]) -> tuple[float | None, ...]:
            found = dict(zip(tested, values, strict=True)) if values else {}
            return tuple(found.get(worker) for worker in range(len(self.losses))) if found else ()

        return vars(self) | {
            "local_losses": placed(self.local_losses),
            "local_errors": placed(self.local_errors),
            "left_out": tuple(int(worker in self.left_out) for worker in range(len(self.losses))),
        }

    def __str__(self) -> str:
        text = f"round {self.number + 1}, step {self.steps}: loss {_mean(self.losses):.4f}"
        if self.test_loss is not None:
            text += f", test loss {self.test_loss:.4f} (replicas {_mean(self.local_losses):.4f})"
        if self.test_error is not None:
            text += f", test error {self.test_error:.2%} (replicas {_mean(self.local_errors):.2%})"
        if self.left_out:
            text += f", without workers {', '.join(map(str, self.left_out))}"
        return text


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


@dataclass
class EnsembleTrained:
    """What training leaves, the same in every process.

    Attributes:
        global_model: G. By ``"ec"`` and ``"e"`` the last `Ensemble`; by ``"ma"`` the mean of the last
            replicas; by ``"s"`` the model.
        local_model: L: of the last round the replica of the smallest training loss, by ``"ec"`` after it was
            compressed.
        members: The replicas at the last aggregation, without those left out; give them to `gs.ensemble` with
            example inputs to fuse, verify and export them.
        rounds: A record for each round.
    """

    global_model: nn.Module
    local_model: nn.Module
    members: list[nn.Module]
    rounds: list[Round]


class Run:
    """One run of an `EnsembleCompression`."""

    def __init__(
        self,
        settings: EnsembleCompression,
        workers: Together,
        task: Task,
        shards: Sequence[Sequence[int]],
        test: Batches | None,
        error: Metric | None,
        on_round: Callable[[Round], None] | None,
    ) -> None:
        self.settings = settings
        self.workers = workers
        self.task = task
        self.test = test
        self.error = error
        self.on_round = on_round
        self.shards = shards
        _check_settings(workers, settings)
        _check_alike(workers)
        self.diversity = self._given_diversity
        self._digest = task.examples.digest()
        dealt = digest([self._digest, *(torch.tensor(shard) for shard in shards)])
        _check_given(workers, {"examples or shards": dealt, "parameters at the start": workers.start})
        self._check_schedule()
        self.panel = (
            DistantPanel(workers, task, settings.average)
            if isinstance(workers, Apart) and settings.exchange == "predictions"
            else Panel(workers, task, settings.average, settings.exchange)
        )
        self.rounds: list[Round] = []

    @property
    def k(self) -> int:
        """Number of workers."""
        return self.workers.k

    @property
    def _given_diversity(self) -> float:
        """lambda of eq. 9 by the settings."""
        given = self.settings.diversity
        return DIVERSITY if given is None else given

    def run(self, checkpoint: str | Path | None) -> EnsembleTrained:
        """All rounds, from the newest that the folder has."""
        store = None if checkpoint is None else self._store(Path(checkpoint))
        start = 0 if store is None else self._resume(store)
        if start < self.settings.rounds:
            self._look()
        if self.settings.method in ("ec", "e"):
            self._try(warn=not start and self.workers.leads)
        for number in range(start, self.settings.rounds):
            if self._is_late():
                break
            self.rounds.append(self._round(number))
            if store is not None:
                self._save(store, number)
            if self.on_round is not None and self.workers.leads:
                self.on_round(self.rounds[-1])
        return self._trained()

    def _check_schedule(self) -> None:
        """Refuse a schedule that ends before training does.

        Raises:
            UserError: It does, and would raise there.
        """
        settings = self.settings
        steps = settings.rounds * (settings.tau if settings.step_every_batch else 1)
        for replica in self.workers.mine:
            schedule = replica.learner.scheduler
            if isinstance(schedule, OneCycleLR) and schedule.total_steps < steps:
                raise UserError(
                    f"OneCycleLR has {schedule.total_steps} steps, and training takes {steps}",
                    hint="a schedule makes a step after every round; with step_every_batch after every batch",
                )

    # A round

    def _round(self, number: int) -> Round:
        settings, workers = self.settings, self.workers
        for replica in workers.mine:
            replica.seconds = 0.0
        losses = self._local(number)
        for replica in workers.mine:
            replica.grow()
        left_out = self._lost(losses, number)
        weights = self._aggregate(number, left_out)
        record = self._tested(number, losses, weights, left_out)
        best = _smallest(losses, [worker for worker in range(self.k) if worker not in left_out])
        self._restart(left_out, best)
        compressed: list[float] = []
        if settings.compression_steps:
            compressed = self._compress(number, weights, left_out)
            self._restart(self._lost(compressed, number), best)
        for replica in workers.mine:
            if replica.learner.scheduler is not None and not settings.step_every_batch:
                replica.learner.scheduler.step()
        seconds = workers.gather({replica.number: replica.seconds for replica in workers.mine})
        sent, waited = workers.counter.take()
        optimizer = workers.mine[0].learner.optimizer
        return Round(
            **record,
            compression_losses=tuple(compressed),
            seconds=tuple(seconds),
            bytes=sent,
            communication_seconds=waited,
            learning_rate=float(optimizer.param_groups[0]["lr"]) if optimizer is not None else 0.0,
        )

    def _local(self, number: int) -> list[float]:
        """Local training of every worker; the mean losses."""
        settings, workers = self.settings, self.workers
        count = settings.tau - settings.compression_steps
        first = number * count
        means = self._mean_answers(number, first, count)
        warm = min(max(settings.warmup - first, 0), count) if settings.method == "ma" else 0
        spans = [(first + step, 1) for step in range(warm)] + [(first + warm, count - warm)]
        sums = dict.fromkeys((replica.number for replica in workers.mine), 0.0)
        for start, steps in spans:
            for replica in workers.mine:
                found = replica.train(start, steps, self.diversity, means.get(replica.number))
                sums[replica.number] += found * steps
            if start < first + warm:
                workers.average()
        return workers.gather({worker: total / max(count, 1) for worker, total in sums.items()})

    def _mean_answers(self, number: int, first: int, count: int) -> dict[int, Labels]:
        """Mean answers of the latest compressed replicas on what local training is about to see (eq. 9)."""
        settings, workers = self.settings, self.workers
        if settings.method != "ec" or not self.diversity or not number:
            return {}
        self.panel.seat({replica.number: tensors_of(replica.model) for replica in workers.mine})
        weights = torch.full((self.k,), 1 / self.k, dtype=torch.float64)

        def batches(worker: int) -> ShardSampler:
            return self.task.local(worker, self.shards[worker], first, count)

        return self.panel.answers(batches, weights, range(self.k), "simple")

    def _lost(self, losses: Sequence[float], number: int) -> tuple[int, ...]:
        """Workers that diverged.

        Raises:
            UserError: There is one, and the user wants to stop, or there is none left.
        """
        finite = self.workers.gather({replica.number: replica.is_finite() for replica in self.workers.mine})
        lost = tuple(
            worker
            for worker, (loss, good) in enumerate(zip(losses, finite, strict=True))
            if not good or not math.isfinite(loss)
        )
        if lost and (self.settings.on_nan == "stop" or len(lost) == self.k):
            raise UserError(
                f"worker {lost[0]} diverged in round {number + 1}: its loss, parameters or buffers "
                "are not finite",
                hint="lower its learning rate, clip gradients, or give on_nan='leave_out'",
            )
        return lost

    def _restart(self, lost: Sequence[int], best: int) -> None:
        """Let workers that diverged go on from the best replica of the team; by averaging, from the mean."""
        if not lost:
            return
        start = None if self.settings.method == "ma" else self.panel.tensors(best)
        for replica in self.workers.mine:
            if replica.number in lost:
                replica.restart(start or tensors_of(replica.model))

    def _aggregate(self, number: int, left_out: Sequence[int]) -> Tensor:
        """Make the global model of the replicas: the team in its place; returns the weights."""
        settings, workers = self.settings, self.workers
        grown = {replica.number: replica.grown for replica in workers.mine}
        if settings.method == "ma" and not left_out:
            workers.average()
            if self.test is not None or number == settings.rounds - 1:
                with workers.counter.pausing():
                    self.panel.seat(grown)
            return torch.full((self.k,), 1 / self.k, dtype=torch.float64)
        self.panel.seat(grown)
        kept = [worker for worker in range(self.k) if worker not in left_out]
        if settings.method == "ma":
            team = [self.panel.models[worker] for worker in kept]
            for replica in workers.mine:
                _put_mean(team, replica.model)
                if replica.number in left_out:
                    mean_buffers(team, replica.model)
        weights = torch.zeros(self.k, dtype=torch.float64)
        weights[kept] = 1 / len(kept)
        if settings.weights == "regression" and settings.method in ("ec", "e"):
            weights[kept] = self._regression(number, kept)
        return weights

    def _regression(self, number: int, kept: Sequence[int]) -> Tensor:
        """Weights by least squares over the relabelled examples of all workers."""
        found = self.panel.least_squares(partial(self._relabelled, number), kept)
        sums = self.workers.gather({n: (own.products, own.moments) for n, own in found.items()})
        together = LeastSquares(len(kept), self.settings.average, self.task.answers)
        for products, moments in sums:
            together.products += products
            together.moments += moments
        return together.weights()

    def _relabelled(self, number: int, worker: int) -> ShardSampler:
        steps = self.settings.compression_steps or round(self.settings.p * self.settings.tau)
        return self.task.relabelled(worker, self.shards[worker], number, self.settings.mu, max(steps, 1))

    def _compress(self, number: int, weights: Tensor, left_out: Sequence[int]) -> list[float]:
        """Distil the ensemble into every replica; the mean losses on true targets."""
        settings = self.settings
        kept = [worker for worker in range(self.k) if worker not in left_out]
        batches = partial(self._relabelled, number)
        labels = self.panel.answers(batches, weights, kept, settings.weights)
        found = {
            replica.number: replica.compress(
                batches(replica.number), number, settings.alpha, settings.beta, labels[replica.number]
            )
            for replica in self.workers.mine
        }
        return self.workers.gather(found)

    # Tests

    def _tested(
        self, number: int, losses: Sequence[float], weights: Tensor, left_out: tuple[int, ...]
    ) -> dict[str, Any]:
        """What is known of a round at its aggregation, by the names of `Round`."""
        settings = self.settings
        record: dict[str, Any] = {
            "number": number, "steps": (number + 1) * settings.tau - settings.compression_steps,
            "losses": tuple(losses),
            "weights": tuple(weights.tolist()), "left_out": left_out,
        }  # fmt: skip
        if self.test is None:
            return record
        kept = [worker for worker in range(self.k) if worker not in left_out]
        whole = self._global(weights, kept, self.panel.body(kept))
        locals_, (loss, error) = self.panel.measured(self._evaluate, whole, kept, self.test)
        record["local_losses"] = tuple(loss for loss, _ in locals_)
        record["test_loss"], record["test_error"] = loss, error
        if self.error is not None:
            record["local_errors"] = tuple(error for _, error in locals_)
        return record

    def _evaluate(self, model: nn.Module, test: Batches) -> tuple[float, float | None]:
        return evaluate(model, self.task.loss, test, error=self.error, device=self.task.device)

    def _global(self, weights: Tensor, kept: Sequence[int], body: nn.Module) -> nn.Module:
        """The global model, of the models of the panel, or of what ``body`` gives."""
        settings = self.settings
        if settings.method == "s":
            return self.panel.models[0]
        if settings.method == "ma":
            team = [self.panel.models[worker] for worker in kept]
            whole = copy.deepcopy(team[0])
            _put_mean(team, whole)
            mean_buffers(team, whole)
            return whole
        own = weights[list(kept)].to(self.task.device)
        return Ensemble(body, own, settings.weights, settings.average, self.task.answers)

    def _look(self) -> None:
        """Try one step on a copy, with the smallest batch that comes, before training."""
        settings = self.settings
        replica = min(self.workers.mine, key=lambda replica: len(replica.shard))
        batches = [next(iter(self.task.local(replica.number, replica.shard, 0, 1)))]
        if settings.compression_steps:
            batches.append(next(iter(self._relabelled(0, replica.number))))
        try_step(replica, min(batches, key=len), settings, answers=settings.method == "ec")

    def _try(self, *, warn: bool) -> None:
        """Settle what outputs are by a first batch, which has to give what this training needs."""
        settings, task, replica = self.settings, self.task, self.workers.mine[0]
        with torch.random.fork_rng():
            batches = task.local(replica.number, replica.shard, 0, 1)
            _, inputs, targets = next(task.examples.read(batches, task.device))
            trial = Trial.of(task, replica.model, inputs, targets)
        simple = settings.weights == "simple" and settings.average == "outputs"
        if settings.method == "ec" or not simple:
            trial = trial.decided()
        if settings.compression_steps and settings.beta and settings.answers is None:
            trial.check_bounded()
        if not simple:
            self._weighted(trial)
        if warn:
            trial.warn()
        self._settle(trial.answers)

    def _weighted(self, trial: Trial) -> None:
        """Try weights and average on one member, so that they are not refused after a round."""
        settings, outputs = self.settings, trial.main[None]
        weights = torch.ones(1)
        if settings.weights == "margin":
            weights = margin_weights(outputs, trial.targets, trial.answers)
        if settings.weights == "regression":
            LeastSquares(1, settings.average, trial.answers).add(outputs, trial.targets)
        combined(outputs, weights, averaged(settings.average, trial.answers))

    def _settle(self, answers: Answers | None) -> None:
        """Tell all what outputs are; of values there is no diversity.

        Raises:
            UserError: There is to be one.
        """
        self.task = self.panel.task = replace(self.task, answers=answers)
        for replica in self.workers.mine:
            replica.task = self.task
        if answers != "values" or self.settings.method != "ec":
            return
        if self.settings.diversity:
            raise UserError(
                f"diversity {self.diversity} is of distances of probabilities, and answers here are values",
                hint="give diversity=0; or say by answers= that outputs are scores, where targets are "
                "probabilities",
            )
        self.diversity = 0.0

    def _is_late(self) -> bool:
        """True after as many rounds without progress as the user has patience for."""
        losses = [record.test_loss for record in self.rounds if record.test_loss is not None]
        patience = self.settings.patience
        if patience is None or not losses:
            return False
        best = min(
            range(len(losses)), key=lambda number: (math.isnan(losses[number]), losses[number], number)
        )
        return len(losses) - 1 - best >= patience

    # The end

    def _trained(self) -> EnsembleTrained:
        last = self.rounds[-1]
        workers, team = self.workers, self.panel.models
        workers.spread({replica.number: replica.grown for replica in workers.mine}, team)
        kept = [worker for worker in range(self.k) if worker not in last.left_out]
        body = InTurn([team[worker] for worker in kept])
        weights = torch.tensor(last.weights, dtype=torch.float64)
        whole = copy.deepcopy(self._global(weights, kept, body))
        members = [copy.deepcopy(team[worker]) for worker in kept]
        losses = last.compression_losses or last.losses
        best = _smallest(losses, kept)
        if last.compression_losses:
            workers.spread({replica.number: tensors_of(replica.model) for replica in workers.mine}, team)
        local = copy.deepcopy(team[best])
        return EnsembleTrained(whole, local, members, list(self.rounds))

    # Checkpoints

    def _store(self, folder: Path) -> Checkpoints:
        mine = [replica.number for replica in self.workers.mine]
        return Checkpoints(folder, "worker", "round", mine, self.workers.everywhere)

    def _facts(self, replica: Replica) -> dict[str, Any]:
        """All on which the numbers depend, as plain data."""
        of_no_account = {"rounds", "patience", "exchange"}
        settings = {name: value for name, value in _plain(self.settings).items() if name not in of_no_account}
        settings["diversity"] = self._given_diversity
        data = {"examples": len(self.task.examples), "shard": list(replica.shard), "data": self._digest}
        return settings | replica.learner.facts | data

    def _save(self, store: Checkpoints, number: int) -> None:
        rounds = [asdict(record) for record in self.rounds]
        for replica in self.workers.mine:
            state = {"settings": self._facts(replica), "rounds": rounds, "replica": replica.state_dict()}
            store.save(number, replica.number, state)

    def _resume(self, store: Checkpoints) -> int:
        """Load the newest round that every worker has; the number of the round to go on with."""
        found = store.newest()
        if found is None:
            self._refuse_others(store)
            store.refuse_gaps()
            return 0
        for replica in self.workers.mine:
            with store.loading(found, replica.number, self.task.device) as state:
                check_same(state["settings"], self._facts(replica), store.folder)
                replica.load_state_dict(state["replica"])
                self.rounds = [Round(**record) for record in state["rounds"]]
        store.refuse_more(found, self.settings.rounds)
        return found + 1

    def _refuse_others(self, store: Checkpoints) -> None:
        """Refuse a folder where some workers have rounds of another training, to be written over."""
        for replica in self.workers.mine:
            newest = max(store.moments(replica.number), default=None)
            if newest is not None:
                with store.loading(newest, replica.number, self.task.device) as state:
                    check_same(state["settings"], self._facts(replica), store.folder)


def _smallest(losses: Sequence[float], among: Sequence[int]) -> int:
    """The worker of the smallest loss that is finite."""
    return min(among, key=lambda worker: (not math.isfinite(losses[worker]), losses[worker], worker))


def _plain(settings: EnsembleCompression) -> dict[str, Any]:
    """Settings as plain data, without what is made by functions, and where."""
    return {
        name: value if isinstance(value, (int, float, str, type(None))) else str(value)
        for name, value in vars(settings).items()
        if name not in ("optimizer", "scheduler", "device")
    }


def _check_settings(workers: Together, settings: EnsembleCompression) -> None:
    """Refuse processes with settings of their own, which would deal examples, and wait, each in its way.

    Raises:
        UserError: The first worker and setting that differ.
    """
    first, *others = workers.everywhere(_plain(settings))
    for worker, own in enumerate(others, start=1):
        for name, value in own.items():
            if value != first[name]:
                raise UserError(
                    f"worker {worker} has {name} {value}, and worker 0 has {first[name]}",
                    hint="give all processes the same settings, also the same seed",
                )


def _check_given(workers: Together, digests: Mapping[str, str]) -> None:
    """Refuse processes that were given different things under one name.

    Raises:
        UserError: The first worker, and what it was given.
    """
    first, *others = workers.everywhere(digests)
    for worker, own in enumerate(others, start=1):
        for what, value in own.items():
            if value != first[what]:
                raise UserError(
                    f"worker {worker} has other {what} than worker 0",
                    hint="give all processes all the data, the same shards and the same model to start from: "
                    "call torch.manual_seed before they are made",
                )


def _check_alike(workers: Together) -> None:
    """Refuse replicas of different architectures.

    Raises:
        UserError: The first worker whose replica differs, and in what.
    """
    own = {
        replica.number: [(name, list(tensor.shape)) for name, tensor in tensors_of(replica.model).items()]
        for replica in workers.mine
    }
    first, *others = workers.gather(own)
    none: tuple[str, list[int]] = ("nothing", [])
    for worker, tensors in enumerate(others, start=1):
        for (name, shape), (wanted, size) in zip_longest(tensors, first, fillvalue=none):
            if (name, shape) != (wanted, size):
                raise UserError(
                    f"the replica of worker {worker} has {name} of shape {shape}, and that of worker 0 "
                    f"{wanted} of {size}",
                    hint="all replicas are of one architecture; gs.ensemble takes different ones",
                )


def _put_mean(team: Sequence[nn.Module], into: nn.Module) -> None:
    """Give a module the mean of the team's parameters."""
    with torch.no_grad():
        columns = zip(*(module.parameters() for module in team), strict=True)
        for parameter, column in zip(into.parameters(), columns, strict=True):
            total = column[0] / len(team)
            for other in column[1:]:
                total = total + other / len(team)
            parameter.copy_(total)
