"""Checkpoints: a file for each part and moment, so that a run that is killed goes on where all parts are."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from graphsplit.errors import UserError, first_line


class Checkpoints:
    """A folder with a file for each part and moment, the last two moments of each.

    Files are written beside their place, forced to disk and renamed into it, so that a run that is killed,
    also while it writes, leaves whole ones.

    Args:
        folder: Where; it is made.
        part: What a part is called in the names of files.
        moment: The same of a moment.
        mine: Parts that are in this process.
        gather: Gives a value of every process to every process.
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
        except OSError as error:
            raise UserError(f"checkpoints cannot be written to {folder}: {error.strerror or error}") from None

    def _path(self, part: int, moment: int) -> Path:
        return self.folder / f"{self._part}_{part}.{self._moment}_{moment}.pt"

    def save(self, moment: int, part: int, state: dict[str, Any]) -> None:
        """Write a part."""
        path = self._path(part, moment)
        beside = path.with_suffix(".new")
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        self._path(part, moment - 2).unlink(missing_ok=True)

    def newest(self) -> int | None:
        """The newest moment that every part has, in every process."""
        here = set.intersection(*map(self.moments, self._mine))
        return max(set.intersection(*self._gather(here)), default=None)

    def moments(self, part: int) -> set[int]:
        """Moments of which a part has a file here."""
        names = [path.name for path in self.folder.glob(f"{self._part}_{part}.{self._moment}_*.pt")]
        return {int(found[1]) for found in map(_NUMBER.search, names) if found}

    @contextmanager
    def loading(self, moment: int, part: int, device: torch.device) -> Iterator[Any]:
        """What was saved of a part, to be taken over inside.

        Raises:
            UserError: The file cannot be read, or what it holds does not fit.
        """
        path = self._path(part, moment)
        try:
            yield torch.load(path, map_location=device, weights_only=True)
        except (RuntimeError, KeyError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{path} is no checkpoint of this training: {first_line(error)}",
                hint="give the same model and settings, or another folder",
            ) from None


_NUMBER = re.compile(r"_(\d+)\.pt$")


def check_same(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path) -> None:
    """Refuse a checkpoint that was made with other settings.

    Raises:
        UserError: The first setting that differs.
    """
    for name, value in here.items():
        if there.get(name) != value:
            long = isinstance(value, list)
            what = "other examples" if long else f"{there.get(name)}, and is {value} here"
            raise UserError(
                f"{folder} is a checkpoint of another configuration: its {name} is {what}",
                hint="give the same settings and data, or another folder",
            )
