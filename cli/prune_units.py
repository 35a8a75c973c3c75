"""``graphsplit prune-units``."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from graphsplit._prune_units import PrunedUnits
from graphsplit._prune_units import prune_units as prune
from graphsplit.bundle import save
from graphsplit.cli import console
from graphsplit.cli.common import (
    Entry,
    Force,
    Inputs,
    Json,
    Model,
    NoVerify,
    Out,
    Outputs,
    Verbose,
    check_to_write,
    refuse_taken,
    written,
)
from graphsplit.cli.sparsify import Among, By, Iterations, Mode, PerClass, ScoreMode, Seed, data_and_loss
from graphsplit.loading import load_model

Method = Annotated[
    By, typer.Option("--method", help="Scores; snip and grasp need `data` and `loss` in the model's file.")
]
Amount = Annotated[float, typer.Option("--amount", metavar="A", help="Share of the units to drop.")]
Scope = Annotated[Among, typer.Option("--scope", help="Of all units, or of each axis.")]


def prune_units(
    model: Model,
    out: Out,
    method: Method = By.magnitude,
    amount: Amount = 0.5,
    scope: Scope = Among.layer,
    mode: Mode = ScoreMode.train,
    iterations: Iterations = 100,
    per_class: PerClass = None,
    seed: Seed = 0,
    entry: Entry = None,
    inputs: Inputs = None,
    keep_output: Outputs = None,
    no_verify: NoVerify = False,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Drop whole units, prove that the smaller dense model is the masked one, and write it as a bundle."""
    refuse_taken(out, force=force)
    progress = console.Progress()
    with progress.step("load"):
        loaded = load_model(model, entry=entry, inputs=inputs or ())
        data, loss = data_and_loss(loaded, method, per_class, seed)
    with progress.step("prune"):
        found = prune(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            method=method.value,
            amount=amount,
            data=data,
            loss=loss,
            scope=scope.value,
            mode=mode.value,
            iterations=iterations,
            seed=seed,
            outputs=keep_output or loaded.outputs,
        )
    report = _report(found, loaded.origin)
    if not no_verify:
        with progress.step("verify"):
            certificate = found.verify()
        report["certificate"] = certificate.to_data()
        check_to_write(certificate, lambda: report, as_json=as_json)
    with progress.step("write"):
        save(replace(found.to_bundle(), certificate=report["certificate"]), out, overwrite=force)
    if as_json:
        console.json({**report, "timings": progress.timings, "written": written(out)})
        return
    console.pruned(report)
    console.certificate(report["certificate"])
    console.timings(progress.timings)
    console.files(f"Written to {out}", sorted(out.iterdir()))


def _report(found: PrunedUnits, origin: str) -> dict[str, Any]:
    return {
        "origin": origin,
        "model": found.program.name,
        "parameters": list(found.parameters()),
        "flops": list(found.flops()),
        "axes": [{"name": name, "before": a, "after": b} for name, (a, b) in found.axes.items()],
        "kept": [{"name": name, "reason": reason} for name, reason in found.kept.items()],
        "certificate": None,
    }
