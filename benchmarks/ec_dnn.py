"""EC-DNN against averages of parameters, an ensemble without compression and one model: errors, time, bytes.

    python benchmarks/ec_dnn.py [--only digits teacher] [--k 4 8] [--seeds 5]

All methods have the same model, shards, batches, number of steps of a worker and optimizer (SGD with
momentum), and the same number of trials: settings drawn at random, tau and the learning rate among them,
of which the one with the smallest error of the global model on a fifth of the training data that is held
out is taken. The seed of the trials is not used again. Results are kept in a JSON file beside the report,
so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphsplit as gs

RESULTS = Path(__file__).resolve().parent / "results"
KEPT = RESULTS / "ec_dnn.json"
Data = tuple[Tensor, Tensor]
TRIALS = 8
TRIAL_SEED = 1000
METHODS: dict[str, dict[str, Any]] = {
    "EC-DNN, simple": {"method": "ec", "weights": "simple"},
    "EC-DNN, regression": {"method": "ec", "weights": "regression"},
    "EC-DNN, margin": {"method": "ec", "weights": "margin"},
    "MA-DNN": {"method": "ma"},
    "E-DNN": {"method": "e"},
    "S-DNN": {"method": "s"},
}
TEXT = """# EC-DNN against averages of parameters, an ensemble, and one model

Written by `python benchmarks/ec_dnn.py`, {date}: torch {torch}, Python {python}, one thread of a CPU that was
busy with other work.

Each worker has an equal shard at random, batches of {batch}, SGD with momentum 0.9. Steps of a worker are
the same for all methods; those of compression are among them. {trials} trials of settings for each method
and K, by the error of the global model on a fifth of the training data. Mean and standard deviation over
{seeds} seeds of the test error in percent after the last round: of G, the global model (as large as K
models by EC-DNN and E-DNN), and of L, one model. A difference within one deviation is no evidence.

*Sooner* is when MA-DNN's global model first has its own last error, by when the method's has it: in steps
of a worker, and in time of the slowest worker of each round, as if each had a machine of its own, with
answers and compression, without communication and tests. It is the median over the seeds that have that
error at all. Global models exist once a round only, so that both are coarse where tau is large.

*If synchronous* are the bytes of the gradients that synchronous steps (DDP) would have sent in as many
steps; the last round of EC-DNN sends replicas before and, with diversity, after compression. *By
predictions* are the bytes of a round with `exchange="predictions"`, which changes no other number, counted in
a second round of the same settings; by E-DNN nothing has to be known of others until the end.

{sections}## Improvement of the global model over its replicas

Equation 11: the mean test error of the replicas less that of the global model, at every aggregation of all
seeds, in percentage points.

![distributions of the improvement](ec_dnn_improvement.svg)

{improvement}
"""
SECTION = """## {title}, K = {k}

{steps} steps of each worker, {parameters:,} parameters.

| method | error of G | error of L | sooner: steps, time | bytes of a round | by predictions | if \
synchronous | settings |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

![test error of the global model by steps](ec_dnn_{name}_{k}.svg)

{verdict}

"""


def digits() -> tuple[Data, Data]:
    """Handwritten digits."""
    return gs.data.digits(), gs.data.digits(train=False)


def teacher() -> tuple[Data, Data]:
    """Classes that a random network of two hidden layers tells apart, of points of 32 numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=2 / parameter.shape[1] ** 0.5)
        x = torch.randn(12_000, 32)
        with torch.no_grad():
            y = model(x).argmax(1)
    return (x[:8000], y[:8000]), (x[8000:], y[8000:])


def perceptron(given: int, width: int) -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(given, width), nn.ReLU(), nn.Linear(width, 10))


@dataclass(frozen=True)
class Case:
    """A task."""

    title: str
    data: Callable[[], tuple[Data, Data]]
    build: Callable[[], nn.Module]
    steps: int
    batch: int = 32


CASES = {
    "digits": Case("Digits", digits, partial(perceptron, 64, 100), 200),
    "teacher": Case("Teacher and student", teacher, partial(perceptron, 32, 128), 400),
}


def drawn(method: str, number: int) -> dict[str, Any]:
    """Settings of a trial; the first numbers are those of all methods."""
    source = random.Random(number)
    found = {"tau": source.choice((10, 20, 50, 100)), "rate": source.choice((0.02, 0.05, 0.1, 0.2))}
    if METHODS[method]["method"] == "ec":
        found |= {
            "p": source.choice((0.1, 0.2, 0.4)), "beta": source.choice((0.3, 0.5, 0.7)),
            "mu": source.choice((0.7, 1.0)), "diversity": source.choice((0.0, 0.02, 0.1)),
            "average": source.choice(("outputs", "probabilities")),
        }  # fmt: skip
    return found


