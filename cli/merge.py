"""``graphsplit merge``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from graphsplit.bundle import PartitionBundle, save
from graphsplit.cli import console, weights
from graphsplit.cli.common import (
    Force,
    Json,
    Verbose,
    refuse_taken,
    refuse_taken_file,
)
from graphsplit.cli.opening import Opened, open_bundle, read_bundle, state_of
from graphsplit.errors import PlanError
from graphsplit.plan import PartitionPlan
from graphsplit.report import model_report

Sources = Annotated[
    list[Path],
    typer.Argument(
        metavar="BUNDLE|WEIGHTS",
        help="A bundle, and a safetensors file for each sub-model in place of the bundle's own weights. "
        "With --plan only the files.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", metavar="PATH", help="The bundle to write; with --plan, the safetensors file."
    ),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Keep the original architecture, also where that is not exact.")
]
WeightsOnly = Annotated[
    Path | None,
    typer.Option(
        "--weights-only",
        metavar="FILE",
        help="Write the state dict of the full model, in its original shapes.",
    ),
]
Plan = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="Merge by this plan alone, without a bundle.")
]


def merge(
    sources: Sources,
    out: Out = None,
    plain: Plain = False,
    weights_only: WeightsOnly = None,
    plan: Plan = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Merge the K sub-models of a bundle, as they are or trained since, to one model of full size."""
    progress = console.Progress()
    if plan is not None:
        if out is None or weights_only is not None or plain:
            raise typer.BadParameter(
                "with --plan give the file to write by -o, and neither --weights-only nor --plain"
            )
        refuse_taken_file(out, force=force)
        report = _by_plan(plan, sources, out, progress)
    else:
        if out is None and weights_only is None:
            raise typer.BadParameter("say what to write: a bundle by -o, or the state dict by --weights-only")
        if out is not None:
            refuse_taken(out, force=force)
        if weights_only is not None:
            refuse_taken_file(weights_only, force=force)
        report = _by_bundle(sources, out, weights_only, progress, plain=plain, force=force)
    report["timings"] = progress.timings
    if as_json:
        console.json(report)
    else:
        _show(report)


def _by_plan(path: Path, files: Sequence[Path], out: Path, progress: console.Progress) -> dict[str, Any]:
    with progress.step("read"):
        plan = _read_plan(path)
        states = weights.read_states(plan, files)
    with progress.step("merge"):
        merged = plan.merge_state_dicts(states)
    with progress.step("write"):
        weights.write(merged, out)
    return {"model": plan.model, "k": plan.k, "parameters": plan.full_parameter_count(),
            "exact": None, "written": [str(out)]}  # fmt: skip


def _read_plan(path: Path) -> PartitionPlan:
    try:
        return PartitionPlan.from_json(path.read_text("utf-8"))
    except OSError as error:
        hint = "give the plan.json in it" if path.is_dir() else None
        raise PlanError(f"the plan {path} cannot be read: {error.strerror or error}", hint=hint) from error
    except UnicodeDecodeError:
        raise PlanError(f"{path} is no plan: it is no text", hint="give the plan.json of a bundle") from None


def _by_bundle(
    sources: Sequence[Path],
    out: Path | None,
    weights_only: Path | None,
    progress: console.Progress,
    *,
    plain: bool,
    force: bool,
) -> dict[str, Any]:
    bundle = read_bundle(str(sources[0]), progress)
    states = _states(bundle, sources[1:])
    opened = open_bundle(bundle, str(sources[0]), progress)
    written = []
    with progress.step("merge"):
        merged = opened.partition.merged_program(states, duplicate=not plain) if out is not None else None
        full = bundle.plan.merge_state_dicts([_saved(bundle.plan, state) for state in states])
    with progress.step("write"):
        if out is not None and merged is not None:
            save(merged, out, overwrite=force)
            written.append(str(out))
        if weights_only is not None:
            weights.write(full, weights_only)
            written.append(str(weights_only))
    facts = _facts(opened, plain=plain or out is None)
    if merged is not None:
        facts["parameters"] = merged.parameter_count()  # more than the model's where sub-models have copies
    return {**facts, "written": written}


def _states(bundle: PartitionBundle, files: Sequence[Path]) -> list[Mapping[str, Tensor]]:
    """State of the sub-models: the bundle's, with the weights of the files where there are some."""
    own = [state_of(program) for program in bundle.submodels]
    given = weights.read_states(bundle.plan, files) if files else [{}] * bundle.plan.k
    return [{**state, **found} for state, found in zip(own, given, strict=True)]


def _saved(plan: PartitionPlan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        entry.name: state[entry.name] for entry in plan.state if entry.kind != "constant" and entry.persistent
    }


def _facts(opened: Opened, *, plain: bool) -> dict[str, Any]:
    report = model_report(opened.partition.analysis)
    inexact = bool(report["duplicated"] or report["shared"]["replicated"])
    return {
        "origin": opened.origin,
        "model": report["model"],
        "k": report["k"],
        "parameters": report["parameters"],
        "exact": not (plain and inexact),
        "duplicated": report["duplicated"],
    }


def _show(report: Mapping[str, Any]) -> None:
    console.say(f"{report['model']}: {report['k']} sub-models merged to {report['parameters']:,} parameters")
    if report["exact"] is None:
        console.say("in the shapes of the original model")
    elif not report["exact"]:
        console.say(
            "in the original architecture, which is not exact: cross-unit ops now see all units at once"
        )
    elif report["duplicated"]:
        ops = console.count(sum(op["count"] for op in report["duplicated"]), "op runs", "ops run")
        console.say(
            f"exact: the output is the mean of the sub-models' outputs; {ops} once for each sub-model"
        )
    else:
        console.say("exact, in the original architecture: the output is the mean of the sub-models' outputs")
    console.timings(report["timings"])
    console.commands("Written", report["written"])
