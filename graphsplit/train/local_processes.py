"""Layer groups on several processes: what is handed on goes down, one number for each example comes back.

Each process trains one stage and reads the data for itself: the first one uses the inputs, all use the
targets. Batch ``t`` of a stage needs what the stage before hands on for it, and nothing from behind but, to
update the critic, the losses of the next stage for batch ``t - queue + 1``. With a queue of one, every number
is the same as in one process.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graphsplit.errors import UserError
from graphsplit.train.processes import cpu_group, naming_the_lost
from graphsplit.train.stage import Stage


class Chain:
    """One stage in this process, its neighbours in those with the ranks before and behind.

    Attributes:
        mine: The stage, in a list.
    """

    def __init__(self, stage: Stage, size: int, queue: int) -> None:
        if queue < 1:
            raise UserError(f"a queue of {queue} batches", hint="give one or more")
        self.mine = [stage]
        self._stage = stage
        self._size = size
        self._queue = queue
        self._sent: deque[tuple[Tensor, dist.Work]] = deque()
        self._bytes = [0, 0]
        self._dtypes = [meta.dtype for meta in stage.group.signature.inputs]
        self._ranks = [meta.ndim for meta in stage.group.signature.inputs]

    def train(self, values: Sequence[Any], targets: Any, step: int) -> Tensor:
        """Train on a batch; values are those of the model's inputs, which the first stage takes."""
        stage = self._stage
        found = torch.zeros(2, self._size, dtype=torch.float64)
        with self._naming():
            passed = stage.forward(values if self._is_first else self._receive(), targets, step)
            found[0, stage.number] = passed.losses.mean()
            if not self._is_first:
                self._send(passed.losses.float(), stage.number - 1)
                self._bytes[1] += passed.losses.numel() * 4
            if not self._is_last:
                self._bytes[0] += self._hand_on(passed.handed)
            stage.learners[0].update()
            while stage.waiting >= self._queue:
                found[1, stage.number] += self._learn()
        return found

    def finish(self) -> Tensor:
        """Wait for the targets of the batches that are still open."""
        found = torch.zeros(2, self._size, dtype=torch.float64)
        with self._naming():
            while self._stage.waiting:
                found[1, self._stage.number] += self._learn()
            self._settle()
        return found

    def evaluate(self, values: Sequence[Any]) -> list[tuple[int, Tensor]]:
        """Scores of this stage's sub-model."""
        stage = self._stage
        with self._naming():
            given = values if self._is_first else self._receive()
            outputs = list(stage.group.run_flat([value.to(stage.device) for value in given]))
            if not self._is_last:
                self._hand_on(outputs)
            self._settle()
        return [(stage.number, stage.scores(outputs))]

    def total(self, sums: Tensor) -> Tensor:
        """The sum over all processes."""
        with self._naming():
            dist.all_reduce(sums, group=cpu_group())
        return sums

    def traffic(self) -> tuple[int, int]:
        """Bytes down and up between all processes, in training, since the last time."""
        down, up = self.total(torch.tensor(self._bytes, dtype=torch.float64)).tolist()
        self._bytes = [0, 0]
        return int(down), int(up)

    def gather(self, value: Any) -> list[Any]:
        """A value of every process, for every process."""
        found: list[Any] = [None] * self._size
        with self._naming():
            dist.all_gather_object(found, value, group=cpu_group())
        return found

    def spread(self, stages: Sequence[Stage]) -> None:
        """Give every process the weights of all stages, so that each holds the whole model."""
        for stage in stages:
            for module in stage.modules:
                with torch.no_grad(), self._naming():
                    for tensor in (*module.parameters(), *module.buffers()):
                        own = tensor.detach().cpu().contiguous()
                        dist.broadcast(own, stage.number, group=cpu_group())
                        tensor.copy_(own)

    @property
    def _is_first(self) -> bool:
        return self._stage.number == 0

    @property
    def _is_last(self) -> bool:
        return self._stage.number == self._size - 1

    def _learn(self) -> float:
        """Receive the losses of the next stage for the oldest open batch, and update the critic."""
        targets = torch.empty(self._stage.oldest, dtype=torch.float32, device=self._stage.device)
        dist.recv(targets, self._stage.number + 1)
        difference = self._stage.learn(targets)
        self._stage.learners[1].update()
        return float(difference)

    def _hand_on(self, values: Sequence[Tensor]) -> int:
        """Send tensors to the next stage: their sizes, then their bytes as one message; returns how many."""
        sizes = torch.tensor([size for value in values for size in value.shape], dtype=torch.int64)
        content = torch.cat([value.contiguous().view(-1).view(torch.uint8) for value in values])
        self._send(sizes.to(content.device), self._stage.number + 1)
        self._send(content, self._stage.number + 1)
        return content.numel() + sizes.numel() * 8

    def _receive(self) -> list[Tensor]:
        """Tensors from the stage before."""
        before, device = self._stage.number - 1, self._stage.device
        sizes = torch.empty(sum(self._ranks), dtype=torch.int64, device=device)
        dist.recv(sizes, before)
        given = iter(sizes.tolist())
        shapes = [[next(given) for _ in range(rank)] for rank in self._ranks]
        counts = [
            math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, self._dtypes, strict=True)
        ]
        content = torch.empty(sum(counts), dtype=torch.uint8, device=device)
        dist.recv(content, before)
        pieces = content.split(counts)
        return [
            piece.clone().view(dtype).view(shape)
            for piece, dtype, shape in zip(pieces, self._dtypes, shapes, strict=True)
        ]

    def _send(self, tensor: Tensor, rank: int) -> None:
        """Send without waiting; what has arrived by now is let go."""
        while self._sent and self._sent[0][1].is_completed():
            self._sent.popleft()
        work = dist.isend(tensor, rank)
        assert work is not None
        self._sent.append((tensor, work))

    def _settle(self) -> None:
        """Wait until everything sent has arrived."""
        while self._sent:
            self._sent.popleft()[1].wait()

    def _naming(self) -> AbstractContextManager[None]:
        """Say who is gone when a neighbour is."""
        return naming_the_lost(f"group {self._stage.number}")
