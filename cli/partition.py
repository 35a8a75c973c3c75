"""``graphsplit partition``."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from graphsplit import exports
from graphsplit._api import Partition
from graphsplit.bundle import PartitionBundle, save, without_weights
from graphsplit.cli import console
from graphsplit.cli.common import (
    Entry,
    Fit,
    Force,
    Inputs,
    Json,
    Model,
    NoVerify,
    OptionalK,
    Out,
    Outputs,
    Seed,
    Shares,
    Start,
    Strategy,
    Verbose,
    Who,
    check_to_write,
    refuse_taken,
    written,
)
from graphsplit.cli.export import run_exports
from graphsplit.cli.opening import Asked, Opened, Options, open_model, parse_shares
from graphsplit.report import PartitionReport, partition_report
from graphsplit.verification import Certificate

Init = Annotated[
    Start,
    typer.Option(
        "--init", help="Weights of the sub-models: slices of the model's, rescaled slices, or fresh ones."
    ),
]
Onnx = Annotated[bool, typer.Option("--onnx", help="Also write every sub-model as ONNX.")]
Merged = Annotated[bool, typer.Option("--merged", help="Also write the merged model.")]


def partition(
    model: Model,
    out: Out,
    k: OptionalK = None,
    shares: Shares = None,
    strategy: Strategy = Who.contiguous,
    fit: Fit = None,
    entry: Entry = None,
    inputs: Inputs = None,
    keep_output: Outputs = None,
    init: Init = Start.slice,
    seed: Seed = 0,
    no_verify: NoVerify = False,
    onnx: Onnx = False,
    merged: Merged = False,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Split a model by width into K sub-models, prove it, and write all of it as a bundle."""
    refuse_taken(out, force=force)
    progress = console.Progress()
    options = Options(parse_shares(shares), strategy, fit, init, seed)
    opened = open_model(Asked(model, k, entry, inputs, keep_output), progress, options)
    divided = opened.partition
    with progress.step("slice"):
        submodels = divided.programs
    certificate = None if no_verify else _verified(divided, progress, opened.origin, as_json=as_json)
    with contextlib.ExitStack() as stack:
        rows: list[dict[str, Any]] = []
        extra: dict[str, bytes | Path] = {}
        if onnx:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            rows, extra = _exported(opened, folder, progress, merged=merged)
        with progress.step("write"):
            bundle = PartitionBundle(
                source=without_weights(divided.program),
                plan=divided.plan,
                submodels=submodels,
                merged=divided.merged_program() if merged else None,
                certificate=None if certificate is None else certificate.to_data(),
                files=extra,
            )
            save(bundle, out, overwrite=force)
    report = partition_report(divided, certificate, progress.timings)
    if as_json:
        console.json({"origin": opened.origin, **report, "onnx": rows, "written": written(out)})
    else:
        _show(report, opened.origin, rows, out)


def _verified(divided: Partition, progress: console.Progress, origin: str, *, as_json: bool) -> Certificate:
    """The certificate; where it does not hold it is shown, and nothing is written."""
    with progress.step("verify"):
        certificate = divided.verify()

    def report() -> dict[str, Any]:
        return {"origin": origin, **partition_report(divided, certificate, progress.timings)}

    check_to_write(certificate, report, as_json=as_json)
    return certificate


def _exported(
    opened: Opened, folder: Path, progress: console.Progress, *, merged: bool
) -> tuple[list[dict[str, Any]], dict[str, bytes | Path]]:
    programs = exports.of_submodels(opened.partition.programs)
    if merged:
        programs["merged.onnx"] = opened.partition.merged_program()
    rows, _ = run_exports(exports.of_programs(programs, folder, opened.example), progress)
    return rows, {path.name: path for path in sorted(folder.iterdir())}


def _show(report: PartitionReport, origin: str, rows: list[dict[str, Any]], out: Path) -> None:
    console.partition(report, origin)
    if rows:
        console.onnx(rows)
    console.timings(report["timings"])
    console.files(f"Written to {out}", sorted(out.iterdir()))
    weights = " ".join(f"weights_{part}.safetensors" for part in range(min(report["k"], 2)))
    more = " ..." if report["k"] > 2 else ""
    console.commands(
        "Next: train the sub-models, save their state dicts as safetensors, and merge them",
        [f"graphsplit merge {out} {weights}{more} -o {out.name}-merged"],
    )
