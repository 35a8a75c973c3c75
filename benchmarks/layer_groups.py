"""Every model of the test zoo cut into 2, 4 and 8 layer groups, and put together again, bit for bit.

    python benchmarks/layer_groups.py [--only NAME ...] [--out benchmarks/results/layer_groups.md]

A model that ties weights is cut with ``tied="copy"``. Certificates are those of ``LayerGroups.verify``:
outputs, buffers and gradients in both modes.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import graphsplit as gs  # noqa: E402
from graphsplit.errors import PartitionError, UserError  # noqa: E402
from graphsplit.signature import as_call  # noqa: E402
from zoo import ZOO  # noqa: E402

NUMBERS = (2, 4, 8)
TEXT = """# Layer groups of the test zoo

Written by `python benchmarks/layer_groups.py`, {date}: {versions}; {seconds:.0f} s.

Each cell: whether the groups put together are the model (bit for bit in float64, in eval and, under one
seed, in train mode, with gradients), the dearest group's FLOPs by the bound that no division can beat, and
the most tensors that cross a cut. `-`: the model has fewer pieces than groups.

{models} models: {exact} divisions exact, {small} not possible for size, {refused} refused, {wrong} wrong.

| model | n = 2 | n = 4 | n = 8 |
| --- | --- | --- | --- |
{rows}
"""


@dataclass(frozen=True)
class Found:
    """What came of one model at one number of groups.

    Attributes:
        text: For the table.
        outcome: ``"exact"``, ``"small"`` (there are not so many pieces), ``"refused"`` or ``"wrong"``.
    """

    text: str
    outcome: str


def cut(program: gs.Program, call: tuple[object, object], n: int) -> Found:
    """Cut, put together, compare."""
    args, kwargs = call
    try:
        groups = gs.layer_groups(program, args, kwargs, n=n, tied="copy")  # type: ignore[arg-type]
    except PartitionError as refusal:
        if "pieces at most" in str(refusal):
            return Found("-", "small")
        return Found(f"refused: {refusal}", "refused")
    certificate = groups.verify()
    if not certificate.ok:
        return Found(f"**wrong: {certificate.max_error:.1e}**", "wrong")
    balance = f"{max(groups.costs) / groups.bound:.2f}" if groups.bound else "no FLOPs"
    crossing = max(len(frontier) for frontier in groups.frontiers)
    return Found(f"exact, {balance}, {crossing}", "exact")


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "layer_groups.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows, outcomes = [], []
    start = time.perf_counter()
    for name, entry in ZOO.items():
        if options.only and name not in options.only:
            continue
        call = as_call(entry.inputs())
        try:
            program = gs.trace(entry.build(), *call)
        except UserError as refusal:
            rows.append(f"| {name} | refused by the tracer: {str(refusal)[:80]} | | |")
            continue
        found = [cut(program, call, n) for n in NUMBERS]
        outcomes += found
        rows.append(f"| {name} | {' | '.join(item.text for item in found)} |")
        print(rows[-1], flush=True)
    kinds = [item.outcome for item in outcomes]
    text = TEXT.format(
        date=datetime.date.today(), seconds=time.perf_counter() - start, models=len(rows),
        versions=f"torch {torch.__version__}, Python {platform.python_version()}",
        rows="\n".join(rows),
        **{kind: kinds.count(kind) for kind in ("exact", "small", "refused", "wrong")},
    )  # fmt: skip
    options.out.write_text(text)


if __name__ == "__main__":
    main()
