"""``graphsplit export``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphsplit.cli import console
from graphsplit.cli.common import (
    Asked,
    Entry,
    Force,
    Inputs,
    Json,
    Opened,
    OptionalK,
    Outputs,
    Target,
    Verbose,
    in_place_of,
    open_either,
    refuse_taken_onnx,
)
from graphsplit.program import Program

if TYPE_CHECKING:
    from graphsplit.onnx_export import OnnxReport

Out = Annotated[
    Path, typer.Option("-o", "--out", metavar="FOLDER", help="The folder to write.", show_default=False)
]


def export(
    target: Target,
    out: Out,
    k: OptionalK = None,
    entry: Entry = None,
    inputs: Inputs = None,
    keep_output: Outputs = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write every sub-model, the merged model and the ensemble as ONNX; compare ONNX Runtime with torch.

    ensemble.onnx holds every sub-model as a function and gives the mean of their outputs.
    """
    refuse_taken_onnx(out, force=force)
    progress = console.Progress()
    opened = open_either(Asked(target, k, entry, inputs, keep_output), progress)
    with in_place_of(out) as folder:
        folder.mkdir()
        programs = _programs(opened)
        merged = {"merged.onnx": opened.partition.merged_program(opened.states)}
        rows, notes = export_all(programs | merged, folder, opened.example, progress)
        more, said = export_mean(list(programs.values()), folder, opened.example, progress)
        rows += more
        notes += [text for text in said if text not in notes]
        names = sorted(path.name for path in folder.iterdir())
    plan = opened.partition.plan
    if as_json:
        written = {"path": str(out), "files": {name: (out / name).stat().st_size for name in names}}
        console.json({"origin": opened.origin, "model": plan.model, "k": plan.k, "onnx": rows, "notes": notes,
                      "timings": progress.timings, "written": written})  # fmt: skip
        return
    console.say(f"{plan.model} from {opened.origin}, {plan.k} sub-models, the merged model and the ensemble")
    console.onnx(rows)
    console.notes(notes)
    console.timings(progress.timings)
    console.files(f"Written to {out}", out, names)


def _programs(opened: Opened) -> dict[str, Program]:
    """The sub-models by the names of their files."""
    divided = opened.partition
    pieces = divided.programs
    if opened.states is not None:
        pieces = tuple(
            program.with_state({name: state[name] for name in program.state if name in state})
            for program, state in zip(pieces, opened.states, strict=True)
        )
    return {f"submodel_{part}.onnx": program for part, program in enumerate(pieces)}


def export_all(
    programs: Mapping[str, Program], folder: Path, example: Any, progress: console.Progress
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write programs as ONNX; a row for each comparison, and notes."""
    from graphsplit.onnx_export import export_onnx  # takes seconds to import

    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for name, program in programs.items():
        with progress.step(f"export {name}"):
            report = export_onnx(program, folder / name, example=example)
        rows += onnx_rows(report)
        notes += [text for text in report.notes if text not in notes]
    return rows, notes


def export_mean(
    programs: Sequence[Program], folder: Path, example: Any, progress: console.Progress
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write sub-models as one ONNX file that gives their mean; a row for each comparison, and notes."""
    from graphsplit.onnx_ensemble import export_ensemble  # takes seconds to import

    with progress.step("export ensemble.onnx"):
        report = export_ensemble(programs, folder / "ensemble.onnx", example=example)
    return onnx_rows(report), list(report.notes)


def onnx_rows(report: OnnxReport) -> list[dict[str, Any]]:
    """A row for each comparison of a file."""
    return [
        {"file": report.path.name, "output": row.output, "sizes": dict(row.sizes), "absolute": row.absolute,
         "relative": row.relative, "tolerance": row.tolerance, "ok": row.ok}
        for row in report.rows
    ]  # fmt: skip
