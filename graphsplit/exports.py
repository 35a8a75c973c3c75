"""Which ONNX files a divided model gives, by their names, and what writes each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphsplit._layer_groups import LayerGroups
from graphsplit._local_critics import LocalCritics
from graphsplit._synthetic_halves import SyntheticHalves
from graphsplit.program import Program

if TYPE_CHECKING:
    from graphsplit.onnx_export import OnnxReport

Depth = LayerGroups | LocalCritics | SyntheticHalves
"""A model that is cut by depth."""
Exports = dict[str, Callable[[], "OnnxReport"]]


def of_programs(programs: Mapping[str, Program], folder: Path, example: Any = None) -> Exports:
    """A file for each program; ``example`` are inputs to compare on."""
    from graphsplit.onnx_export import export_onnx  # takes seconds to import

    return {
        name: partial(export_onnx, program, folder / name, example=example)
        for name, program in programs.items()
    }


def of_submodels(pieces: Sequence[Program]) -> dict[str, Program]:
    """Sub-models by the names of their files."""
    return {f"submodel_{number}.onnx": program for number, program in enumerate(pieces)}


def of_partition(pieces: Sequence[Program], merged: Program, folder: Path, example: Any = None) -> Exports:
    """Files of sub-models, of the merged model and of the ensemble."""
    from graphsplit.onnx_ensemble import export_ensemble

    place = folder / "ensemble.onnx"
    return {
        **of_programs(of_submodels(pieces) | {"merged.onnx": merged}, folder, example),
        place.name: partial(export_ensemble, pieces, place, example=example),
    }


def of_depth(obj: Depth, folder: Path, example: Any = None) -> Exports:
    """Files of groups; with critics those of the sub-models, too, and one that leaves early."""
    from graphsplit.onnx_anytime import export_anytime

    groups = obj if isinstance(obj, LayerGroups) else obj.groups
    programs = groups.current_programs()
    pieces = {f"group_{number}.onnx": program for number, program in enumerate(programs)}
    if isinstance(obj, LocalCritics):
        pieces |= of_submodels([obj.submodel_program(number) for number in range(obj.n + 1)])
    found: Exports = {}
    for name, program in pieces.items():
        own = example if program.signature.inputs == groups.program.signature.inputs else None
        found |= of_programs({name: program}, folder, own)
    if isinstance(obj, LocalCritics) and obj.n:
        critics = [obj.critic_program(number) for number in range(obj.n)]
        place = folder / "anytime.onnx"
        found[place.name] = partial(export_anytime, programs, critics, obj.mains, place, example=example)
    return found
