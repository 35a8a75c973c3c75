"""Checkpoints: a file for each part and moment, so that a run that is killed goes on where all parts are."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from graphsplit.errors import UserError, first_line

FORMAT = 2
"""Of the files; those of format 1 had no end with a digest."""

OF_EXAMPLES = ("data", "shard")
"""Facts that are digests, or long."""


class Checkpoints:
    """A folder with a file for each part and moment, the last two moments of each.

    Files are written beside their place, forced to disk and renamed into it, so that a run that is killed,
    also while it writes, leaves whole ones. Each ends with the format and a digest of what is before.

    All parts are saved at a moment before any of them is saved at the next.

    Args:
        folder: Where; it is made.
        part: What a part is called in the names of files.
        moment: The same of a moment.
        mine: Parts that are in this process.
        gather: Gives a value of every process to every process.

    Raises:
        UserError: The folder cannot be written to.
    """

    def __init__(
        self, folder: Path, part: str, moment: str, mine: Sequence[int], gather: Callable[[Any], list[Any]]
    ) -> None:
        self.folder = folder
        self._part = part
        self._moment = moment
        self._mine = mine
        self._gather = gather
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise UserError(f"checkpoints cannot be written to {folder}: {error.strerror or error}") from None

    def _path(self, part: int, moment: int) -> Path:
        return self.folder / f"{self._part}_{part}.{self._moment}_{moment}.pt"

    def save(self, moment: int, part: int, state: dict[str, Any]) -> None:
        """Write a part.

        Raises:
            UserError: It cannot be written.
        """
        path = self._path(part, moment)
        beside = path.with_suffix(".new")
        try:
            with beside.open("w+b") as file:
                torch.save({"part": part, "moment": moment, "state": state}, file)
                file.flush()
                size = file.seek(0, os.SEEK_END)
                file.write(_end(file, size))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except (OSError, RuntimeError) as error:  # torch has its own for a disk that is full
            raise UserError(f"the checkpoint {path} cannot be written: {first_line(error)}") from error
        self._path(part, moment - 2).unlink(missing_ok=True)

    def newest(self) -> int | None:
        """The newest moment that every part has, in every process; None where there is none to go on from."""
        return max(set.intersection(*self._everywhere().values()), default=None)

    def refuse_more(self, newest: int, count: int) -> None:
        """Refuse to go on from more moments than the whole training has.

        Raises:
            UserError: The folder has more of them.
        """
        if newest >= count:
            raise UserError(
                f"{self.folder} has {newest + 1} {self._moment}s, and training is to have {count}",
                hint=f"ask for {newest + 1} or more, or give another folder",
            )

    def refuse_gaps(self) -> None:
        """Refuse a folder in which no moment is whole, though there was one that must have been.

        Raises:
            UserError: The first file that is missing.
        """
        parts = self._everywhere()
        newest = max(set.union(*parts.values()), default=0)
        lost = [part for part, moments in parts.items() if newest - 1 not in moments]
        if newest and lost:
            raise UserError(
                f"{self._path(lost[0], newest - 1)} is missing, though others of that time are there",
                hint="bring it back to go on, or give another folder to start anew",
            )

    def _everywhere(self) -> dict[int, set[int]]:
        """Moments of all parts, by the files that each process sees of its own."""
        found: dict[int, set[int]] = {}
        for here in self._gather({part: self.moments(part) for part in self._mine}):
            found |= here
        return found

    def moments(self, part: int) -> set[int]:
        """Moments of which a part has a file here."""
        names = [path.name for path in self.folder.glob(f"{self._part}_{part}.{self._moment}_*.pt")]
        return {int(found[1]) for found in map(_NUMBER.search, names) if found}

    @contextmanager
    def loading(self, moment: int, part: int, device: torch.device) -> Iterator[Any]:
        """What was saved of a part, to be taken over inside.

        Raises:
            UserError: The file is damaged, cannot be read, or what it holds does not fit.
        """
        path = self._path(part, moment)
        try:
            with path.open("rb") as file:
                _check_end(file)
                file.seek(0)
                found = torch.load(file, map_location=device, weights_only=True)
            if (found["part"], found["moment"]) != (part, moment):
                raise ValueError(f"it was {self._path(found['part'], found['moment']).name}")
            yield found["state"]
        except (*_UNFIT, OSError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{path} is no checkpoint of this training: {first_line(error)}",
                hint="give the same model and settings, or another folder",
            ) from None


_UNFIT = (RuntimeError, LookupError, ValueError, TypeError, AttributeError, EOFError)
"""What is raised where a state is of something else."""

_NUMBER = re.compile(r"_(\d+)\.pt$")

# The end of a file, of a fixed size. What torch reads may have something behind it.
_MARK = b"\ngraphsplit checkpoint "
_SIZE = len(_MARK) + 4 + 1 + 64
_END_OF_FORMAT_1 = b"PK\5\6"  # that of a zip archive without a comment, in its last 22 bytes


def _end(file: IO[bytes], size: int) -> bytes:
    """What ends a file whose state takes ``size`` bytes."""
    return _MARK + f"{FORMAT:4d} {_digest(file, size)}".encode()


def _digest(file: IO[bytes], size: int) -> str:
    """Of the first bytes of a file; it is left behind them."""
    found = hashlib.sha256()
    file.seek(0)
    while size and (piece := file.read(min(size, 1 << 20))):
        found.update(piece)
        size -= len(piece)
    return found.hexdigest()


def _check_end(file: IO[bytes]) -> None:
    """Refuse a file that is not as it was written.

    Raises:
        ValueError: It is of another format, or damaged.
    """
    size = file.seek(0, os.SEEK_END) - _SIZE
    file.seek(max(size, 0))
    end = file.read()
    if not end.startswith(_MARK):
        old = end[-22:-18] == _END_OF_FORMAT_1
        raise ValueError(
            f"it is of format 1, and {FORMAT} is read here" if old else "its end, with a digest, is not there"
        )
    number = end[len(_MARK) :].split()[0].decode()
    if number != str(FORMAT):
        raise ValueError(f"it is of format {number}, and {FORMAT} is read here")
    if end != _end(file, size):
        raise ValueError("it is damaged, as its digest is another one")


def check_same(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    """Refuse a checkpoint that was made with other settings.

    Raises:
        UserError: The first setting that differs.
    """
    for name, value in here.items():
        if there.get(name) != value:
            what = "other examples" if name in OF_EXAMPLES else f"{there.get(name)}, and is {value} here"
            raise UserError(
                f"{folder} is a checkpoint of another configuration: its {name} is {what}",
                hint="give the same settings and data, or another folder",
            )
