"""The public face of studies: steps to a goal over batch size and sparsity."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from graphsplit._sparsify import program_to_prune
from graphsplit._trials import Pair, Task, run_trials
from graphsplit.emission import emit
from graphsplit.errors import UserError
from graphsplit.program import Program
from graphsplit.scaling.analysis import Claim, Curve, claims, curves
from graphsplit.scaling.plan import Cell, Decay, OptimizerName, Plan, Trial, fewest, how_far
from graphsplit.scaling.records import Records
from graphsplit.scaling.report import write_report
from graphsplit.signature import as_call
from graphsplit.sparsity import Method, Scoring, choose, prunable
from graphsplit.train.digests import digest
from graphsplit.train.loop import Metric, misclassified, read_batch

EXAMPLES = 2
"""Of the training data, to trace the model with."""


class Study:
    """Trials on disk, and what they say. Made by `study` or `Study.open`.

    Attributes:
        folder: Where the trials are.
        plan: What was tried.
        trials: Every finished trial.
    """

    def __init__(self, records: Records) -> None:
        self.folder = records.folder
        self.plan = records.plan()
        self.trials: list[Trial] = records.all()

    @classmethod
    def open(cls, folder: str | Path) -> Study:
        """A study that was made before, finished or not.

        Raises:
            BundleError: There is none, or it is damaged.
        """
        return cls(Records(folder))

    @property
    def finished(self) -> bool:
        """True where every trial has been made."""
        return len(self.trials) == len(self.plan.cells()) * self.plan.trials

    def steps(self) -> dict[Cell, int | None]:
        """The fewest steps of each cell; None where the goal was not reached."""
        return {
            cell: fewest([trial for trial in self.trials if trial.cell == cell]) for cell in self.plan.cells()
        }

    def curves(self) -> list[Curve]:
        """Steps against batch size, with the fit, for each sparsity and optimizer."""
        return list(self._curves)

    @functools.cached_property
    def _curves(self) -> list[Curve]:
        return curves(self.trials, seed=self.plan.seed)

    def claims(self) -> list[Claim]:
        """What the trials say of the paper's claims."""
        return claims(self._curves)

    def report(self, folder: str | Path | None = None) -> list[Path]:
        """Write ``report.html`` and its figures as PNG; by default into the folder of the study.

        Raises:
            UserError: matplotlib is not installed, or no trial reached the goal.
        """
        return write_report(self.plan, self.trials, self._curves, Path(folder or self.folder))

    def __repr__(self) -> str:
        done = sum(trial.outcome == "complete" for trial in self.trials)
        return f"Study in {self.folder}: {len(self.trials)} trials, {done} of them reached the goal"


