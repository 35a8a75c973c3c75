"""Local critics against backpropagation and other ways to train layer groups apart: errors over seeds.

    python benchmarks/local_critics.py [--only mlp resnet lstm] [--methods backpropagation ...] [--seeds 5]

All methods have the same models, batches, number of epochs and optimizer (Adam, whose rate falls to zero by a
cosine), and the same number of trials for their rates: on a fifth of the training data that is held out, with
a seed that is not used again, for a third of the epochs. ADMM, which has no rate and no batches, searches its
weights instead and runs as many rounds as the others run epochs. Results are kept in a JSON file beside the
report, so that models and methods can be run one by one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
import local_critics as example  # noqa: E402
from synthetic_halves import digits, mlp  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TEXT = """# Local critics against other ways to train

Written by `python benchmarks/local_critics.py`, {date}: torch {torch}, Python {python}.

Batches of 32, Adam, a rate that falls to zero by a cosine, for all; rates were searched with {trials} trials
for each method, on a fifth of the training data. Mean and standard deviation over the seeds, after the last
epoch, of the test error in percent, or of bits per character. Sub-model i is groups 0 to i with critic i; the
last column is the model itself. Where a method has no use for critics, they learn as probes, without a
gradient to the groups.

{sections}"""
SECTION = """## {title}

{epochs} epochs, {seeds} seeds.

| method | n | rate of groups, of critics | {columns} | the model |
| --- | --- | --- | {rule} | --- |
{rows}

Parameters and FLOPs of an example, critics included:

| n | parameters | FLOPs |
| --- | --- | --- |
{sizes}

"""
Data = tuple[Tensor, Tensor]
Split = tuple[Data, Data]


def text() -> Split:
    """Windows of the source of Python's modules."""
    found = gs.data.standard_library(60_000)
    train, valid = (
        gs.data.windows(part, example.LENGTH, batch=len(part))[0] for part in (found.train, found.valid)
    )
    return train, valid


def characters() -> nn.Module:
    """An LSTM of three layers."""
    return example.CharLSTM(len(gs.data.standard_library(60_000).symbols))


@dataclass(frozen=True)
class Case:
    """A model with its data, and where the groups start for each number of critics (None: balanced)."""

    title: str
    build: Callable[[], nn.Module]
    data: Callable[[], Split]
    places: dict[int, list[str] | None]
    epochs: int
    classes: bool = True


CASES = {
    "mlp": Case("300-150-10 on digits", mlp, digits, {1: ["3"], 2: ["3", "5"]}, 30),
    "resnet": Case(
        "A ResNet of three blocks on digits", example.resnet, digits, {1: ["2"], 2: ["1", "3"]}, 12
    ),
    "lstm": Case(
        "An LSTM of three layers of 96 units on Python's source", characters, text, {1: None, 2: None}, 12,
        classes=False,
    ),
}  # fmt: skip
METHODS: dict[str, Any] = {
    "backpropagation": "backpropagation",
    "local_critics": "local_critics",
    "joint": "joint",
    "synthetic_gradients": gs.train.SyntheticGradients(width=64),  # about as dear as the critics
}
RATES = (3e-3, 1e-2)
SHARES = (0.3, 0.1)
WEIGHTS = ((1.0, 10.0), (0.1, 1.0), (0.1, 3.0), (1.0, 30.0))
TRIAL_SEED = 1000


def trained(
    case: Case,
    method: str,
    n: int,
    rates: tuple[float, float],
    seed: int,
    epochs: int,
    data: Split,
) -> list[float]:
    """Test errors (or bits) of every sub-model."""
    torch.manual_seed(seed)
    model = case.build()
    train, test = (TensorDataset(*part) for part in data)
    local = gs.local_critics(model, data[0][0][:4], n=n, at=case.places[n], seed=seed)
    local.configure(
        gs.train.Recipe(
            optimizer=lambda module: torch.optim.Adam(module.parameters(), rates[0]),
            critic_optimizer=lambda module: torch.optim.Adam(module.parameters(), rates[1]),
            scheduler=lambda made: torch.optim.lr_scheduler.CosineAnnealingLR(made, epochs),
            method=METHODS[method],
        )
    )
    local.fit(DataLoader(train, 32, shuffle=True, generator=torch.Generator()), epochs)
    losses, errors = local.evaluate(
        DataLoader(test, 256), error=gs.train.misclassified if case.classes else None
    )
    return [100 * error for error in errors] if case.classes else [loss / math.log(2) for loss in losses]


