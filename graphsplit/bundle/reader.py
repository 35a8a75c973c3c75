"""What the files of a bundle hold, after they have been checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graphsplit.bundle.folder import parsing
from graphsplit.errors import BundleError, PlanError
from graphsplit.program import Program
from graphsplit.serialization import decode, program_from_data

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Reader:
    """Files that have been checked.

    Attributes:
        folder: Where they are.
        manifest: What is where.
        device: Of the tensors that are read.
    """

    folder: Path
    manifest: dict[str, Any]
    device: torch.device

    def plan(self, read: Callable[[str], Plan]) -> Plan:
        """The plan, by what reads its text."""
        path = self.path(self.manifest["plan"])
        try:
            return read(path.read_text("utf-8"))
        except PlanError as error:
            raise BundleError(f"{path}: {error.message}", hint=error.hint) from error

    def path(self, name: Any) -> Path:
        """Where a file is; only files that were checked have a place."""
        if name not in self.manifest["files"]:
            raise ValueError(f"it names no digest for {name!r}")
        return self.folder / str(name)

    def program(self, entry: Mapping[str, Any]) -> Program:
        """A program, by its entry of the manifest."""
        graph = self.path(entry["graph"])
        with parsing(graph):
            data = json.loads(graph.read_bytes())
            paired = {row["name"] for row in data["state"] if row["dtype"].startswith("complex")}
        weights = entry["weights"]
        tensors = {} if weights is None else _read_tensors(self.path(weights), paired, self.device)
        try:
            return program_from_data(data, tensors)
        except BundleError as error:
            raise BundleError(f"{graph}: {error.message}", hint=error.hint or self._skew()) from error

    def programs(self, entries: Sequence[Mapping[str, Any]]) -> tuple[Program, ...]:
        """Several programs."""
        return tuple(map(self.program, entries))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file."""
        return _read_tensors(self.path(name), set(), self.device)

    def certificate(self) -> dict[str, Any] | None:
        """The certificate."""
        found: dict[str, Any] | None = decode(self.manifest["certificate"])
        return found

    def files(self) -> dict[str, Path]:
        """Where further files are."""
        return {name: self.path(name).absolute() for name in self.manifest["extra"]}

    def _skew(self) -> str | None:
        """A hint where another version of torch wrote the bundle."""
        written, present = self.manifest["tools"]["torch"], str(torch.__version__)
        return None if written == present else f"it was saved with torch {written}, this is {present}"


def _read_tensors(path: Path, paired: set[str], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a file, in memory of their own: a mapped file could change under them."""
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name).clone()
                tensors[name] = torch.view_as_complex(tensor) if name in paired else tensor
    except (RuntimeError, SafetensorError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error
    return {name: tensor.to(device) for name, tensor in tensors.items()}