def study(
    model: nn.Module | Program,
    folder: str | Path,
    *,
    train: Pair,
    held: Pair,
    loss: Metric,
    error: Metric = misclassified,
    batches: Sequence[int] = (1, 4, 16, 64, 256, 1024),
    sparsities: Sequence[float] = (0.0, 0.5, 0.7, 0.9),
    optimizers: Sequence[OptimizerName] = ("sgd", "momentum", "nesterov"),
    trials: int = 16,
    goal: float = 0.1,
    budget: int = 4000,
    check: int = 8,
    method: Method = "snip",
    decay: Decay = "constant",
    rates: tuple[float, float] = (1e-3, 10.0),
    momenta: tuple[float, float] = (0.5, 0.99),
    patience: float = 1.5,
    fused: int = 16,
    processes: int | None = None,
    seed: int = 0,
    on_cell: Callable[[str], None] | None = None,
) -> Study:
    """Measure how the steps to a goal fall with the batch size, for dense and sparse models.

    For each sparsity, batch size and optimizer the metaparameters are searched, quasi-randomly, within a
    budget of trials; the fewest steps count (Lee, Torr & Jaggi, arXiv 2003.11316). Every trial is stored
    when it has ended, so that a study that was stopped goes on where it was. Under ``torchrun`` the cells are
    shared out to all processes, which write into the same folder.

    Args:
        model: As it is at initialisation; it is not changed.
        folder: Of the records; one that holds this study already is gone on with.
        train: Inputs and targets to train on, all of them.
        held: Inputs and targets to validate on.
        loss: Of outputs and targets the mean over a batch; it has to be a function of a module, as other
            processes need it.
        error: What the goal is about, likewise.
        batches: Batch sizes.
        sparsities: Shares of the weights that are removed at initialisation.
        optimizers: Some of ``"sgd"``, ``"momentum"`` and ``"nesterov"``.
        trials: Sets of metaparameters for each cell.
        goal: Validation error to reach.
        budget: Steps that a trial may take.
        check: The validation error is looked at every so many steps, and more often at the start; see `Plan`.
        method: How weights are chosen, by gradients on all training data where it needs any.
        decay: Of the learning rate: ``"constant"`` or ``"linear"``, whose end and length are searched, too.
        rates: Smallest and largest learning rate.
        momenta: Smallest and largest momentum.
        patience: A trial stops at this multiple of the fewest steps of its cell so far.
        fused: How many trials run as one module.
        processes: How many at once; by default one for each core.
        seed: Of the order of the data, and of the metaparameters.
        on_cell: Called with a line for each finished cell.

    Raises:
        UserError: An option is out of range, or the goal is met before the first step.
        BundleError: The folder holds a study of another configuration.
        As `sparsify`, for what cannot be traced or pruned.
    """
    inputs, targets, size = read_batch(torch.device("cpu"), train)
    plan = Plan(
        tuple(batches), tuple(sparsities), tuple(optimizers), trials, goal, budget, check, method, decay,
        (rates[0], rates[1]), (momenta[0], momenta[1]), patience, seed,
    ).checked()  # fmt: skip
    if fused < 1:
        raise UserError(f"{fused} trials as one, expected 1 or more")
    if max(plan.batches) > size:
        raise UserError(f"a batch of {max(plan.batches)} from {size} examples", hint="choose smaller batches")
    few = torch.utils._pytree.tree_map_only(Tensor, lambda x: x[:EXAMPLES], inputs)
    program = program_to_prune(model, *as_call(few, None), None)
    plan = replace(plan, model=_digest(program, train, held))
    records = Records(folder)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    records.open(plan)
    names = prunable(program)
    scoring = Scoring(method, train, loss, seed=seed)
    masks = {
        sparsity: choose(program, names, scoring, sparsity)[1]
        if sparsity
        else {name: torch.ones_like(program.state[name].tensor, dtype=torch.bool) for name in names}
        for sparsity in plan.sparsities
    }
    task = Task(emit(program), (inputs, targets), held, loss, error)
    # By their place among all cells, as processes may look at the folder at different times.
    own = [cell for cell in plan.cells()[rank::world] if len(records.finished(cell, trials)) < trials]
    jobs = [(task, masks[cell.sparsity], plan, cell, fused, folder) for cell in own]
    for line in _run_cells(jobs, (os.cpu_count() or 1) if processes is None else processes):
        if on_cell is not None:
            on_cell(line)
    return Study(records)


_Job = tuple[Task, Mapping[str, Tensor], Plan, Cell, int, str | Path]


def _run_cells(jobs: Sequence[_Job], processes: int) -> Iterator[str]:
    """A line for each cell, in their order."""
    if processes <= 1 or len(jobs) <= 1:
        yield from map(_run_cell, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), context, initializer=_one_thread) as pool:
        try:
            yield from pool.map(_run_cell, jobs)
        except BrokenProcessPool as error:
            raise UserError(
                "a process of the study ended before its trials did; what is finished is kept",
                hint='let the script start it below `if __name__ == "__main__":`, as every process reads '
                "the script, or give processes=1",
            ) from error


def _one_thread() -> None:
    torch.set_num_threads(1)


def _run_cell(job: _Job) -> str:
    """Make the trials of a cell that there are not, and store them; a line about them."""
    task, masks, plan, cell, fused, folder = job
    records = Records(folder)
    done = records.finished(cell, plan.trials)
    missing = [number for number in range(plan.trials) if number not in done]
    for start in range(0, len(missing), fused):
        best = fewest(list(records.finished(cell, plan.trials).values()))
        records.add(run_trials(task, masks, plan, cell, missing[start : start + fused], best))
    made = list(records.finished(cell, plan.trials).values())
    found = fewest(made)
    steps = f"the goal is not reached, {how_far(made)}" if found is None else f"{found} steps"
    return f"{cell.optimizer}, sparsity {cell.sparsity:g}, batch {cell.batch}: {steps}"


def _digest(program: Program, *pairs: Pair) -> str:
    """Identity of the model at initialisation and of the data."""
    return digest([str(program), [entry.tensor.detach() for entry in program.state.values()], pairs])