def by_admm(case: Case, weights: tuple[float, float], seed: int, rounds: int, data: Split) -> list[float]:
    """Test error of the model."""
    torch.manual_seed(seed)
    admm = gs.train.ADMM(gs.trace(case.build(), data[0][0][:4]), beta=weights[0], gamma=weights[1], seed=seed)
    steps = admm.fit(*data[0], rounds, warm=rounds, test=data[1], error=gs.train.misclassified)
    assert steps[-1].test_error is not None
    return [100 * steps[-1].test_error]


def runs(case: Case) -> Iterator[tuple[str, int, list[tuple[float, float]], Callable[..., list[float]]]]:
    """Each method with its trials, and what trains it."""
    bare = [(rate, rate) for rate in (3e-4, 1e-3, *RATES)]
    yield "backpropagation", 1, bare, partial(trained, case, "backpropagation", 1)
    for method in list(METHODS)[1:]:
        for n in case.places:
            trials = [(rate, share * rate) for rate in RATES for share in SHARES]
            yield method, n, trials, partial(trained, case, method, n)
    if case.build is mlp:
        yield "ADMM", 0, list(WEIGHTS), partial(by_admm, case)


def held_out(data: Data) -> Split:
    """Training data without a fifth, and that fifth."""
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(TRIAL_SEED))
    fifth = len(order) // 5
    parts = (order[fifth:], order[:fifth])
    train, valid = ((data[0][part], data[1][part]) for part in parts)
    return train, valid


def measure(case: Case, seeds: int, wanted: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Trials, then all seeds with what was best."""
    data = case.data()
    trial_data = held_out(data[0])
    for method, n, trials, train in runs(case):
        if wanted and method not in wanted:
            continue
        found = [train(rates, TRIAL_SEED, max(case.epochs // 3, 1), trial_data)[-1] for rates in trials]
        best = trials[found.index(min(found))]
        errors = [train(best, seed, case.epochs, data) for seed in range(seeds)]
        tried = [*zip(trials, found, strict=True)]
        row = {"method": method, "n": n, "trials": tried, "rates": best, "errors": errors}
        yield f"{method} {n}", row


def row(found: dict[str, Any], columns: int, digits: int) -> str:
    """Mean and deviation of each sub-model, the model last."""
    cells = [
        f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"
        for values in zip(*found["errors"], strict=True)
    ]
    middle = [*cells[:-1], *["-"] * (columns - len(cells) + 1)]
    name = found["method"].replace("_", " ")
    rates = ", ".join(f"{rate:g}" for rate in found["rates"])
    return f"| {name} | {found['n'] or '-'} | {rates} | {' | '.join(middle)} | {cells[-1]} |"


def section(case: Case, results: dict[str, Any]) -> str:
    """The tables of one model."""
    columns = max(case.places)
    sizes = []
    inputs = case.data()[0][0][:4]
    for n, at in case.places.items():
        parts = gs.local_critics(case.build(), inputs, n=n, at=at).complexity()
        counts = " / ".join(f"{item.parameters:,}" for item in parts)
        sizes.append(f"| {n} | {counts} | {' / '.join(f'{item.flops:,.0f}' for item in parts)} |")
    rows = [row(found, columns, 2 if case.classes else 3) for found in results["runs"].values()]
    return SECTION.format(
        title=case.title, epochs=case.epochs, seeds=results["seeds"], rows="\n".join(rows),
        columns=" | ".join(f"sub-model {number}" for number in range(columns)),
        rule=" | ".join(["---"] * columns), sizes="\n".join(sizes),
    )  # fmt: skip


def main() -> None:
    """Train, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = RESULTS / "local_critics.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in options.only:
        for key, found in measure(CASES[name], options.seeds, options.methods):
            own = results.setdefault(name, {"runs": {}, "seeds": options.seeds})
            own["runs"][key] = found
            own["seeds"] = options.seeds
            print(name, row(found, max(CASES[name].places), 3), flush=True)
            kept.write_text(json.dumps(results, indent=1) + "\n")
    sections = [section(case, results[name]) for name, case in CASES.items() if name in results]
    (RESULTS / "local_critics.md").write_text(
        TEXT.format(
            date=datetime.date.today(), torch=torch.__version__, python=platform.python_version(),
            trials=len(RATES) * len(SHARES), sections="".join(sections),
        ).rstrip()
        + "\n"
    )  # fmt: skip


if __name__ == "__main__":
    main()
