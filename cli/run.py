"""``graphsplit run``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from graphsplit.bundle import PartitionBundle, save, without_weights
from graphsplit.cli import console
from graphsplit.cli.common import Entry, Force, Inputs, Json, Model, Outputs, Verbose, refuse_taken
from graphsplit.errors import BundleError
from graphsplit.loading import load_model
from graphsplit.passes import Pipeline, Programs
from graphsplit.program import Program
from graphsplit.tracing import trace

Text = Annotated[
    str,
    typer.Argument(metavar="PIPELINE", help="Passes, such as 'partition(k=2) | merge'.", show_default=False),
]
Out = Annotated[
    Path | None, typer.Option("-o", "--out", metavar="FOLDER", help="Write what comes out as a bundle.")
]


def run(
    model: Model,
    pipeline: Text,
    out: Out = None,
    entry: Entry = None,
    inputs: Inputs = None,
    keep_output: Outputs = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a pipeline of passes over a model; programs are checked before the first pass and after each."""
    passes = Pipeline.parse(pipeline)
    if out is not None:
        refuse_taken(out, force=force)
    progress = console.Progress()
    with progress.step("load"):
        loaded = load_model(model, entry=entry, inputs=inputs or ())
    with progress.step("trace"):
        program = trace(loaded.model, loaded.args, loaded.kwargs, outputs=keep_output or loaded.outputs)
    with progress.step("run"):
        result = passes(program)
    if out is not None:
        with progress.step("write"):
            save(_content(result), out, overwrite=force)
    steps = [asdict(timing) for timing in passes.timings]
    rows = [
        {"name": str(number), "parameters": item.parameter_count(), "nodes": len(item.graph().nodes)}
        for number, item in enumerate(result.items)
    ]
    if as_json:
        console.json({"origin": model, "model": program.name, "pipeline": str(passes), "passes": steps,
                      "programs": rows, "timings": progress.timings,
                      "written": None if out is None else str(out)})  # fmt: skip
        return
    console.say(f"{program.name} from {model}: {passes}")
    console.passes(steps)
    console.programs(rows)
    console.timings(progress.timings)
    if out is not None:
        console.commands("Written", [str(out)])


def _content(result: Programs) -> Program | PartitionBundle:
    """What a bundle can hold: one program, or the K of one model."""
    if len(result.items) == 1:
        return result.items[0]
    analysis = result.analysis
    if analysis is None or len(result.items) != analysis.k:
        raise BundleError(
            f"{len(result.items)} programs that do not belong to one partition have no bundle",
            hint="end the pipeline with one program, or with partition",
        )
    return PartitionBundle(without_weights(analysis.program), analysis.plan, result.items)
