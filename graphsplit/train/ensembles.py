"""EC-DNN: replicas train apart, their ensemble is the global model, and distillation makes it one model.

Sun & Liu, "Ensemble-compression: a new method for parallel training of deep neural networks" (arXiv
1606.00575; Neurocomputing 2018). One round of K workers:

1. local training on each one's shard, from the second round on with a term for diversity (eq. 9);
2. aggregation: the global model is the weighted sum of all replicas' outputs (eq. 5 to 8);
3. compression (eq. 10): each replica follows true targets and the ensemble's answers on a share of its shard.

The compressed replicas start the next round. In the same harness: averages of parameters in place of
ensembles (MA-DNN, by the averaging of torch's `PeriodicModelAverager`; post-local SGD), an ensemble without
compression, and one model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from graphsplit.answers import Answers
from graphsplit.ensembles import Average
from graphsplit.errors import UserError, first_line
from graphsplit.train.checks import NOT_NEGATIVE, RUN, check, kind, named, number, one_of, optional, whole
from graphsplit.train.digests import digest
from graphsplit.train.exchange import Apart, Together
from graphsplit.train.learner import Learning
from graphsplit.train.loop import Batches, Metric, as_batches, seed_epoch
from graphsplit.train.panel import Exchange
from graphsplit.train.processes import Watch, process_group
from graphsplit.train.replicas import Replica, Task, copied, tensors_of
from graphsplit.train.rounds import EnsembleTrained, Round, Run
from graphsplit.train.sharding import Data, Examples, checked_shards, deal

MethodName = Literal["ec", "ma", "e", "s"]
WeightRule = Literal["simple", "regression", "margin"]
OnNaN = Literal["stop", "leave_out"]

SETTINGS = {
    "k": whole(1),
    "rounds": whole(1),
    "tau": whole(1),
    "batch": whole(1),
    "method": named(MethodName),
    "weights": named(WeightRule),
    "average": named(Average),
    "answers": optional(named(Answers)),
    "mu": number("a share above 0 and up to 1", lambda value: 0 < value <= 1),
    "p": number("a share from 0 to 1", lambda value: 0 <= value <= 1),
    "alpha": NOT_NEGATIVE,
    "beta": NOT_NEGATIVE,
    "diversity": optional(NOT_NEGATIVE),
    "warmup": whole(0),
    "keep": one_of(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "on_nan": named(OnNaN),
    "patience": optional(whole(1)),
    "exchange": named(Exchange),
    "device": kind("a device, such as 'cpu' or 'cuda'", str, torch.device),
    "seed": whole(),
}
"""What settings of `EnsembleCompression` have to be, with those of `Learning`."""


@dataclass(frozen=True, kw_only=True)
class EnsembleCompression(Learning):
    """Training of K replicas apart (EC-DNN), and what to compare it with.

    Defaults are ours, as the paper's own were not at hand. Schedules are stepped after every round, or after
    every step with ``step_every_batch``.

    Example::

        training = gs.train.EnsembleCompression(
            k=4, rounds=20, tau=50, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1)
        )
        found = training.run(make_model, (x, y), F.cross_entropy, test=loader, error=gs.train.misclassified)
        gs.export_onnx(gs.ensemble(found.members, args=x[:2]), "global.onnx")

    Attributes:
        k: Number of workers; ``"s"`` has one.
        rounds: How many.
        tau: Steps of a worker in a round, those of compression among them.
        batch: Examples of a worker's batch.
        method: ``"ec"``; ``"ma"``: the mean of the parameters at the end of every round; ``"e"``: an ensemble
            without compression; ``"s"``: one model on all data.
        weights: Of the replicas in the ensemble, see `gs.ensemble`. Regression is over the examples of all
            workers that are relabelled.
        average: What is averaged, ``"outputs"`` or ``"probabilities"``.
        answers: What outputs are, see `gs.ensemble`; unless given, as targets tell. Whole numbers as targets
            are classes or, of the shape of the outputs, yes and no; real numbers make outputs values. Has to
            be said where targets that are real numbers stand for probabilities.
        mu: Share of a worker's shard that the ensemble relabels, drawn anew in every round.
        p: Share of the steps of a round that compress.
        alpha: Weight of the true targets in compression.
        beta: Weight of the ensemble's answers.
        diversity: lambda of eq. 9; the distance is between answers that are probabilities. Unless given, 0.1;
            and 0 where answers are values, as their distance has no bound: a loss less such a distance can
            have no smallest value. Each round sends the compressed replicas, or what they predict, too,
            where it is not 0.
        warmup: Steps at the start after each of which ``"ma"`` averages (post-local SGD: with an optimizer
            that is linear in the gradients, as SGD with momentum, this is synchronous training).
        keep: Dtype of the answers that are kept for compression.
        on_nan: What to do with a worker that diverged: ``"stop"``, or ``"leave_out"``: it is no part of the
            global model and goes on from the replica of the smallest training loss.
        patience: Stop after as many rounds without a smaller test loss of the global model.
        exchange: What workers send each other to know what the ensemble answers: all ``"replicas"``; or
            ``"predictions"`` on the examples that are labelled, for which every process needs all the data,
            and runs its own replica only. Numbers are the same to the last bit.
        device: Where replicas are trained; in several processes ``"cuda"`` is that of the local rank.
        seed: Of shards, orders and dropout.

    Raises:
        UserError: A setting is out of range.
    """

    k: int
    rounds: int
    tau: int
    batch: int = 32
    method: MethodName = "ec"
    weights: WeightRule = "simple"
    average: Average = "outputs"
    answers: Answers | None = None
    mu: float = 0.7
    p: float = 0.2
    alpha: float = 0.5
    beta: float = 0.5
    diversity: float | None = None
    warmup: int = 0
    keep: torch.dtype = torch.float16
    on_nan: OnNaN = "stop"
    patience: int | None = None
    exchange: Exchange = "replicas"
    device: str | torch.device = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(vars(self), SETTINGS)
        if self.exchange == "predictions" and self.method not in ("ec", "e"):
            raise UserError(
                f"method {self.method!r} makes no ensemble whose predictions could be sent",
                hint="give exchange='replicas', or method 'ec' or 'e'",
            )
        if self.method == "ec" and self.p and not self.compression_steps:
            raise UserError(
                f"a share p of {self.p} of {self.tau} steps is no step of compression",
                hint="give a larger tau or p; p=0 leaves compression out",
            )

    @property
    def workers(self) -> int:
        """How many replicas there are."""
        return 1 if self.method == "s" else self.k

    @property
    def compression_steps(self) -> int:
        """Steps of a round that compress."""
        return round(self.p * self.tau) if self.method == "ec" else 0

    def run(
        self,
        model: nn.Module | Callable[[], nn.Module],
        data: Data,
        loss: Metric,
        *,
        test: Batches | None = None,
        error: Metric | None = None,
        shards: Sequence[Sequence[int]] | None = None,
        pseudo_loss: Metric | None = None,
        parallel: bool = False,
        checkpoint: str | Path | None = None,
        on_round: Callable[[Round], None] | None = None,
    ) -> EnsembleTrained:
        """Train.

        Args:
            model: Where all replicas start, which is not changed; or what makes one, called for each under a
                seed of its own. By ``"ma"`` all start from the first.
            data: A data set, a loader of one, or inputs and targets as two tensors; the same everywhere.
            loss: Of outputs and targets the mean over a batch. The ensemble's guarantee holds where it is
                convex in the outputs; a warning says where it is shown not to be.
            test: Batches to evaluate replicas and global model on after every round, or one batch.
            error: A second number to record, such as `misclassified`.
            shards: Numbers of the examples of each worker, in place of equal shards at random.
            pseudo_loss: Of outputs and the ensemble's answers, of the shape of the outputs: probabilities, or
                values; the loss itself unless given.
            parallel: One worker in each process that torchrun started. All numbers are those of one process:
                to the last bit, but by ``"ma"`` with more than two workers to rounding.
            checkpoint: A folder to save every round in, and to go on from, with the same settings (but for
                ``rounds``, ``patience``, ``exchange`` and ``device``), optimizer, schedule and data.
            on_round: Called with the record of every round, in the first process; ``print`` shows progress.

        Raises:
            UserError: What is given cannot be used, outputs are not what the loss takes, targets leave open
                what they are, a worker diverged, a process is missing, gone, or was given something else than
                the others, or a checkpoint is damaged or of another training.
        """
        given = {
            "model": model, "loss": loss, "pseudo_loss": pseudo_loss, "error": error, "test": test,
            "checkpoint": checkpoint, "on_round": on_round,
        }  # fmt: skip
        check(given, RUN)
        if self.patience is not None and test is None:
            raise UserError("patience needs test data", hint="give test=")
        examples = Examples(data)
        k = self.workers
        dealt = (
            deal(len(examples), k, self.seed) if shards is None else checked_shards(shards, len(examples), k)
        )
        device = _device(self.device, parallel=parallel)
        task = Task(
            examples, loss, pseudo_loss or loss, device, self.seed, self.batch, self.keep, self.answers
        )
        with self._workers(model, task, dealt, parallel=parallel) as workers:
            batches = None if test is None else as_batches(test)
            return Run(self, workers, task, dealt, batches, error, on_round).run(checkpoint)

    @contextmanager
    def _workers(
        self, model: Any, task: Task, shards: Sequence[Sequence[int]], *, parallel: bool
    ) -> Iterator[Together]:
        k = self.workers

        def built(worker: int) -> nn.Module:
            seed_epoch(self.seed, worker if self.method != "ma" else 0, 0, ())
            return copied(model) if isinstance(model, nn.Module) else _made(model)

        def made(worker: int) -> Replica:
            with torch.random.fork_rng():
                return Replica(worker, built(worker).to(task.device), self, task, shards[worker])

        if not parallel:
            mine = [made(worker) for worker in range(k)]
            if len({id(replica.model) for replica in mine}) < k:
                raise UserError(
                    "the function gives one module for several workers",
                    hint="let it make a new one, or give the module itself, which is copied",
                )
            yield Together(mine, k)
            return
        with process_group() as (rank, size):
            if size != k:
                raise UserError(
                    f"{size} processes for {k} workers",
                    hint=f"start the script with torchrun --nproc-per-node={k}",
                )
            with Watch(f"worker {rank}") as watch:
                with torch.random.fork_rng():
                    start = digest(tensors_of(built(0)))
                yield Apart(made(rank), k, watch, start)


def _made(make: Callable[[], nn.Module]) -> nn.Module:
    """What a user's function makes.

    Raises:
        UserError: It is no module.
    """
    found: object = make()
    if not isinstance(found, nn.Module):
        raise UserError(f"the function of the model gives a {type(found).__name__}, expected a module")
    return found


def _device(device: str | torch.device, *, parallel: bool) -> torch.device:
    """Where this process trains.

    Raises:
        UserError: There is no such device.
    """
    try:
        if parallel and str(device) == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {str(device)!r} cannot be used: {first_line(error)}") from None
    return torch.device(device)
