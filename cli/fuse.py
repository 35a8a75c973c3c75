"""``graphsplit fuse``."""

from __future__ import annotations

from typing import Annotated

import typer

from graphsplit._fuse import certify_fused
from graphsplit.bundle import FusedBundle, save, without_weights
from graphsplit.cli import console
from graphsplit.cli.common import (
    Entry,
    Force,
    Inputs,
    Json,
    NoVerify,
    OptionalK,
    Out,
    Outputs,
    Target,
    Verbose,
    check_to_write,
    refuse_taken,
    written,
)
from graphsplit.cli.opening import Asked, open_width
from graphsplit.passes.fuse import fuse as fuse_programs
from graphsplit.passes.fuse import fuse_where_it_pays

OwnInputs = Annotated[
    bool, typer.Option("--own-inputs", help="Each sub-model has inputs of its own, on a dimension of K.")
]


Auto = Annotated[
    bool, typer.Option("--auto", help="Measure, and run one sub-model after the other where that is faster.")
]


def fuse(
    target: Target,
    out: Out,
    k: OptionalK = None,
    own_inputs: OwnInputs = False,
    auto: Auto = False,
    entry: Entry = None,
    inputs: Inputs = None,
    keep_output: Outputs = None,
    no_verify: NoVerify = False,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write the K sub-models of a model or bundle as one program in which every op does the work of all.

    Its outputs have a leading dimension of K.
    """
    refuse_taken(out, force=force)
    progress = console.Progress()
    opened = open_width(Asked(target, k, entry, inputs, keep_output), progress)
    programs = opened.pieces()
    with progress.step("fuse"):
        make = fuse_where_it_pays if auto else fuse_programs
        fused = make(programs, own_inputs=own_inputs)
    nodes = len(fused.program.graph().nodes)
    report = {**opened.facts, "nodes": nodes, "looped": dict(fused.looped), "in_turn": fused.in_turn}
    if fused.cost is not None:
        report["seconds"] = {"in_turn": fused.cost.in_turn, "fused": fused.cost.fused}
    certificate = None
    if not no_verify:
        with progress.step("verify"):
            certificate = certify_fused(fused)
        report["certificate"] = certificate.to_data()
        check_to_write(certificate, lambda: report, as_json=as_json)
    with progress.step("write"):
        data = None if certificate is None else certificate.to_data()
        singles = tuple(map(without_weights, fused.singles))
        save(
            FusedBundle(
                fused.program,
                singles,
                fused.k,
                fused.placements,
                fused.looped,
                fused.in_turn,
                certificate=data,
            ),
            out,
            overwrite=force,
        )
    if as_json:
        console.json({**report, "timings": progress.timings, "written": written(out)})
        return
    console.say(f"{opened.words}, {'one after the other' if fused.in_turn else 'fused'}: {nodes} nodes")
    if fused.cost is not None:
        console.say(f"forward and backward: {fused.cost}" + (", so not fused" if fused.in_turn else ""))
    if fused.looped and not fused.in_turn:
        ops = ", ".join(f"{name} ({count})" for name, count in sorted(fused.looped.items()))
        console.say(f"run once for each sub-model: {ops}")
    if certificate is not None:
        console.certificate(certificate.to_data())
    console.timings(progress.timings)
    console.files(f"Written to {out}", sorted(out.iterdir()))
