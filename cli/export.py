"""``graphsplit export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphsplit.cli import console
from graphsplit.cli.common import (
    Entry,
    Force,
    Inputs,
    Json,
    OptionalK,
    Outputs,
    Target,
    Verbose,
    in_place_of,
    refuse_taken_onnx,
    written,
)
from graphsplit.cli.opening import Asked, open_any
from graphsplit.exports import Exports

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
    """Write every piece of a model as ONNX, and compare ONNX Runtime with torch.

    Of a partition: every sub-model, the merged model, and ensemble.onnx, which holds every sub-model as a
    function and gives the mean of their outputs. Of a bundle of layer groups: every group; with local critics
    also every sub-model, and anytime.onnx, which leaves early.
    """
    refuse_taken_onnx(out, force=force)
    progress = console.Progress()
    opened = open_any(Asked(target, k, entry, inputs, keep_output), progress)
    with in_place_of(out) as folder:
        folder.mkdir()
        rows, notes = run_exports(opened.exports(folder), progress)
    if as_json:
        console.json({**opened.facts, "onnx": rows, "notes": notes, "timings": progress.timings,
                      "written": written(out)})  # fmt: skip
        return
    console.say(opened.words)
    console.onnx(rows)
    console.notes(notes)
    console.timings(progress.timings)
    console.files(f"Written to {out}", sorted(out.iterdir()))


def run_exports(exports: Exports, progress: console.Progress) -> tuple[list[dict[str, Any]], list[str]]:
    """Write ONNX files; a row for each comparison, and notes."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for name, write in exports.items():
        with progress.step(f"export {name}"):
            report = write()
        rows += _rows(report)
        notes += [text for text in report.notes if text not in notes]
    return rows, notes


def _rows(report: OnnxReport) -> list[dict[str, Any]]:
    """A row for each comparison of a file."""
    return [
        {"file": report.path.name, "output": row.output, "sizes": dict(row.sizes), "absolute": row.absolute,
         "relative": row.relative, "tolerance": row.tolerance, "ok": row.ok}
        for row in report.rows
    ]  # fmt: skip
