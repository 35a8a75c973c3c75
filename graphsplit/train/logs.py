"""Logs of training by the user's choice: callbacks for ``on_epoch`` and ``on_round``.

They take the record of any kind of training, as all are dataclasses: its numbers go under their names, those
of a tuple under ``name.0``, ``name.1`` and so on; those of a `Round` stand at the number of their worker.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

from graphsplit.errors import UserError, first_line
from graphsplit.train.rounds import Round


def numbers_of(record: Any) -> dict[str, float | int | None]:
    """The numbers of a record by name."""
    found: dict[str, float | int | None] = {}
    values = record.numbers() if isinstance(record, Round) else dataclasses.asdict(record)
    for name, value in values.items():
        if isinstance(value, (tuple, list)):
            found |= {f"{name}.{place}": item for place, item in enumerate(value)}
        else:
            found[name] = value
    return found


class CSVLog:
    """Appends a line for every record; the first record of a new file makes the columns.

    A file of an earlier run is gone on with; it has to have the same columns.

    Args:
        path: The file.

    Raises:
        UserError: It cannot be read; when called: written, or it has other columns than the record.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._columns: list[str] = []
        if self.path.exists():
            try:
                with self.path.open(newline="", encoding="utf-8") as file:
                    self._columns = next(csv.reader(file), [])
            except (OSError, ValueError, csv.Error) as error:
                raise UserError(f"the log {self.path} cannot be read: {first_line(error)}") from error

    def __call__(self, record: Any) -> None:
        """Write a record."""
        row = numbers_of(record)
        new = not self._columns
        if new:
            self._columns = list(row)
        if other := sorted(row.keys() ^ set(self._columns)):
            here = "has a column" if other[0] in self._columns else "has no column"
            raise UserError(
                f"the log {self.path} {here} {other[0]}, as that of another kind of run",
                hint="give a file for each kind of run",
            )
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns)
                if new:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise UserError(f"the log {self.path} cannot be written: {error.strerror or error}") from error


class TensorBoardLog:
    """Writes every number of a record as a scalar, at the record's number.

    Args:
        folder: Where TensorBoard looks.

    Raises:
        UserError: The package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "TensorBoard is not installed", hint="pip install tensorboard, or use CSVLog"
            ) from None
        self._writer: Any = SummaryWriter(str(folder))

    def __call__(self, record: Any) -> None:
        """Write a record."""
        row = numbers_of(record)
        step = row.pop("number", 0)
        for name, value in row.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()
