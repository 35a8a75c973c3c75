"""The report of a study: figures, a table, and the paper's claims, as HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphsplit.errors import UserError
from graphsplit.scaling.analysis import Curve, Interval, claims
from graphsplit.scaling.plan import Plan, Trial, fewest, how_far

PAGE = """<!doctype html>
<meta charset="utf-8"><title>Steps against batch size</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }}
img {{ max-width: 100%; }}
</style>
<h1>Steps to a validation error of {goal:g}, against batch size</h1>
<p>{trials} trials, {complete} of them reached the goal, {late} did not, {diverged} diverged. Pruned by
{method}; {count} sets of metaparameters for each point; the goal is looked at every {check} steps, more
often at the start, for at most {budget}.</p>
{figures}
<h2>Fits of K(B) = c1 / B + c2</h2>
{table}
<h2>Claims of the paper, against the dense model</h2>
{claims}
"""


def write_report(plan: Plan, trials: Sequence[Trial], curves: Sequence[Curve], folder: Path) -> list[Path]:
    """Write figures and ``report.html`` into a folder; see `graphsplit.Study.report`."""
    if not any(curve.steps for curve in curves):
        raise UserError(
            f"no trial reached the goal, an error of {plan.goal:g}: {how_far(trials)}; "
            "so there is nothing to show",
            hint="choose an easier goal, a larger budget of steps, or another range of rates",
        )
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "figures need matplotlib, which is not installed", hint="pip install 'graphsplit[plots]'"
        ) from None
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "steps.png": _steps(curves, normalised=False),
        "normalised.png": _steps(curves, normalised=True),
        "metaparameters.png": _scatter(plan, trials),
    }
    places = []
    for name, figure in figures.items():
        places.append(folder / name)
        figure.savefig(places[-1], dpi=110, bbox_inches="tight", metadata={"Software": None})
    outcomes = [trial.outcome for trial in trials]
    page = PAGE.format(
        goal=plan.goal, trials=len(trials), complete=outcomes.count("complete"), method=plan.method,
        late=outcomes.count("not reached"), diverged=outcomes.count("diverged"), count=plan.trials,
        check=plan.check, budget=plan.budget,
        figures="\n".join(f'<img src="{name}" alt="">' for name in figures),
        table=_html(*fits(curves)), claims=_html(*verdicts(curves)),
    )  # fmt: skip
    places.append(folder / "report.html")
    places[-1].write_text(page, "utf-8")
    return places


Table = tuple[list[str], list[list[str]]]


def fits(curves: Sequence[Curve]) -> Table:
    """Head and rows of the table of fits."""
    head = ["optimizer", "sparsity", "c1", "c2", "critical batch", "perfect", "diminishing", "maximal"]
    rows = []
    for curve in curves:
        row = [curve.optimizer, f"{curve.sparsity:g}"]
        if curve.fit is not None:
            regimes = curve.regimes()
            row += [
                _with(curve.fit.c1, curve.c1), _with(curve.fit.c2, curve.c2),
                _with(curve.fit.critical, curve.critical),
            ]  # fmt: skip
            for name in ("perfect scaling", "diminishing returns", "maximal data parallelism"):
                own = [batch for batch, regime in regimes.items() if regime == name]
                row.append(f"{min(own)} to {max(own)}" if own else "none")
        rows.append(row + ["-"] * (len(head) - len(row)))
    return head, rows


def verdicts(curves: Sequence[Curve]) -> Table:
    """Head and rows of the table of claims."""
    head = ["claim", "optimizer", "sparsity", "critical batch over that of dense", "verdict"]
    rows = [
        [
            claim.text,
            claim.optimizer,
            f"{claim.sparsity:g}",
            _with(claim.ratio, claim.interval),
            claim.verdict,
        ]
        for claim in claims(curves)
    ]
    return head, rows


def _with(value: float, interval: Interval) -> str:
    return f"{value:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"


def _html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _steps(curves: Sequence[Curve], *, normalised: bool) -> Any:
    """Steps against batch size, both as log2, a panel for each optimizer, with the line of slope -1."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(curve.optimizer for curve in curves))
    figure = Figure(figsize=(5 * len(names), 4.2))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names, strict=True):
        shown = [curve for curve in curves if curve.optimizer == name and curve.steps]
        for number, curve in enumerate(shown):
            first = next(iter(curve.steps.values())) if normalised else 1
            batches = list(curve.steps)
            counts = [count / first for count in curve.steps.values()]
            axes.plot(batches, counts, "o", color=f"C{number}", label=f"{curve.sparsity:.0%} removed")
            if curve.fit is not None:
                axes.plot(batches, [curve.fit(batch) / first for batch in batches], color=f"C{number}")
        if shown:
            batches = sorted({batch for curve in shown for batch in curve.steps})
            top = max(next(iter(c.steps.values())) * next(iter(c.steps)) for c in shown)
            scale = batches[0] if normalised else top
            axes.plot(batches, [scale / batch for batch in batches], "k--", lw=0.8, label="slope -1")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set(title=name, xlabel="batch size")
        axes.legend(fontsize=8)
        axes.set_ylabel("steps over those at the smallest batch" if normalised else "steps to the goal")
    return figure


def _scatter(plan: Plan, trials: Sequence[Trial]) -> Any:
    """Metaparameters of all trials of the largest sparsity, the best of each batch size marked."""
    from matplotlib.figure import Figure

    sparsity = max(plan.sparsities)
    figure = Figure(figsize=(5 * len(plan.optimizers), 4.2))
    panels = figure.subplots(1, len(plan.optimizers), squeeze=False)[0]
    for axes, name in zip(panels, plan.optimizers, strict=True):
        own = [t for t in trials if t.cell.optimizer == name and t.cell.sparsity == sparsity]
        marks = {"complete": ("o", "C0"), "not reached": ("x", "C7"), "diverged": ("^", "C3")}
        for outcome, (mark, colour) in marks.items():
            some = [t for t in own if t.outcome == outcome]
            axes.scatter(
                [t.cell.batch for t in some], [_effective(t) for t in some], marker=mark, color=colour, s=16,
                label=outcome,
            )  # fmt: skip
        for batch in sorted({t.cell.batch for t in own}):
            here = [t for t in own if t.cell.batch == batch]
            steps = fewest(here)
            best = [t for t in here if t.outcome == "complete" and t.steps == steps]
            axes.scatter([batch] * len(best), [_effective(t) for t in best], marker="*", color="C1", s=120)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(title=f"{name}, {sparsity:.0%} removed", xlabel="batch size", ylabel="rate / (1 - momentum)")
        axes.legend(fontsize=8)
    return figure


def _effective(trial: Trial) -> float:
    """Learning rate over one minus the momentum."""
    settings = trial.settings
    return settings.rate / max(1 - settings.momentum, math.ulp(1.0))
