"""Shards: which examples a worker has, and which of them are in the batch of which step.

Everything follows from seed, worker and step, so that a run that goes on after a checkpoint, or is spread
over processes, sees the same batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import index
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, default_collate

from graphsplit.errors import UserError, first_line
from graphsplit.train.digests import digest
from graphsplit.train.loop import mixed_seed, read_batch

Data = Dataset[Any] | DataLoader[Any] | tuple[Tensor, Tensor]
"""Examples ``(inputs, targets)`` by number, or a loader of them, or all of them as two tensors."""


SAMPLE = 16
"""Examples of a data set that are read to tell it from another one."""


class ShardSampler(Sampler[list[int]]):
    """Batches of a shard for some steps: numbers of examples, for the ``batch_sampler`` of a DataLoader.

    The shard is gone through in a new random order every time; what is left of it at the end, less than a
    batch, waits for the next time. A shard that is smaller than a batch is one.

    Args:
        shard: Numbers of the examples.
        batch: Examples of a batch.
        seed: Of the orders; each worker has its own.
        first: The first step.
        count: How many steps.
    """

    def __init__(self, shard: Sequence[int], batch: int, seed: int, first: int, count: int) -> None:
        self._shard = shard
        self._batch = min(batch, len(shard))
        self._seed = seed
        self._steps = range(first, first + count)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        turn, order = -1, torch.empty(0)
        for step in self._steps:
            now, place = divmod(step, len(self._shard) // self._batch)
            if now != turn:
                generator = torch.Generator().manual_seed(mixed_seed(self._seed, None, now))
                turn, order = now, torch.randperm(len(self._shard), generator=generator)
            chosen = order[place * self._batch : (place + 1) * self._batch]
            yield [self._shard[number] for number in chosen.tolist()]


def deal(examples: int, k: int, seed: int) -> list[list[int]]:
    """Numbers of the examples of K workers, drawn at random; shards differ by one example at most.

    Raises:
        UserError: There are fewer examples than workers.
    """
    if examples < k:
        raise UserError(
            f"{examples} examples cannot be dealt to {k} workers", hint="give more data, or fewer workers"
        )
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[worker::k] for worker in range(k)]


def checked_shards(shards: Sequence[Sequence[int]], examples: int, k: int) -> list[list[int]]:
    """A user's own shards, which may overlap and differ in size.

    Raises:
        UserError: They are no numbers, there are not K of them, one is empty, or one names an example that
            there is not.
    """
    try:
        found = [[index(number) for number in shard] for shard in shards]
    except TypeError as error:
        raise UserError(
            f"shards are no numbers of examples: {first_line(error)}",
            hint=f"give {k} lists, the numbers of the examples of each worker",
        ) from None
    if len(found) != k:
        raise UserError(f"{len(found)} shards for {k} workers", hint="give one for each worker")
    for worker, shard in enumerate(found):
        if not shard:
            raise UserError(f"the shard of worker {worker} is empty")
        if min(shard) < 0 or max(shard) >= examples:
            wrong = min(shard) if min(shard) < 0 else max(shard)
            raise UserError(f"the shard of worker {worker} names example {wrong} of {examples}")
    return found


class Examples:
    """Data that is read by number.

    Args:
        data: A data set that knows its length, a loader of one (whose collate function and number of workers
            are used, and whose order is not), or inputs and targets as two tensors.

    Raises:
        UserError: The data cannot be read by number.
    """

    def __init__(self, data: Data) -> None:
        self._workers = 0
        self._collate: Callable[[Any], Any] = default_collate
        if isinstance(data, DataLoader):
            self._workers, self._collate, data = data.num_workers, data.collate_fn, data.dataset
        if isinstance(data, tuple):
            data = TensorDataset(*_checked_pair(data))
        numbered = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        if not numbered or isinstance(data, (IterableDataset, Mapping, str)):
            raise UserError(
                f"a {type(data).__name__} cannot be dealt out, as its examples have no numbers",
                hint="give a Dataset with __len__ and __getitem__, or inputs and targets as two tensors",
            )
        self._data = data

    def __len__(self) -> int:
        return len(cast(Any, self._data))

    def digest(self) -> str | None:
        """Of two tensors all of them, of other data a sample; None where it is not the same at every look."""
        if isinstance(self._data, TensorDataset):
            return digest(self._data.tensors)
        size = len(self)
        numbers = [place * size // SAMPLE for place in range(SAMPLE)] if size > SAMPLE else list(range(size))
        looks = []
        for _ in range(2):
            with _seeded():
                looks.append(digest(self.batch(numbers, torch.device("cpu"))))
        return looks[0] if looks[0] == looks[1] else None

    def batch(self, numbers: list[int], device: torch.device) -> tuple[Any, Any]:
        """Inputs and targets of some examples, read in this process.

        Raises:
            UserError: They cannot be read, or are no pairs of inputs and targets.
        """
        try:
            _, found = _Collate(self._collate)(_Numbered(self._data).__getitems__(numbers))
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"the examples of the data cannot be read as a batch: {first_line(error)}"
            ) from error
        inputs, targets, _ = read_batch(device, found)
        return inputs, targets

    def read(self, batches: Any, device: torch.device) -> Iterator[tuple[list[int], Any, Any]]:
        """Numbers, inputs and targets of batches, on the device.

        Args:
            batches: Lists of numbers.
            device: Where tensors are sent.
        """
        loader: Any = DataLoader(
            _Numbered(self._data), batch_sampler=batches, collate_fn=cast(Any, _Collate(self._collate)),
            num_workers=self._workers,
        )  # fmt: skip
        for numbers, batch in loader:
            inputs, targets, _ = read_batch(device, batch)
            yield numbers, inputs, targets


def _checked_pair(data: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Inputs and targets of all examples.

    Raises:
        UserError: They are no two tensors, or not of as many examples.
    """
    if len(data) != 2 or not all(isinstance(part, Tensor) and part.dim() for part in data):
        given = ", ".join(type(part).__name__ for part in data)
        raise UserError(
            f"data is a tuple ({given}), expected inputs and targets as two tensors",
            hint="torch.from_numpy makes tensors of arrays; for several inputs give a Dataset",
        )
    inputs, targets = data
    if len(inputs) != len(targets):
        raise UserError(f"data has {len(inputs)} inputs and {len(targets)} targets")
    return inputs, targets


@contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers every time, and the random states afterwards as they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


class _Numbered(Dataset[Any]):
    """Gives examples with their numbers, a batch at once."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __getitem__(self, number: int) -> Any:
        return number, self._data[number]

    def __getitems__(self, numbers: list[int]) -> tuple[list[int], Any]:
        """All examples of a batch: of tensors by one look-up."""
        if isinstance(self._data, TensorDataset):
            return numbers, _Ready(tuple(tensor[numbers] for tensor in self._data.tensors))
        fetch = getattr(self._data, "__getitems__", None)
        return numbers, fetch(numbers) if fetch else [self._data[number] for number in numbers]


class _Ready(tuple[Any, ...]):
    """A batch that needs no collating."""


class _Collate:
    """Collates the examples and leaves their numbers."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, found: tuple[list[int], Any]) -> tuple[list[int], Any]:
        numbers, examples = found
        ready = isinstance(examples, _Ready)
        return numbers, tuple(examples) if ready else self._collate(examples)
