"""``graphsplit fuse``."""

from __future__ import annotations

from typing import Annotated

import typer

from graphsplit._fuse import certify_fused
from graphsplit.bundle import save
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

OwnInputs = Annotated[
    bool, typer.Option("--own-inputs", help="Each sub-model has inputs of its own, on a dimension of K.")
]


def fuse(
    target: Target,
    out: Out,
    k: OptionalK = None,
    own_inputs: OwnInputs = False,
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
        fused = fuse_programs(programs, own_inputs=own_inputs)
    nodes = len(fused.program.graph().nodes)
    report = {**opened.facts, "nodes": nodes, "looped": dict(fused.looped)}
    certificate = None
    if not no_verify:
        with progress.step("verify"):
            certificate = certify_fused(programs[0], fused.k, own_inputs=own_inputs)
        report["certificate"] = certificate.to_data()
        check_to_write(certificate, lambda: report, as_json=as_json)
    with progress.step("write"):
        save(fused.program, out, overwrite=force)
    if as_json:
        console.json({**report, "timings": progress.timings, "written": written(out)})
        return
    console.say(f"{opened.words}, fused: {nodes} nodes")
    if fused.looped:
        ops = ", ".join(f"{name} ({count})" for name, count in sorted(fused.looped.items()))
        console.say(f"run once for each sub-model: {ops}")
    if certificate is not None:
        console.certificate(certificate.to_data())
    console.timings(progress.timings)
    console.files(f"Written to {out}", sorted(out.iterdir()))
