"""Several processes, started by torchrun: who trains what, and how all of them get everything."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from graphsplit.errors import UserError, first_line

# Those that have nothing left to train wait for those that have.
PATIENCE = timedelta(days=30)


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Rank and number of processes; a gloo group is made where there is none.

    It is kept for what is trained next, as processes that meet a second time may find what is left of the
    first meeting. Where training fails, or at the end of the process, it is taken down.

    Raises:
        UserError: This process was not started by torchrun, or the processes cannot meet.
    """
    if not dist.is_initialized():
        _meet()
    try:
        yield dist.get_rank(), dist.get_world_size()
    except BaseException:
        _part()
        raise


def _meet() -> None:
    """Make the default group."""
    if not dist.is_torchelastic_launched() and "MASTER_ADDR" not in os.environ:
        raise UserError(
            "training in parallel needs several processes",
            hint="start the script with torchrun --nproc-per-node=K script.py, or train in turn",
        )
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
        store.set_timeout(PATIENCE)
        # After a restart torchrun's store may still hold where the processes before could be met.
        attempt = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("gloo", store=attempt, rank=rank, world_size=world, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the processes cannot meet at {where}: {first_line(error)}",
            hint="is the port in use? torchrun --standalone, or another --master-port, helps",
        ) from error
    _ours.append(dist.group.WORLD)
    atexit.register(_part)


def _part() -> None:
    """Take the default group down, if it is ours."""
    if dist.is_initialized() and dist.group.WORLD in _ours:
        _ours.clear()
        dist.destroy_process_group()


_ours: list[dist.ProcessGroup | None] = []


@contextmanager
def naming_the_lost(who: str) -> Iterator[None]:
    """Turn what torch.distributed raises when another process is gone into one sentence.

    Args:
        who: What this process has.
    """
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(
            f"{who} lost another process: {first_line(error)}",
            hint="see the output of the others; start again with checkpoint= to go on where it stopped",
        ) from error


# Last words of a process, and how long one that stops waits for that of another.
ALL_IS_WELL, IT_STOPS = 0.0, 1.0
MOMENT = timedelta(seconds=2)


class Watch:
    """Notices that another process is gone, also between two collectives.

    Each process waits, in a thread of its own, for a last word of the one before it, which a process that is
    lost never says: its connections close at once. Those behind it follow, as each that notices stops.

    Used as ``with Watch(who) as watch``: a process that stops by an error says so, and waits a moment for its
    thread, as one that still listens when Python ends aborts the process.

    Args:
        who: What this process has.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._next = (self._rank + 1) % self._world
        self._lost: Exception | None = None
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        if self._world > 1:
            self._thread.start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._close()
        else:
            self._leave()

    def _listen(self) -> None:
        word = torch.full((1,), ALL_IS_WELL)
        try:
            dist.recv(word, (self._rank - 1) % self._world, group=self._group)
        except Exception as error:  # told by `check`
            self._lost = error
        if float(word) != ALL_IS_WELL:
            self._lost = RuntimeError("it stopped by an error of its own")

    def check(self) -> None:
        """Raise where another process is gone.

        Raises:
            UserError: One is.
        """
        if self._lost is not None:
            with naming_the_lost(self._who):
                raise self._lost

    def _close(self) -> None:
        """Say the last word, and wait for that of the process before."""
        if self._world > 1:
            with naming_the_lost(self._who):
                dist.send(torch.full((1,), ALL_IS_WELL), self._next, group=self._group)
            self._thread.join()
            self.check()
        dist.destroy_process_group(self._group)

    def _leave(self) -> None:
        """Say that this process stops."""
        if self._world > 1:
            with contextlib.suppress(RuntimeError, dist.DistError):  # the other one may be gone
                word = dist.isend(torch.full((1,), IT_STOPS), self._next, group=self._group)
                if word is not None:
                    word.wait(MOMENT)
            self._thread.join(MOMENT.total_seconds())


def gather(mine: dict[int, Any], count: int) -> list[Any]:
    """What each of ``count`` sub-models left, in their order, for every process.

    Args:
        mine: Results of this process by sub-model; tensors on the CPU.
        count: Number of sub-models.
    """
    found: list[dict[int, Any] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine, group=cpu_group())
    together: dict[int, Any] = {}
    for results in found:
        together |= results or {}
    return [together[part] for part in range(count)]


def share(value: Sequence[Any] | None) -> list[Any]:
    """A list that process 0 gives, for every process."""
    box: list[Any] = [list(value) if value is not None else None]
    dist.broadcast_object_list(box, src=0, group=cpu_group())
    found: list[Any] = box[0]
    return found


def cpu_group() -> dist.ProcessGroup | None:
    """The group for objects in main memory: the default one, unless that is NCCL."""
    if dist.get_backend() != "nccl":
        return None
    return _gloo_beside(dist.group.WORLD)


@functools.cache
def _gloo_beside(_: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A gloo group of the same processes, made once for each default group."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=PATIENCE)
    return group
