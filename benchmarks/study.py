"""Steps to a goal against batch size and sparsity, on the digits: 64-300-100-10.

    OMP_NUM_THREADS=1 python benchmarks/study.py [--trials 32] [--processes 2] [--speed]

Goes on with the trials of the folder where there are any. ``--speed`` only measures how many trials a minute
are made when they are fused, and one at a time.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from pathlib import Path

import torch
from sparsify import network
from torch.nn import functional as F

import graphsplit as gs
from graphsplit._trials import Task, run_trials
from graphsplit.scaling.plan import Cell, Plan
from graphsplit.scaling.report import fits, verdicts

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BATCHES = (1, 2, 4, 16, 64, 256, 1024)

TEXT = """# Steps against batch size

Written by `python benchmarks/study.py`, {date}: torch {torch}, Python {python}. {cells} cells, {trials}
trials: {complete} reached an error of {goal:g} on 360 held digits, {late} did not, or were stopped as they
could not win, {diverged} diverged. {seconds:.0f} s from the plan to the
last record, in {processes} processes{note}.

![steps](study_steps.png)

![normalised](study_normalised.png)

![metaparameters](study_metaparameters.png)

Fits of K(B) = c1 / B + c2 with intervals of 95 %, and the batch sizes of each regime:

{fits}

The paper's claims, by the critical batch size c1 / c2 over that of the dense model:

{verdicts}

Fewest steps:

{steps}
"""


def speed(task: Task, masks: dict[str, torch.Tensor]) -> None:
    """Trials a minute, fused and one at a time, without early stops."""
    plan = Plan((16,), goal=0.0, budget=64, check=16, trials=16, rates=(1e-3, 0.1))
    for batch in (1, 16, 64):
        for fused in (1, 16):
            numbers = range(16) if fused > 1 else range(2)
            start = time.perf_counter()
            for first in range(0, len(numbers), fused):
                run_trials(task, masks, plan, Cell(0.9, batch, "momentum"), numbers[first : first + fused])
            rate = 60 * len(numbers) / (time.perf_counter() - start)
            print(
                f"batch {batch}, {fused} at once: {rate:.0f} trials of {plan.budget} steps a minute",
                flush=True,
            )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run the study, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "study")
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, held = gs.data.digits(), gs.data.digits(train=False)
    if options.speed:
        masks = gs.sparsify(network(0), data=train, loss=F.cross_entropy, sparsity=0.9)
        speed(Task(gs.emit(masks.program), train, held, F.cross_entropy, gs.train.misclassified), masks.masks)
        return
    found = gs.study(
        network(0), options.folder, train=train, held=held, loss=F.cross_entropy, batches=BATCHES,
        trials=options.trials, fused=16, goal=0.1, budget=4000, patience=2.0,
        processes=options.processes, on_cell=lambda line: print(line, flush=True),
    )  # fmt: skip
    places = [found.folder / "study.json", *(found.folder / "trials").iterdir()]
    written = sorted(place.stat().st_mtime for place in places)
    found.report()
    for name in ("steps", "normalised", "metaparameters"):
        (RESULTS / f"study_{name}.png").write_bytes((found.folder / f"{name}.png").read_bytes())
    outcomes = [trial.outcome for trial in found.trials]
    kinds = sorted({(cell.optimizer, cell.sparsity) for cell in found.plan.cells()})
    best = {(c.optimizer, c.sparsity, c.batch): count for c, count in found.steps().items()}
    steps = [[o, f"{s:g}", *(str(best[o, s, b] or "-") for b in BATCHES)] for o, s in kinds]
    (RESULTS / "study.md").write_text(
        TEXT.format(
            date=datetime.date.today(), torch=torch.__version__, python=platform.python_version(),
            cells=len(found.plan.cells()), trials=len(outcomes), complete=outcomes.count("complete"),
            late=outcomes.count("not reached"), diverged=outcomes.count("diverged"), goal=found.plan.goal,
            seconds=written[-1] - written[0], processes=options.processes,
            note="" if found.finished else ", not all done",
            fits=markdown(*fits(found.curves())), verdicts=markdown(*verdicts(found.curves())),
            steps=markdown(["optimizer", "sparsity", *map(str, BATCHES)], steps),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
