"""What is to be written: an object taken apart into texts, tensors and further files."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from graphsplit.errors import BundleError
from graphsplit.program import Program, StateEntry
from graphsplit.serialization import encode, program_to_data

MANIFEST = "manifest.json"
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", re.ASCII)


@dataclass(frozen=True)
class Content:
    """An object taken apart; ``index`` is the part of the manifest that says what is where."""

    kind: str
    model: str
    index: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    files: dict[str, bytes | Path] = field(default_factory=dict)

    def add(self, name: str, program: Program) -> dict[str, str | None]:
        """Take in a program under a name; returns its entry of the index."""
        graph = f"{name}.graph.json"
        self.texts[graph] = _lines(program_to_data(program)) + "\n"
        tensors = {
            entry.name: _storable(entry) for entry in program.state.values() if not entry.tensor.is_meta
        }
        if not tensors:
            return {"graph": graph, "weights": None}
        weights = f"{name}.safetensors"
        self.tensors[weights] = tensors
        return {"graph": graph, "weights": weights}

    def add_all(self, name: str, programs: Sequence[Program]) -> list[dict[str, str | None]]:
        """Take in several programs under a name with numbers; returns their entries."""
        return [self.add(f"{name}_{number}", program) for number, program in enumerate(programs)]

    def add_rest(self, certificate: dict[str, Any] | None, files: Mapping[str, bytes | Path]) -> None:
        """Take in a certificate, and further files under their names."""
        self.index["certificate"] = encode(certificate, "the certificate")
        self.index["extra"] = sorted(files)
        taken = {name.casefold() for name in (MANIFEST, *self.texts, *self.tensors)}
        for name, source in sorted(files.items()):
            if not FILE_NAME.fullmatch(name) or name.casefold() in taken:
                raise BundleError(
                    f"a file of a bundle cannot be called {name!r}",
                    hint="use letters, digits, dots and dashes, once",
                )
            taken.add(name.casefold())
            self.files[name] = source


def _storable(entry: StateEntry) -> Tensor:
    """The values of a state tensor as safetensors takes them; complex ones as pairs of real ones."""
    tensor = entry.tensor.detach()
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        raise BundleError(
            f"the state {entry.name} is no plain dense tensor ({type(tensor).__name__}, {tensor.layout})",
            hint="only dense tensors can be saved",
        )
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not _has_format(tensor.dtype):
        raise BundleError(f"the state {entry.name} is of {tensor.dtype}, which safetensors cannot write")
    return tensor


@functools.lru_cache(maxsize=64)
def _has_format(dtype: torch.dtype) -> bool:
    try:
        return dtype in {value.dtype for value in _round_trip(torch.empty(0, dtype=dtype)).values()}
    except (LookupError, RuntimeError, TypeError, ValueError, SafetensorError):
        return False


def _round_trip(tensor: Tensor) -> dict[str, Tensor]:
    return safetensors.torch.load(safetensors.torch.save({"tensor": tensor}))


def _lines(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry of the outermost object and each item of its lists of containers."""
    inner = indent + "  "
    if isinstance(value, dict) and not indent:
        items = [f"{inner}{json.dumps(key)}: {_lines(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + "\n}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "[\n" + ",\n".join(inner + _lines(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
