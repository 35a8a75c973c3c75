"""Half of the units of every model of the test zoo dropped, with certificates; and steps of full-size models.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/prune_units.py [--only NAME ...]

Certificates are those of ``PrunedUnits.verify``: outputs, buffers and gradients of the smaller model against
the masked one, in both modes, in float64. A step is a forward and a backward pass in train mode.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from models import bert_base, resnet50  # noqa: E402

import graphsplit as gs  # noqa: E402
from graphsplit.errors import UserError  # noqa: E402
from graphsplit.signature import as_call  # noqa: E402
from laws import tensors  # noqa: E402
from zoo import ZOO  # noqa: E402

STEPS = """# A step at half of the units

Written by `python benchmarks/prune_units.py`, {date}: torch {torch}, Python {python}, one thread; load
{load:.1f} on {cores} cores before. Median of {runs} steps each, forward and backward, taken in turn.

| model | axes pruned, whole | parameters | FLOPs | step before | after | of the time |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

"""
ZOO_TEXT = """# The test zoo without half of its units

{seconds:.0f} s. {models} models: {pruned} pruned, the largest error against the masked model {worst:.1e} in
float64; {wrong} wrong; {refused} refused.

| model | largest error | axes pruned | whole | parameters | FLOPs |
| --- | --- | --- | --- | --- | --- |
{rows}
"""
RUNS = 7


def mlp() -> nn.Module:
    """Two hidden layers of 2048."""
    return nn.Sequential(
        nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "MLP 784-2048-2048-10, batch 128": (mlp, lambda: torch.randn(128, 784)),
    "LeNet, batch 128": (lambda: ZOO["lenet"].build(), lambda: torch.randn(128, 1, 28, 28)),
    "ResNet-50, batch 2": (resnet50, lambda: torch.randn(2, 3, 224, 224)),
    "BERT-base with 2 layers, batch 2 of 128": (
        lambda: bert_base(2), lambda: torch.randint(0, 30522, (2, 128)),
    ),
}  # fmt: skip


def steps() -> Iterator[str]:
    """A row for each full-size model."""
    for name, (build, example) in CASES.items():
        torch.manual_seed(0)
        model, x = build(), example()
        found = gs.prune_units(model, x)
        times = timed([gs.emit(found.pruned.program), found.module], x)
        (before, after), (flops, fewer) = found.parameters(), found.flops()
        row = (
            f"| {name} | {len(found.axes)}, {len(found.kept)} | {after / before:.2f} | {fewer / flops:.2f} "
            f"| {times[0] * 1e3:.1f} ms | {times[1] * 1e3:.1f} ms | {times[1] / times[0]:.2f} |"
        )
        print(row, flush=True)
        yield row


def timed(modules: list[nn.Module], x: Tensor) -> list[float]:
    """Median seconds of a step of each."""
    seconds: list[list[float]] = [[] for _ in modules]
    for number in range(RUNS + 1):
        for module, own in zip(modules, seconds, strict=True):
            start = time.perf_counter()
            sum((y.square().mean() for y in tensors(module(x))), torch.zeros(())).backward()
            if number:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in seconds]


def zoo(only: list[str] | None) -> str:
    """The table of the zoo."""
    rows: list[str] = []
    errors: list[float] = []
    wrong = refused = 0
    start = time.perf_counter()
    for name, entry in ZOO.items():
        if only and name not in only:
            continue
        args, kwargs = as_call(entry.inputs())
        try:
            found = gs.prune_units(entry.build(), args, kwargs)
        except UserError as refusal:
            refused += 1
            rows.append(f"| {name} | refused: {refusal.message.split(' (')[0][:90]} | | | | |")
        else:
            certificate = found.verify()
            wrong += not certificate.ok
            errors.append(max(row.error for row in certificate.rows if row.dtype == "float64"))
            (before, after), (flops, fewer) = found.parameters(), found.flops()
            error = f"{errors[-1]:.1e}" + ("" if certificate.ok else " **wrong**")
            rows.append(
                f"| {name} | {error} | {len(found.axes)} | {len(found.kept)} | {after / before:.2f} "
                f"| {fewer / max(flops, 1):.2f} |"
            )
        print(rows[-1], flush=True)
    return ZOO_TEXT.format(
        seconds=time.perf_counter() - start, models=len(rows), pruned=len(errors) - wrong,
        worst=max(errors), wrong=wrong, refused=refused, rows="\n".join(rows),
    )  # fmt: skip


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of models of the zoo")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "prune_units.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    text = STEPS.format(
        load=load, cores=os.cpu_count(),
        date=datetime.date.today(), torch=torch.__version__, python=platform.python_version(), runs=RUNS,
        rows="\n".join(steps()),
    )  # fmt: skip
    options.out.write_text(text + zoo(options.only))


if __name__ == "__main__":
    main()
