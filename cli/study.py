"""``graphsplit study``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from graphsplit._study import Study
from graphsplit._study import study as run_study
from graphsplit.cli import console
from graphsplit.cli.common import Entry, Json, Model, Verbose
from graphsplit.cli.sparsify import By
from graphsplit.errors import LoadError
from graphsplit.loading import load_model
from graphsplit.scaling.report import fits, verdicts
from graphsplit.train.loop import misclassified


class Rate(StrEnum):
    """What becomes of the learning rate."""

    constant = "constant"
    linear = "linear"


Out = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="FOLDER", help="Of the trials; gone on with where there are any.",
                 show_default=False),
]  # fmt: skip
Batches = Annotated[str, typer.Option("--batches", metavar="B,B,...", help="Batch sizes.")]
Sparsities = Annotated[str, typer.Option("--sparsities", metavar="S,S,...", help="Shares that are removed.")]
Optimizers = Annotated[
    str, typer.Option("--optimizers", metavar="NAME,...", help="Some of sgd, momentum and nesterov.")
]
Trials = Annotated[int, typer.Option("--trials", metavar="N", help="Sets of metaparameters for each point.")]
Goal = Annotated[float, typer.Option("--goal", metavar="E", help="Validation error to reach.")]
Budget = Annotated[int, typer.Option("--budget", metavar="N", help="Steps that a trial may take.")]
Check = Annotated[
    int,
    typer.Option(
        "--check", metavar="N", help="Look at the validation error every N steps, more often at first."
    ),
]
Method = Annotated[By, typer.Option("--method", help="How weights are chosen.")]
Decay = Annotated[Rate, typer.Option("--decay", help="Of the learning rate.")]
Processes = Annotated[
    int | None, typer.Option("--processes", metavar="N", help="One for each core unless given.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of the data's order and the metaparameters.")]


def study(
    model: Model,
    out: Out,
    batches: Batches = "1,4,16,64,256,1024",
    sparsities: Sparsities = "0,0.5,0.7,0.9",
    optimizers: Optimizers = "sgd,momentum,nesterov",
    trials: Trials = 16,
    goal: Goal = 0.1,
    budget: Budget = 4000,
    check: Check = 8,
    method: Method = By.snip,
    decay: Decay = Rate.constant,
    processes: Processes = None,
    seed: Seed = 0,
    entry: Entry = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure the steps to a goal over batch size and sparsity, and write a report with figures.

    The file of the model also defines `data` and `held`, pairs of all inputs and targets to train on and to
    validate on, `loss`, and, if the goal is about another error than that of classes, `error`.
    """
    progress = console.Progress()
    with progress.step("load"):
        loaded = load_model(model, entry=entry)
        found = {name: loaded.defined(name) for name in ("data", "held")}
        found |= {name: loaded.function(name) for name in ("loss", "error")}
    for name in ("data", "held", "loss"):
        if found[name] is None:
            raise LoadError(
                f"a study trains the model, and {loaded.origin} defines no `{name}`",
                hint="define `data` and `held`, pairs (inputs, targets), and `loss`, of outputs and targets",
            )
    with progress.step("trials"):
        done = run_study(
            loaded.model,
            out,
            train=found["data"],
            held=found["held"],
            loss=found["loss"],
            error=found["error"] or misclassified,
            batches=_numbers("--batches", batches, int),
            sparsities=_numbers("--sparsities", sparsities, float),
            optimizers=[name.strip() for name in optimizers.split(",")],  # type: ignore[misc]
            trials=trials,
            goal=goal,
            budget=budget,
            check=check,
            method=method.value,
            decay=decay.value,
            processes=processes,
            seed=seed,
            on_cell=console.note,
        )
    with progress.step("report"):
        places = done.report()
    if as_json:
        console.json({**_report(done), "timings": progress.timings, "written": list(map(str, places))})
        return
    console.say(str(done))
    curves = done.curves()
    console.table("Fits of K(B) = c1 / B + c2", *fits(curves))
    console.table("Claims of the paper, against the dense model", *verdicts(curves))
    console.timings(progress.timings)
    console.files(f"Written to {out}", places)


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        return [kind(item) for item in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} {text}: expected numbers, such as 1,4,16") from None


def _report(done: Study) -> dict[str, Any]:
    return {
        "folder": str(done.folder),
        "trials": len(done.trials),
        "finished": done.finished,
        "curves": [
            {
                "optimizer": curve.optimizer,
                "sparsity": curve.sparsity,
                "steps": {str(batch): steps for batch, steps in curve.steps.items()},
                "c1": None if curve.fit is None else [curve.fit.c1, *curve.c1],
                "c2": None if curve.fit is None else [curve.fit.c2, *curve.c2],
                "critical": None if curve.fit is None else [curve.fit.critical, *curve.critical],
                "regimes": {str(batch): regime for batch, regime in curve.regimes().items()},
            }
            for curve in done.curves()
        ],
        "claims": [
            {"text": c.text, "optimizer": c.optimizer, "sparsity": c.sparsity, "ratio": c.ratio,
             "interval": list(c.interval), "verdict": c.verdict}
            for c in done.claims()
        ],
    }  # fmt: skip
