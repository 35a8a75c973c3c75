"""``graphsplit draw``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphsplit.cli import console
from graphsplit.cli.common import (
    Asked,
    Entry,
    Force,
    Inputs,
    Json,
    OptionalK,
    Outputs,
    Target,
    Verbose,
    in_place_of,
    open_either,
    refuse_taken_file,
)
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
    opened = open_either(Asked(target, k, entry, inputs, keep_output), progress)
    divided = opened.partition
    with progress.step("draw"):
        figure = figure_of(divided.program, divided.analysis, out, depth)
    with in_place_of(out) as path:
        path.write_text(figure, encoding="utf-8", newline="\n")
    size = out.stat().st_size
    if as_json:
        console.json(
            {"origin": opened.origin, "model": divided.plan.model, "k": divided.k,
             "timings": progress.timings, "written": {"path": str(out), "bytes": size}}
        )  # fmt: skip
        return
    console.say(f"{divided.plan.model} from {opened.origin}, {divided.k} sub-models")
    console.timings(progress.timings)
    console.files("Written", out.parent, [out.name])
