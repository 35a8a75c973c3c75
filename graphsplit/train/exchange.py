"""What goes between workers: replicas or predictions, in one process or several, with bytes and seconds.

Bytes are those of all workers together: with K workers of S bytes each a gather is K (K - 1) S, an average by
a ring all-reduce 2 (K - 1) S. Predictions of P bytes for the examples of one worker are (K - 1) P. In one
process nothing is sent, and the same bytes are counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.utils import average_parameters

from graphsplit.train.processes import Watch, gather, naming_the_lost, share
from graphsplit.train.replicas import Replica, put_tensors

CHUNK = 32 << 20
"""Bytes that one collective takes from a process at most."""


class Counter:
    """Bytes and seconds since they were last asked for."""

    def __init__(self) -> None:
        self.bytes = 0
        self.seconds = 0.0

    def take(self) -> tuple[int, float]:
        """Bytes and seconds, which start again from zero."""
        found = self.bytes, self.seconds
        self.bytes, self.seconds = 0, 0.0
        return found

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Do not count what is inside."""
        before = self.bytes, self.seconds
        try:
            yield
        finally:
            self.bytes, self.seconds = before

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Add the time of what is inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


class Together:
    """All workers in this process.

    Attributes:
        mine: The workers that are here.
        k: How many there are.
        counter: What would be sent, were they apart.
        start: Digest of what worker 0 starts from, as this process makes it; empty in one process.
    """

    def __init__(self, mine: Sequence[Replica], k: int, start: str = "") -> None:
        self.mine = mine
        self.k = k
        self.counter = Counter()
        self.start = start

    @property
    def leads(self) -> bool:
        """True in the one process that reports."""
        return True

    def gather(self, values: Mapping[int, Any]) -> list[Any]:
        """Of a value of each worker here those of all, in their order."""
        return [values[worker] for worker in range(self.k)]

    def spread(self, values: Mapping[int, Mapping[str, Tensor]], team: Sequence[nn.Module]) -> None:
        """Give each module of the team the tensors of its worker."""
        for worker, module in enumerate(team):
            put_tensors(module, values[worker])
        self.counter.bytes += self.k * (self.k - 1) * size_of(values[self.mine[0].number])

    def send(self, worker: int, values: Mapping[int, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The tensors of one worker, for all."""
        self.counter.bytes += (self.k - 1) * size_of(values[worker])
        return values[worker]

    def average(self) -> None:
        """Give every replica the mean of all parameters; buffers stay its own."""
        columns = [[p for p in replica.model.parameters() if p.requires_grad] for replica in self.mine]
        with torch.no_grad():
            for column in zip(*columns, strict=True):
                total = column[0] / self.k
                for parameter in column[1:]:
                    total = total + parameter / self.k
                for parameter in column:
                    parameter.copy_(total)
        self.counter.bytes += 2 * (self.k - 1) * sum(p.nbytes for p in columns[0])

    def shared(self, value: Any) -> Any:
        """A value of the process that reports, for all."""
        return value

    def everywhere(self, value: Any) -> list[Any]:
        """A value of each process."""
        return [value]


class Apart(Together):
    """One worker in this process, the others in those that torchrun started."""

    def __init__(self, mine: Replica, k: int, watch: Watch, start: str) -> None:
        super().__init__([mine], k, start)
        self._rank = mine.number
        self._device = torch.device("cpu") if dist.get_backend() == "gloo" else mine.task.device
        mine.alive = watch.check

    @property
    def leads(self) -> bool:
        """True in the first process."""
        return self._rank == 0

    def gather(self, values: Mapping[int, Any]) -> list[Any]:
        """Of a value of each worker here those of all, in their order."""
        with self._naming(), self.counter.timing():
            return gather(dict(values), self.k)

    def spread(self, values: Mapping[int, Mapping[str, Tensor]], team: Sequence[nn.Module]) -> None:
        """Send the tensors of this worker to all, in chunks, and receive theirs."""
        own = values[self._rank]
        flat = torch.cat([self._flat(tensor) for tensor in own.values()])
        found = [torch.empty_like(flat) for _ in range(self.k)]
        with self._naming(), self.counter.timing():
            for first in range(0, len(flat), CHUNK):
                pieces = [into[first : first + CHUNK] for into in found]
                dist.all_gather(pieces, flat[first : first + CHUNK].contiguous())
        for module, content in zip(team, found, strict=True):
            put_tensors(module, _like(own, content))
        self.counter.bytes += self.k * (self.k - 1) * len(flat)

    def send(self, worker: int, values: Mapping[int, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The same by a broadcast, in chunks."""
        own = values[self._rank]
        flat = torch.cat([self._flat(tensor) for tensor in own.values()])
        with self._naming(), self.counter.timing():
            for first in range(0, len(flat), CHUNK):
                dist.broadcast(flat[first : first + CHUNK], src=worker)
        self.counter.bytes += (self.k - 1) * len(flat)
        return _like(own, flat)

    def trade(self, pieces: Sequence[Tensor | None]) -> list[Tensor]:
        """Send each worker its piece, in chunks; what all workers have for this one, in their order.

        Args:
            pieces: One for each worker, of the same shape and dtype in all processes; None where there is
                nothing for it in any of them.
        """
        own = pieces[self._rank]
        sent = [
            torch.empty(0, dtype=torch.uint8, device=self._device) if piece is None else self._flat(piece)
            for piece in pieces
        ]
        found = [torch.empty_like(sent[self._rank]) for _ in range(self.k)]
        share = max(CHUNK // self.k, 1)
        with self._naming(), self.counter.timing():
            for first in range(0, max(map(len, sent)), share):
                parts = [flat[first : first + share] for flat in sent]
                places = [flat[first : first + share] for flat in found]
                size = len(places[0])
                received = torch.empty(self.k * size, dtype=torch.uint8, device=self._device)
                dist.all_to_all_single(received, torch.cat(parts), [size] * self.k, list(map(len, parts)))
                for place, part in zip(places, received.view(self.k, size), strict=True):
                    place.copy_(part)
        self.counter.bytes += (self.k - 1) * sum(map(len, sent))
        if own is None:
            return []
        return [_typed(flat, own) for flat in found]

    def _flat(self, tensor: Tensor) -> Tensor:
        """Bytes of a tensor, where collectives take them."""
        return tensor.contiguous().view(-1).view(torch.uint8).to(self._device)

    def average(self) -> None:
        """The same by torch's own averaging."""
        parameters = [p for p in self.mine[0].model.parameters() if p.requires_grad]
        with self._naming(), self.counter.timing():
            # What PeriodicModelAverager calls, which leaves out parameters without a gradient.
            average_parameters(iter(parameters), cast(dist.ProcessGroup, dist.group.WORLD))
        self.counter.bytes += 2 * (self.k - 1) * sum(parameter.nbytes for parameter in parameters)

    def shared(self, value: Any) -> Any:
        """A value of the process that reports, for all."""
        with self._naming():
            return share([value] if self.leads else None)[0]

    def everywhere(self, value: Any) -> list[Any]:
        """A value of each process."""
        return self.gather({self._rank: value})

    def _naming(self) -> Any:
        return naming_the_lost(f"worker {self._rank}")


def _typed(content: Tensor, like: Tensor) -> Tensor:
    """Bytes as a tensor of the form, and in the place, of another."""
    return content.clone().view(like.dtype).view(like.shape).to(like.device)


def _like(tensors: Mapping[str, Tensor], content: Tensor) -> dict[str, Tensor]:
    """Bytes of all tensors as tensors of the same names and forms."""
    pieces = content.split([tensor.nbytes for tensor in tensors.values()])
    return {
        name: _typed(piece, tensor) for (name, tensor), piece in zip(tensors.items(), pieces, strict=True)
    }


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def mean_buffers(team: Sequence[nn.Module], into: nn.Module) -> None:
    """Give a module the mean of the team's floating-point buffers; of others, those of the first."""
    buffers = [dict(module.named_buffers()) for module in team]
    with torch.no_grad():
        for name, buffer in into.named_buffers():
            if buffer.dtype.is_floating_point:
                buffer.copy_(torch.stack([own[name] for own in buffers]).mean(0))
            else:
                buffer.copy_(buffers[0][name])
