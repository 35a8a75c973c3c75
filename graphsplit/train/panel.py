"""What a team of replicas answers on the examples of every worker, and what is sent for it.

Where replicas are sent, every process runs all of them on its own worker's examples. Where predictions are
sent, every process runs its own replica on the examples of all workers, and sends each what it gives on
theirs. Batches are the same either way, and so is every bit of the answers.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphsplit.answers import probabilities
from graphsplit.ensembles import (
    Average,
    InTurn,
    LeastSquares,
    Rule,
    averaged,
    combined,
    main_output,
    margin_weights,
    stacked,
)
from graphsplit.errors import UserError
from graphsplit.train.exchange import Apart, Together
from graphsplit.train.loop import Batches, call, evaluating, read_batch, seed_epoch
from graphsplit.train.replicas import Labels, Replica, Task, tensors_of
from graphsplit.train.sharding import ShardSampler

Exchange = Literal["replicas", "predictions"]
"""What workers send each other."""

BatchesOf = Callable[[int], ShardSampler]
"""The batches of a worker."""

Use = Callable[[int, list[int], Any, Tensor], None]
"""Called with a worker, numbers of its examples, their targets, and what members give, ``[K, N, ...]``."""

Evaluate = Callable[[nn.Module, Batches], tuple[float, float | None]]
"""Loss and error of a model."""

ANSWERED = 4
"""Batches of training in one batch of answers, which needs no memory for gradients."""


class Panel:
    """The replicas of all workers, each with a place in this process.

    Args:
        workers: Whose replicas.
        task: What they learn.
        average: What is averaged.
        exchange: What is counted as sent.
    """

    def __init__(self, workers: Together, task: Task, average: Average, exchange: Exchange) -> None:
        self.workers = workers
        self.task = task
        self.average: Average = average
        self.exchange: Exchange = exchange

    @cached_property
    def models(self) -> list[nn.Module]:
        """A place for every worker's replica."""
        return [copy.deepcopy(self.workers.mine[0].model) for _ in range(self.workers.k)]

    def seat(self, values: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Let all replicas answer with these tensors: those that they have now."""
        counter = self.workers.counter
        with counter.pausing() if self.exchange == "predictions" else contextlib.nullcontext():
            self.workers.spread(values, self.models)

    def tensors(self, worker: int) -> Mapping[str, Tensor]:
        """Tensors of one worker at the last aggregation; all processes ask for them together."""
        if self.exchange == "replicas":
            return tensors_of(self.models[worker])
        return self.workers.send(worker, {replica.number: replica.grown for replica in self.workers.mine})

    def answers(
        self, batches: BatchesOf, weights: Tensor, kept: Sequence[int], rule: Rule
    ) -> dict[int, Labels]:
        """What the ensemble answers on examples of the workers here, without gradients.

        Args:
            batches: Their batches.
            weights: One for each worker; by margins each example has its own.
            kept: Workers whose replicas are members.
            rule: Where weights come from.
        """
        found = {
            replica.number: Labels(_distinct(batches(replica.number)), self.task.keep)
            for replica in self.workers.mine
        }

        def keep(worker: int, numbers: list[int], targets: Any, outputs: Tensor) -> None:
            kind = self.task.kind(outputs[0], targets)
            used = margin_weights(outputs, targets, kind) if rule == "margin" else weights[list(kept)]
            mixed = combined(outputs, used, averaged(self.average, kind))
            found[worker].put(numbers, probabilities(mixed, kind))

        self._read(batches, kept, keep)
        return found

    def least_squares(self, batches: BatchesOf, kept: Sequence[int]) -> dict[int, LeastSquares]:
        """The sums for regression weights over examples of each worker here."""
        found = {
            replica.number: LeastSquares(len(kept), self.average, self.task.answers)
            for replica in self.workers.mine
        }
        self._read(
            batches, kept, lambda worker, numbers, targets, outputs: found[worker].add(outputs, targets)
        )
        return found

    def measured(
        self,
        evaluate: Callable[[nn.Module, Batches], Any],
        whole: nn.Module,
        kept: Sequence[int],
        test: Batches,
    ) -> tuple[list[tuple[float, float | None]], tuple[float, float | None]]:
        """What ``evaluate`` finds of the kept replicas, and of the whole model; the same in every process."""
        found: list[tuple[float, float | None]] = []
        if self.workers.leads:
            found = [evaluate(model, test) for model in (*(self.models[worker] for worker in kept), whole)]
        *each, last = self.workers.shared(found)
        return each, last

    def body(self, kept: Sequence[int]) -> nn.Module:
        """The kept replicas as one module, which gives their outputs on a leading dimension."""
        return InTurn([self.models[worker] for worker in kept])

    def _read(self, batches: BatchesOf, kept: Sequence[int], use: Use) -> None:
        workers, team = self.workers, [self.models[worker] for worker in kept]
        for replica in workers.mine:
            start = time.perf_counter()
            with _answering(team):
                for numbers, inputs, targets in self._batches(replica.number, batches):
                    replica.alive()
                    outputs = stacked([main_output(call(member, inputs)) for member in team])
                    if self.exchange == "predictions":
                        workers.counter.bytes += (workers.k - 1) * outputs[0].nbytes
                    use(replica.number, numbers, targets, outputs)
            replica.seconds += time.perf_counter() - start

    def _batches(self, worker: int, batches: BatchesOf) -> Iterator[tuple[list[int], Any, Any]]:
        """Examples of a worker, each once; what is drawn at random in them follows from the worker."""
        numbers = _distinct(batches(worker))
        size = ANSWERED * self.task.batch
        lists = [numbers[first : first + size] for first in range(0, len(numbers), size)]
        seed_epoch(self.task.seed, worker, 0, ())
        yield from self.task.examples.read(lists, self.task.device)


class DistantPanel(Panel):
    """The replicas of all workers, each in its own process, which send what they predict."""

    def __init__(self, workers: Apart, task: Task, average: Average) -> None:
        super().__init__(workers, task, average, "predictions")

    @property
    def own(self) -> Replica:
        """The one replica that is here."""
        return self.workers.mine[0]

    def seat(self, values: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Nothing to do: each replica is in its place."""

    def measured(
        self,
        evaluate: Callable[[nn.Module, Batches], Any],
        whole: nn.Module,
        kept: Sequence[int],
        test: Batches,
    ) -> tuple[list[tuple[float, float | None]], tuple[float, float | None]]:
        """The same; every process evaluates its own replica, and predictions meet in the first one.

        Raises:
            UserError: The processes have other test data.
        """
        sizes: list[int] = []
        with torch.random.fork_rng(), self.workers.counter.pausing():
            seed_epoch(self.task.seed, None, 0, test)  # one order in all processes, if it is drawn at random
            mine = evaluate(self.own.model, _counted(test, sizes))
            found = self.workers.gather({self.own.number: (mine, sizes)})
            for worker, (_, other) in enumerate(found):
                if other != found[0][1]:
                    raise UserError(
                        f"worker {worker} tests {len(other)} batches of {sum(other)} examples, and worker 0 "
                        f"{len(found[0][1])} of {sum(found[0][1])}",
                        hint="with exchange='predictions' every process reads the same test data",
                    )
            seed_epoch(self.task.seed, None, 0, test)
            last = self.workers.shared(evaluate(whole, test))
        return [found[worker][0] for worker in kept], last

    def body(self, kept: Sequence[int]) -> nn.Module:
        """The same, to be called in all processes at once; what it gives is right in the first one."""
        return _Meeting(self.own.model, cast(Apart, self.workers), kept)

    def _read(self, batches: BatchesOf, kept: Sequence[int], use: Use) -> None:
        workers, own = cast(Apart, self.workers), self.own
        start, waited = time.perf_counter(), workers.counter.seconds
        with _answering([own.model]):
            readers = [_Reader(self._batches(worker, batches)) for worker in range(workers.k)]
            # A batch of every worker at a time, so that all links are busy and little is held.
            while any(found := [reader.next() for reader in readers]):
                own.alive()
                outputs = [batch and main_output(call(own.model, batch[1])) for batch in found]
                given = workers.trade(outputs)
                batch = found[own.number]
                if batch is not None:
                    use(own.number, batch[0], batch[2], torch.stack([given[worker] for worker in kept]))
        own.seconds += time.perf_counter() - start - (workers.counter.seconds - waited)


class _Reader:
    """Batches of a worker, with a random state of their own, as if they were read in one go."""

    def __init__(self, batches: Iterator[tuple[list[int], Any, Any]]) -> None:
        self._batches = batches
        self._state: Tensor | None = None

    def next(self) -> tuple[list[int], Any, Any] | None:
        """The next batch; None after the last."""
        if self._state is not None:
            torch.set_rng_state(self._state)
        found = next(self._batches, None)
        self._state = torch.get_rng_state()
        return found


class _Meeting(nn.Module):
    """Runs the replica of this process; the first process has what all give, the others their own K times."""

    def __init__(self, model: nn.Module, workers: Apart, kept: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self._workers = workers
        self._kept = list(kept)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors with a leading dimension of the kept, nested as the model nests them."""

        def met(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            found = self._workers.trade([leaf, *[None] * (self._workers.k - 1)])
            return torch.stack([found[worker] if found else leaf for worker in self._kept])

        return pytree.tree_map(met, self.model(*args, **kwargs))


@contextlib.contextmanager
def _answering(team: Sequence[nn.Module]) -> Iterator[None]:
    """No gradients, eval mode, and the random state afterwards as it was.

    It is no inference mode: a table that forward makes here has to be one that training can use.
    """
    with torch.random.fork_rng(), torch.no_grad(), contextlib.ExitStack() as modes:
        for member in team:
            modes.enter_context(evaluating(member))
        yield


def _distinct(sampler: ShardSampler) -> list[int]:
    """Numbers of the examples of some batches, each once."""
    return sorted({number for batch in sampler for number in batch})


def _counted(batches: Batches, sizes: list[int]) -> Iterator[Any]:
    """The batches; their sizes go into the list."""
    for batch in batches:
        sizes.append(read_batch(torch.device("cpu"), batch)[2])
        yield batch
