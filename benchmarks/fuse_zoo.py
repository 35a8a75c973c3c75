"""Every model of the test zoo fused: two models of random weights as one module, against both apart.

    python benchmarks/fuse_zoo.py [--only NAME ...] [-k 2]

Certificates are those of ``FusedModule.verify``: outputs, buffers and gradients in both modes, in float64.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import graphsplit as gs  # noqa: E402
from graphsplit._fuse import certify_fused  # noqa: E402
from graphsplit.errors import UserError  # noqa: E402
from graphsplit.passes.fuse import fuse  # noqa: E402
from laws import as_call  # noqa: E402
from zoo import ZOO  # noqa: E402

TEXT = """# The test zoo, fused

Written by `python benchmarks/fuse_zoo.py`, {date}: torch {torch}, Python {python}; K = {k}, {seconds:.0f} s.

{models} models: {fused} fused, the largest error of outputs, buffers and gradients against separate models
{worst:.1e} in float64; {wrong} wrong; {untraced} refused by the tracer. Nodes of the fused graph are
{nodes:.2f} times those of one model, in the middle. Ops that run once for each model, in all: {looped}.

| model | largest error | nodes | ops that run once for each model |
| --- | --- | --- | --- |
{rows}
"""


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("-k", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fuse_zoo.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: list[str] = []
    errors: list[float] = []
    growth: list[float] = []
    looped: Counter[str] = Counter()
    wrong = untraced = 0
    start = time.perf_counter()
    for name, entry in ZOO.items():
        if options.only and name not in options.only:
            continue
        try:
            program = gs.trace(entry.build(), *as_call(entry.inputs()))
        except UserError as refusal:
            untraced += 1
            rows.append(f"| {name} | refused by the tracer: {str(refusal)[:80]} | | |")
            continue
        fused = fuse([program] * options.k)
        certificate = certify_fused(fused, program)
        looped.update(fused.looped)
        wrong += not certificate.ok
        errors.append(certificate.max_error)
        growth.append(len(fused.program.graph().nodes) / len(program.graph().nodes))
        ops = ", ".join(f"{op} ({count})" for op, count in sorted(fused.looped.items()))
        error = f"{certificate.max_error:.1e}" + ("" if certificate.ok else " **wrong**")
        rows.append(f"| {name} | {error} | {growth[-1]:.2f} | {ops} |")
        print(rows[-1], flush=True)
    options.out.write_text(
        TEXT.format(
            date=datetime.date.today(), torch=torch.__version__, python=platform.python_version(),
            k=options.k, seconds=time.perf_counter() - start, models=len(rows), fused=len(errors) - wrong,
            worst=max(errors), wrong=wrong, untraced=untraced, nodes=sorted(growth)[len(growth) // 2],
            looped=", ".join(f"{op} ({count})" for op, count in looped.most_common()) or "none",
            rows="\n".join(rows),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
