"""``graphsplit draw``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    refuse_taken_file,
)
from graphsplit.cli.opening import Asked, open_any
from graphsplit.drawing import check_suffix
from graphsplit.drawing import draw as figure_of

Out = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="FILE", help="The .html or .svg file to write.", show_default=False),
]
Depth = Annotated[
    int | None,
    typer.Option(
        "--depth", metavar="N", min=0, help="Open N levels of modules; as many as can be read unless given."
    ),
]


def draw(
    target: Target,
    out: Out,
    k: OptionalK = None,
    entry: Entry = None,
    inputs: Inputs = None,
    keep_output: Outputs = None,
    depth: Depth = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Draw the model, nested by module, with its parts in colours: HTML to explore, or a still SVG."""
    check_suffix(out)
    refuse_taken_file(out, force=force)
    progress = console.Progress()
    opened = open_any(Asked(target, k, entry, inputs, keep_output), progress)
    with progress.step("draw"):
        figure = figure_of(*opened.drawn(), out, depth)
    with in_place_of(out) as path:
        path.write_text(figure, encoding="utf-8", newline="\n")
    if as_json:
        file = {"path": str(out), "bytes": out.stat().st_size}
        console.json({**opened.facts, "timings": progress.timings, "written": file})
        return
    console.say(opened.words)
    console.timings(progress.timings)
    console.files("Written", [out])
