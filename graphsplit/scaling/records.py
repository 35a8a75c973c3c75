"""The folder of a study: its plan, and a file for each finished trial."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graphsplit.errors import BundleError
from graphsplit.scaling.plan import Cell, Plan, Settings, Trial, name_of

FORMAT = "graphsplit-study/2"


class Records:
    """Trials on disk. A file is written beside its place and renamed into it, so that none is half there."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.trials = self.folder / "trials"

    def open(self, plan: Plan) -> None:
        """Make the folder, or go on in it.

        Raises:
            BundleError: It holds a study of another configuration, or something else.
        """
        place = self.folder / "study.json"
        if not place.exists():
            if self.folder.exists() and not _is_free(self.folder):
                raise BundleError(
                    f"{self.folder} is no study, and is not replaced", hint="give another place"
                )
            self.trials.mkdir(parents=True, exist_ok=True)
            _write(place, {"format": FORMAT, "plan": asdict(plan)})
            return
        known = self.plan()
        if known.digest() != plan.digest():
            theirs, ours = asdict(known), asdict(plan)
            name = next(name for name in ours if theirs[name] != ours[name])
            raise BundleError(
                f"{self.folder} holds a study of another configuration: {name} is {theirs[name]!r} there "
                f"and {ours[name]!r} here",
                hint="give another folder, or the configuration of this one",
            )
        self.trials.mkdir(exist_ok=True)

    def plan(self) -> Plan:
        """The plan that the folder was made for.

        Raises:
            BundleError: There is none, or it is damaged.
        """
        place = self.folder / "study.json"
        data = _read(place)
        if data.get("format") != FORMAT:
            raise BundleError(f"{place} is not the plan of a study of format {FORMAT}")
        try:
            values: dict[str, Any] = {
                name: tuple(v) if isinstance(v, list) else v for name, v in data["plan"].items()
            }
            return Plan(**values)
        except (AttributeError, KeyError, TypeError) as error:
            raise BundleError(f"{place} is damaged: {error}") from error

    def finished(self, cell: Cell, count: int) -> dict[int, Trial]:
        """The trials of a cell that there are, by number."""
        places = {number: self.trials / name_of(cell, number) for number in range(count)}
        return {number: _trial(place) for number, place in places.items() if place.exists()}

    def all(self) -> list[Trial]:
        """Every finished trial, by cell and number."""
        plan = self.plan()
        return [t for cell in plan.cells() for t in self.finished(cell, plan.trials).values()]

    def add(self, trials: Sequence[Trial]) -> None:
        """Store finished trials."""
        for trial in trials:
            _write(self.trials / trial.name, asdict(trial))


def _is_free(folder: Path) -> bool:
    """A folder in which there is nothing but what another process of the same study is just making."""
    return folder.is_dir() and all(x.name == "trials" or x.name.startswith(".") for x in folder.iterdir())


def _write(place: Path, data: dict[str, Any]) -> None:
    beside = place.with_name(f".{place.name}-{secrets.token_hex(4)}")
    beside.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    os.replace(beside, place)


def _read(place: Path) -> dict[str, Any]:
    try:
        data = json.loads(place.read_text("utf-8"))
    except OSError as error:
        raise BundleError(f"{place} cannot be read: {error.strerror or error}") from error
    except ValueError:
        raise BundleError(f"{place} is damaged: it is no JSON") from None
    if not isinstance(data, dict):
        raise BundleError(f"{place} is damaged: it is no JSON object")
    return data


def _trial(place: Path) -> Trial:
    data = _read(place)
    try:
        data["cell"], data["settings"] = Cell(**data["cell"]), Settings(**data["settings"])
        return Trial(**data)
    except (KeyError, TypeError) as error:
        raise BundleError(
            f"{place} is damaged: {error}", hint="remove the file: it is tried again"
        ) from error