def trained(
    case: Case,
    method: str,
    k: int,
    chosen: dict[str, Any],
    seed: int,
    data: tuple[Data, Data],
    **changes: Any,
) -> gs.train.EnsembleTrained:
    """One run."""
    options = dict(chosen)
    rate = options.pop("rate")
    if "beta" in options:
        options["alpha"] = 1 - options["beta"]
    options |= {"rounds": case.steps // options["tau"], **changes}
    settings = gs.train.EnsembleCompression(
        k=k, batch=case.batch, seed=seed, on_nan="leave_out",
        optimizer=lambda model: torch.optim.SGD(model.parameters(), rate, momentum=0.9),
        **METHODS[method], **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    train, test = data
    return settings.run(case.build, train, F.cross_entropy, test=[test], error=gs.train.misclassified)


def held_out(data: Data) -> tuple[Data, Data]:
    """Training data without a fifth, and that fifth."""
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(TRIAL_SEED))
    fifth = len(order) // 5
    first, second = ((data[0][part], data[1][part]) for part in (order[fifth:], order[:fifth]))
    return first, second


def last_error(found: gs.train.EnsembleTrained) -> float:
    """Of the global model, in percent."""
    error = found.rounds[-1].test_error
    assert error is not None
    return 100 * error


def measure(case: Case, method: str, k: int, seeds: int) -> dict[str, Any]:
    """Trials, then all seeds with what was best."""
    data = case.data()
    trials = [drawn(method, number) for number in range(TRIALS)]
    scores = [last_error(trained(case, method, k, trial, TRIAL_SEED, held_out(data[0]))) for trial in trials]
    best = trials[scores.index(min(scores))]
    runs = []
    for seed in range(seeds):
        found = trained(case, method, k, best, seed, data)
        _, local = gs.train.evaluate(
            found.local_model, F.cross_entropy, [data[1]], error=gs.train.misclassified
        )
        assert local is not None
        rounds = [
            {"steps": r.steps, "error": 100 * (r.test_error or 0.0), "seconds": max(r.seconds),
             "bytes": r.bytes, "improvement": 100 * (r.improvement or 0.0)}
            for r in found.rounds
        ]  # fmt: skip
        runs.append({"rounds": rounds, "local": 100 * local})
    return {"trials": scores, "settings": best, "runs": runs}


def of_predictions(case: Case, method: str, k: int, chosen: dict[str, Any]) -> int | None:
    """Bytes of a round that sends predictions; None where there is no ensemble."""
    if METHODS[method]["method"] not in ("ec", "e"):
        return None
    found = trained(case, method, k, chosen, 0, case.data(), rounds=2, exchange="predictions")
    return found.rounds[-1].bytes


# The report


def spread(values: list[float]) -> str:
    """Mean and deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else "-"


def globals_of(found: dict[str, Any]) -> list[float]:
    """Last errors of the global model."""
    return [run["rounds"][-1]["error"] for run in found["runs"]]


def reached(run: dict[str, Any], error: float) -> tuple[float, float] | None:
    """Steps and seconds until the global model first has an error."""
    seconds = 0.0
    for item in run["rounds"]:
        seconds += item["seconds"]
        if item["error"] <= error + 1e-9:
            return item["steps"], seconds
    return None


def sooner(found: dict[str, Any], averaged: dict[str, Any]) -> list[tuple[float, float]]:
    """How many times sooner MA-DNN's last error is reached, in steps and seconds; of seeds that do."""
    ratios = []
    for run, other in zip(found["runs"], averaged["runs"], strict=True):
        wanted = other["rounds"][-1]["error"]
        own, theirs = reached(run, wanted), reached(other, wanted)
        if own is not None and theirs is not None:
            ratios.append((theirs[0] / own[0], theirs[1] / own[1]))
    return ratios


def medians(ratios: list[tuple[float, float]]) -> tuple[float, float]:
    """Of steps and of seconds."""
    steps, seconds = (statistics.median(column) for column in zip(*ratios, strict=True))
    return steps, seconds


def row(method: str, found: dict[str, Any], averaged: dict[str, Any], synchronous: int) -> str:
    """One method."""
    ratios, seeds = sooner(found, averaged), len(found["runs"])
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    sent = found["runs"][0]["rounds"][-1]["bytes"]
    predicted = "-" if found["predictions"] is None else f"{found['predictions']:,}"
    speed = "never"
    if ratios:
        steps, seconds = medians(ratios)
        speed = f"{steps:.2f}, {seconds:.2f} ({len(ratios)} of {seeds} seeds)"
    steps_apart = "-" if method == "S-DNN" else f"{synchronous * found['settings']['tau']:,}"
    return (
        f"| {method} | {spread(globals_of(found))} | {spread([run['local'] for run in found['runs']])} | "
        f"{speed} | {sent:,} | {predicted} | {steps_apart} | {settings} |"
    )


def verdict(results: dict[str, Any]) -> str:
    """Which targets were met."""
    averaged = results["MA-DNN"]
    mean = statistics.mean(globals_of(averaged))
    lines = []
    for method, found in results.items():
        if not method.startswith("EC"):
            continue
        own = statistics.mean(globals_of(found))
        ratios = sooner(found, averaged)
        met = len(ratios) == len(found["runs"]) and medians(ratios)[1] >= 2.2
        place = "below" if own < mean else "not below"
        lines.append(
            f"- {method}: G is {place} MA-DNN's, {own:.2f} against {mean:.2f} (target: below); "
            f"2.2 times as soon: {'met' if met else 'missed'}."
        )
    return "\n".join(lines)


def draw(name: str, k: int, results: dict[str, Any]) -> None:
    """Test errors of the global models by steps."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "graphsplit"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for method, found in results.items():
        runs = [run["rounds"] for run in found["runs"]]
        steps = [item["steps"] for item in runs[0]]
        columns = zip(*([item["error"] for item in run] for run in runs), strict=True)
        axes.plot(steps, [statistics.mean(column) for column in columns], label=method)
    axes.set(xlabel="steps of a worker", ylabel="test error of G, percent", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / f"ec_dnn_{name}_{k}.svg", metadata={"Date": None})
    pyplot.close(figure)


def draw_improvement(results: dict[str, Any]) -> str:
    """Distributions of equation 11, as a figure and as a table."""
    from matplotlib import pyplot

    shown = ("EC-DNN, simple", "MA-DNN", "E-DNN")
    figure, axes = pyplot.subplots(1, len(results), figsize=(4 * len(results), 3.2), squeeze=False)
    lines = ["| task | method | mean | lowest | below zero |", "| --- | --- | --- | --- | --- |"]
    for place, (case, own) in zip(axes[0], results.items(), strict=True):
        for method in shown:
            values = [item["improvement"] for run in own[method]["runs"] for item in run["rounds"]]
            place.hist(values, bins=20, alpha=0.5, label=method, density=True)
            below = sum(value < 0 for value in values) / len(values)
            lines.append(
                f"| {case} | {method} | {statistics.mean(values):.2f} | {min(values):.2f} | {below:.1%} |"
            )
        place.set(title=case, xlabel="percentage points")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "ec_dnn_improvement.svg", metadata={"Date": None})
    pyplot.close(figure)
    return "\n".join(lines)


def report(results: dict[str, Any], seeds: int) -> None:
    """Tables and figures of what is complete."""
    sections, complete = [], {}
    for key, own in results.items():
        if own.keys() != METHODS.keys():
            continue
        name, k = key.split()
        case = CASES[name]
        complete[f"{name}, K = {k}"] = own
        parameters = sum(parameter.numel() for parameter in case.build().parameters())
        synchronous = 2 * (int(k) - 1) * parameters * 4
        rows = [row(method, own[method], own["MA-DNN"], synchronous) for method in METHODS]
        draw(name, int(k), own)
        sections.append(
            SECTION.format(
                title=case.title, name=name, k=k, steps=case.steps, parameters=parameters,
                rows="\n".join(rows), verdict=verdict(own),
            )
        )  # fmt: skip
    if not complete:
        return
    text = TEXT.format(
        date=datetime.date.today(), torch=torch.__version__, python=platform.python_version(), batch=32,
        trials=TRIALS, seeds=seeds, sections="".join(sections), improvement=draw_improvement(complete),
    )  # fmt: skip
    (RESULTS / "ec_dnn.md").write_text(text)


def main() -> None:
    """Train what is missing, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--k", nargs="*", type=int, default=[4, 8])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name in options.only:
        for k in options.k:
            own = results.setdefault(f"{name} {k}", {})
            for method in METHODS:
                case = CASES[name]
                if method not in own or len(own[method]["runs"]) < options.seeds:
                    own[method] = measure(case, method, k, options.seeds)
                elif "predictions" in own[method]:
                    continue
                found = own[method]
                found["predictions"] = of_predictions(case, method, k, found["settings"])
                print(name, k, method, spread(globals_of(found)), found["settings"], flush=True)
                KEPT.write_text(json.dumps(results, indent=None) + "\n")
    report(results, options.seeds)


if __name__ == "__main__":
    main()
