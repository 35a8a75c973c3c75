"""Several processes, started by torchrun: who trains what, and how all of them get everything."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from graphsplit.errors import UserError, first_line

# Those that have nothing left to train wait for those that have.
PATIENCE = timedelta(days=30)


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """Rank and number of processes; a gloo group is made, and taken down, where there is none.

    Raises:
        UserError: This process was not started by torchrun, or the processes cannot meet.
    """
    if dist.is_initialized():
        yield dist.get_rank(), dist.get_world_size()
        return
    if not dist.is_torchelastic_launched() and "MASTER_ADDR" not in os.environ:
        raise UserError(
            "training in parallel needs several processes",
            hint="start the script with torchrun --nproc-per-node=K script.py, or train in turn",
        )
    try:
        dist.init_process_group("gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the processes cannot meet at {where}: {first_line(error)}",
            hint="is the port in use? torchrun --standalone, or another --master-port, helps",
        ) from error
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


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
