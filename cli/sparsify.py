"""``graphsplit sparsify``."""

from __future__ import annotations

import warnings
from enum import StrEnum
from typing import Annotated, Any

import typer

from graphsplit._sparsify import Masks
from graphsplit._sparsify import sparsify as choose_masks
from graphsplit.bundle import save
from graphsplit.cli import console
from graphsplit.cli.common import (
    Entry,
    Force,
    Inputs,
    Json,
    Model,
    Out,
    Outputs,
    Verbose,
    refuse_taken,
    written,
)
from graphsplit.data import balanced
from graphsplit.errors import LoadError
from graphsplit.loading import Loaded, load_model
from graphsplit.sparsity import DATA_FREE


class By(StrEnum):
    """Scores by name."""

    snip = "snip"
    grasp = "grasp"
    synflow = "synflow"
    magnitude = "magnitude"
    random = "random"


class Among(StrEnum):
    """Which weights compete."""

    all = "global"
    layer = "layer"


class ScoreMode(StrEnum):
    """Modes of a model."""

    train = "train"
    eval = "eval"


Method = Annotated[
    By,
    typer.Option("--method", help="Scores; snip and grasp need `data` and `loss` in the file of the model."),
]
Sparsity = Annotated[float, typer.Option("--sparsity", metavar="S", help="Share of the weights to remove.")]
Scope = Annotated[Among, typer.Option("--scope", help="Which weights compete: all, or those of a layer.")]
Mode = Annotated[ScoreMode, typer.Option("--mode", help="In which the model runs while it is scored.")]
Biases = Annotated[bool, typer.Option("--biases", help="Prune biases, too.")]
Norms = Annotated[bool, typer.Option("--norms", help="Prune the affine parameters of normalisations, too.")]
Temperature = Annotated[float, typer.Option("--temperature", metavar="T", help="Of grasp.")]
Iterations = Annotated[int, typer.Option("--iterations", metavar="N", help="Of synflow.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of random scores, and of dropout.")]
PerClass = Annotated[
    int | None,
    typer.Option("--per-class", metavar="N", help="Score by so many examples of each class of `data`.",
                 show_default=False),
]  # fmt: skip


def sparsify(
    model: Model,
    out: Out,
    method: Method = By.synflow,
    sparsity: Sparsity = 0.9,
    scope: Scope = Among.all,
    mode: Mode = ScoreMode.train,
    biases: Biases = False,
    norms: Norms = False,
    temperature: Temperature = 200.0,
    iterations: Iterations = 100,
    per_class: PerClass = None,
    seed: Seed = 0,
    entry: Entry = None,
    inputs: Inputs = None,
    keep_output: Outputs = None,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Choose which weights to keep before training, and write the model with its masks as a bundle."""
    refuse_taken(out, force=force)
    progress = console.Progress()
    with progress.step("load"):
        loaded = load_model(model, entry=entry, inputs=inputs or ())
        data, loss = data_and_loss(loaded, method, per_class, seed)
    with progress.step("score"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        masks = choose_masks(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            method=method.value,
            sparsity=sparsity,
            data=data,
            loss=loss,
            scope=scope.value,
            mode=mode.value,
            biases=biases,
            norms=norms,
            temperature=temperature,
            iterations=iterations,
            seed=seed,
            outputs=keep_output or loaded.outputs,
        )
    with progress.step("write"):
        save(masks.to_bundle(), out, overwrite=force)
    notes = [str(warning.message) for warning in said]
    if as_json:
        console.json({**report_of(masks, loaded.origin), "notes": notes, "timings": progress.timings,
                      "written": written(out)})  # fmt: skip
        return
    console.masks(report_of(masks, loaded.origin))
    console.notes(notes)
    console.timings(progress.timings)
    console.files(f"Written to {out}", sorted(out.iterdir()))


def data_and_loss(loaded: Loaded, method: By, per_class: int | None, seed: int) -> tuple[Any, Any]:
    """What the file of the model defines for methods that look at gradients.

    With ``per_class`` the data are one batch of so many examples of each class.

    Raises:
        LoadError: It does not.
        InputError: There are too few examples of a class, or targets are no classes.
    """
    if method.value in DATA_FREE:
        if per_class is not None:
            raise typer.BadParameter(f"--per-class is for methods that look at data, not for {method.value}")
        return None, None
    data, loss = loaded.defined("data"), loaded.defined("loss")
    for name, value in (("data", data), ("loss", loss)):
        if value is None:
            raise LoadError(
                f"{method.value} scores by gradients of a loss, and {loaded.origin} defines no `{name}`",
                hint="define `data`, a pair (inputs, targets) or batches of such, and `loss`, of outputs and "
                f"targets; or choose a method without: {', '.join(DATA_FREE)}",
            )
    return data if per_class is None else balanced(data, per_class, seed=seed), loss


def report_of(masks: Masks, origin: str) -> dict[str, Any]:
    """What is printed of masks."""
    rows = [
        {"name": row.name, "shape": list(row.shape), "size": row.size, "kept": row.kept}
        for row in masks.report()
    ]
    return {
        "origin": origin,
        "model": masks.program.name,
        "method": masks.method,
        "scope": masks.scope,
        "sparsity": masks.sparsity,
        "cut": list(masks.cut),
        "layers": rows,
    }
