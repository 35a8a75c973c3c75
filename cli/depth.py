"""``graphsplit critics`` and ``graphsplit sil``: models cut by depth."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from graphsplit import exports
from graphsplit._layer_groups import LayerGroups
from graphsplit._local_critics import LocalCritics, local_critics
from graphsplit._synthetic_halves import SyntheticHalves, synthetic_halves
from graphsplit.bundle import DepthBundle, save
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
from graphsplit.cli.export import run_exports
from graphsplit.depth.plan import UNITS, Tied
from graphsplit.loading import Loaded, load_model
from graphsplit.train.synthetic import Labels
from graphsplit.verification import Certificate


class Balance(StrEnum):
    """What is made even."""

    flops = "flops"
    params = "params"
    memory = "memory"
    time = "time"


class CriticForm(StrEnum):
    """Critics by name."""

    conv = "conv"
    conv3 = "conv3"
    linear = "linear"


class Loss(StrEnum):
    """Losses by name."""

    cross_entropy = "cross_entropy"
    mse = "mse"


class Points(StrEnum):
    """Distributions of synthetic labels."""

    normal = "normal"
    uniform = "uniform"
    sign = "sign"


At = Annotated[
    list[str] | None,
    typer.Option("--at", metavar="PATH", help="Cut where this module starts. Repeatable."),
]
N = Annotated[int | None, typer.Option("-n", metavar="N", help="Number of critics, one less than groups: 1.")]
Parts = Annotated[
    int | None, typer.Option("-n", metavar="N", help="Number of parts: 2 unless --at is given.")
]
Even = Annotated[Balance, typer.Option("--balance", help="What the dearest group has least of.")]
Copies = Annotated[
    bool, typer.Option("--copy-tied", help="Give each group its own copy of a weight that several use.")
]
Critic = Annotated[
    CriticForm | None,
    typer.Option("--critic", help="Form of the critics; by what crosses the cut unless given."),
]
LossName = Annotated[Loss, typer.Option("--loss", help="What the critics estimate.")]
OutputName = Annotated[
    str | None, typer.Option("--loss-output", metavar="NAME", help="The output that the loss takes.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of what is drawn at random.")]
Onnx = Annotated[bool, typer.Option("--onnx", help="Also write every group and sub-model as ONNX.")]
Classes = Annotated[
    int, typer.Option("--classes", metavar="N", help="Number of classes.", show_default=False)
]
Distribution = Annotated[Points, typer.Option("--distribution", help="Of the points of the classes.")]
Scale = Annotated[float, typer.Option("--scale", help="Size of the points' entries.")]
Separation = Annotated[float, typer.Option("--separation", help="1: points are independent; near 0: near.")]
Noise = Annotated[
    float, typer.Option("--noise", help="Standard deviation of what is added to points as inputs.")
]


def critics(
    model: Model,
    out: Out,
    n: N = None,
    at: At = None,
    balance: Even = Balance.flops,
    copy_tied: Copies = False,
    critic: Critic = None,
    loss: LossName = Loss.cross_entropy,
    loss_output: OutputName = None,
    seed: Seed = 0,
    entry: Entry = None,
    inputs: Inputs = None,
    keep_output: Outputs = None,
    no_verify: NoVerify = False,
    onnx: Onnx = False,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Cut a model by depth into groups with local critics; each prefix is a model. All of it is a bundle."""

    def cut(loaded: Loaded) -> LocalCritics:
        return local_critics(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            n=n,
            at=at,
            balance=balance.value,
            critic=None if critic is None else critic.value,
            loss=loss.value,
            output=loss_output,
            tied=_tied(copy_tied),
            seed=seed,
            outputs=keep_output or loaded.outputs,
        )

    _run(model, out, entry, inputs, cut, no_verify=no_verify, onnx=onnx, force=force, as_json=as_json)


def sil(
    model: Model,
    out: Out,
    classes: Classes,
    n: Parts = None,
    at: At = None,
    copy_tied: Copies = False,
    distribution: Distribution = Points.normal,
    scale: Scale = 1.0,
    separation: Separation = 1.0,
    noise: Noise = 0.1,
    seed: Seed = 0,
    entry: Entry = None,
    inputs: Inputs = None,
    keep_output: Outputs = None,
    no_verify: NoVerify = False,
    onnx: Onnx = False,
    force: Force = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Cut a model by depth into parts that train apart on synthetic labels, and write them as a bundle."""

    def cut(loaded: Loaded) -> SyntheticHalves:
        labels = Labels(classes, distribution.value, scale, separation, noise, seed)
        return synthetic_halves(
            loaded.model, loaded.args, loaded.kwargs, at=at, labels=labels, n=n, tied=_tied(copy_tied),
            outputs=keep_output or loaded.outputs,
        )  # fmt: skip

    _run(model, out, entry, inputs, cut, no_verify=no_verify, onnx=onnx, force=force, as_json=as_json)


def _tied(copy_tied: bool) -> Tied:
    return "copy" if copy_tied else "refuse"


def _run(
    model: str,
    out: Path,
    entry: str | None,
    inputs: list[str] | None,
    cut: Callable[[Loaded], LocalCritics | SyntheticHalves],
    *,
    no_verify: bool,
    onnx: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Load, cut, verify, write, and report."""
    refuse_taken(out, force=force)
    progress = console.Progress()
    with progress.step("load"):
        loaded = load_model(model, entry=entry, inputs=inputs or ())
    with progress.step("trace and cut"):
        divided = cut(loaded)
    groups = divided.groups
    certificate = None
    if not no_verify:
        with progress.step("verify"):
            certificate = groups.verify()
    report = {"origin": model, **depth_report(divided, certificate)}
    if certificate is not None:
        check_to_write(certificate, lambda: report, as_json=as_json)
    with contextlib.ExitStack() as stack:
        rows: list[dict[str, Any]] = []
        bundle = divided.to_bundle()
        if onnx:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            rows, _ = run_exports(exports.of_depth(divided, folder, loaded.example), progress)
            bundle = replace(bundle, files={path.name: path for path in sorted(folder.iterdir())})
        with progress.step("write"):
            save(_certified(bundle, certificate), out, overwrite=force)
    if as_json:
        console.json({**report, "onnx": rows, "timings": progress.timings, "written": written(out)})
        return
    console.depth(report, model)
    if rows:
        console.onnx(rows)
    console.timings(progress.timings)
    console.files(f"Written to {out}", sorted(out.iterdir()))
    lines = [f"found = graphsplit.load({str(out)!r})", "found.fit(data, epochs=10)"]
    console.commands("Next: train it in Python", lines)


def _certified(bundle: DepthBundle, certificate: Certificate | None) -> DepthBundle:
    return replace(bundle, certificate=None if certificate is None else certificate.to_data())


def depth_report(divided: LocalCritics | SyntheticHalves, certificate: Certificate | None) -> dict[str, Any]:
    """Everything that is shown, as plain data."""
    groups: LayerGroups = divided.groups
    plan = groups.plan
    report: dict[str, Any] = {
        "model": plan.model,
        "parameters": groups.program.parameter_count(),
        "n": plan.n,
        "measure": plan.measure,
        "unit": UNITS[plan.measure],
        "bound": plan.bound,
        "tied": plan.tied,
        "groups": [asdict(group) for group in plan.groups],
        "certificate": None if certificate is None else certificate.to_data(),
        "notes": list(groups.program.notes),
    }
    if isinstance(divided, LocalCritics):
        report["submodels"] = [asdict(item) for item in divided.complexity()]
    else:
        report["labels"] = asdict(divided.labels)
        report["costs"] = [asdict(item) for item in divided.costs()]
    return report
