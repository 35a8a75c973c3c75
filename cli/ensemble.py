"""``graphsplit ensemble``."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from graphsplit import exports
from graphsplit._ensemble import ensemble as make_ensemble
from graphsplit._ensemble import from_bundle
from graphsplit.answers import Answers as Kind
from graphsplit.bundle import EnsembleBundle, MaskBundle, PartitionBundle, PrunedBundle, load, save
from graphsplit.cli import console
from graphsplit.cli.common import (
    Entry,
    Force,
    Inputs,
    Json,
    NoVerify,
    Out,
    Outputs,
    Verbose,
    check_to_write,
    refuse_taken,
    written,
)
from graphsplit.cli.export import run_exports
from graphsplit.cli.opening import single_program, what_is_in
from graphsplit.emission import ProgramModule
from graphsplit.ensembles import Average as AverageName
from graphsplit.errors import BundleError
from graphsplit.loading import load_model
from graphsplit.program import Program
from graphsplit.tracing import trace


class Answered(StrEnum):
    """What outputs are."""

    classes = "classes"
    classes_last = "classes_last"
    binary = "binary"
    values = "values"


class Averaged(StrEnum):
    """What is averaged."""

    outputs = "outputs"
    probabilities = "probabilities"


Members = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL|BUNDLE...",
        help="Models, as for inspect, and bundles: of one program, of a partition, whose sub-models "
        "are members, or of an ensemble, which is one member with weights of its own; alone it is opened.",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="A,B,...",
        help="A weight for each member; 1/K unless given, or those of an ensemble that is opened.",
    ),
]
Average = Annotated[
    Averaged | None,
    typer.Option(
        "--average",
        help="What is averaged: outputs as they are, or their softmax over the classes; outputs unless "
        "given, or as in an ensemble that is opened.",
    ),
]
Answers = Annotated[
    Answered | None,
    typer.Option(
        "--answers",
        help="What outputs are, where shapes cannot tell: scores of classes in dimension 1 or in the last, "
        "of yes or no, or values.",
    ),
]
Onnx = Annotated[bool, typer.Option("--onnx", help="Also write the ensemble as ONNX.")]


def ensemble(
    members: Members,
    out: Out,
    weights: Weights = None,
    average: Average = None,
    answers: Answers = None,
    entry: Entry = None,
    inputs: Inputs = None,
    keep_output: Outputs = None,
    no_verify: NoVerify = False,
    onnx: Onnx = False,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Join models to one, whose output is the weighted sum of theirs, and write it as a bundle."""
    refuse_taken(out, force=force)
    numbers = _numbers(weights)
    progress = console.Progress()
    found = [part for name in members for part in _members(name, entry, inputs, keep_output, progress)]
    averaged: AverageName = "outputs" if average is None else average.value
    kind: Kind | None = None if answers is None else answers.value
    rule: Literal["simple", "margin"] | tuple[float, ...] = "simple"
    if len(found) == 1 and isinstance(found[0], EnsembleBundle):  # opened
        opened = found[0]
        found = list(opened.members)
        averaged = opened.options["average"] if average is None else averaged
        kind = opened.options.get("answers") if answers is None else kind
        rule = "margin" if opened.options["rule"] == "margin" else opened.weights
    programs = [from_bundle(part).program() if isinstance(part, EnsembleBundle) else part for part in found]
    with progress.step("join"):
        made = make_ensemble(
            programs, rule if numbers is None else numbers, average=averaged, answers=kind
        ).eval()
    report: dict[str, Any] = {
        "members": [program.name for program in programs],
        "k": made.k,
        "weights": made.weights.tolist(),
        "average": made.average,
        "fused": made.fused,
        "parameters": sum(program.parameter_count() for program in programs),
    }
    bundle = made.to_bundle()
    if not no_verify:
        with progress.step("verify"):
            certificate = made.verify()
        report["certificate"] = certificate.to_data()
        check_to_write(certificate, lambda: report, as_json=as_json)
        bundle = replace(bundle, certificate=certificate.to_data())
    with contextlib.ExitStack() as stack:
        rows: list[dict[str, Any]] = []
        if onnx:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            rows, _ = run_exports(exports.of_programs({"ensemble.onnx": made.program()}, folder), progress)
            bundle = replace(bundle, files={path.name: path for path in sorted(folder.iterdir())})
        with progress.step("write"):
            save(bundle, out, overwrite=force)
    if as_json:
        console.json({**report, "onnx": rows, "timings": progress.timings, "written": written(out)})
        return
    how = "fused" if made.fused else "one after the other"
    console.say(f"{made.k} models of {report['parameters']:,} parameters in all, {how}")
    console.say(f"weights of {made.average}: {', '.join(f'{weight:.4g}' for weight in report['weights'])}")
    if "certificate" in report:
        console.certificate(report["certificate"])
    if rows:
        console.onnx(rows)
    console.timings(progress.timings)
    console.files(f"Written to {out}", sorted(out.iterdir()))


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--weights {text}: expected numbers, such as 0.5,0.3,0.2; by regression only in Python"
        ) from None


def _members(
    name: str,
    entry: str | None,
    inputs: Sequence[str] | None,
    outputs: Sequence[str] | None,
    progress: console.Progress,
) -> list[Program | EnsembleBundle]:
    """The members that a model or bundle gives."""
    if not Path(name).is_dir():
        with progress.step(f"trace {name}"):
            loaded = load_model(name, entry=entry, inputs=inputs or ())
            return [trace(loaded.model, loaded.args, loaded.kwargs, outputs=outputs or loaded.outputs)]
    with progress.step(f"read {name}"):
        found = load(name)
    if isinstance(found, PartitionBundle):
        return list(found.submodels)
    if isinstance(found, EnsembleBundle):
        return [found]
    if isinstance(found, (Program, ProgramModule, MaskBundle, PrunedBundle)):
        return [single_program(found)]
    raise BundleError(
        f"{name} holds {what_is_in(found)}, which is no member of an ensemble",
        hint="give models, or bundles of one program, of a partition or of an ensemble",
    )
