"""Pre-training by partition (arXiv 1511.02954) against the baselines, with tables and plots.

    python benchmarks/partition_training.py [--seeds 5] [--epochs 24] [--only steps|lenet|local]

Sections, each of which can be run by itself (results are kept in a JSON file beside the report):

- steps: time of one training step of a sub-model against the full model's, beside the ratio of FLOPs.
- lenet: the paper's MNIST network on digits: every merge point, Net2WiderNet, diversity of the sub-models.
- local: the shape of the paper's CIFAR-10 network, small, on digits: with the "duplicated" baseline.

Every method has the same number of epochs (Net2WiderNet the same time), the same optimizer, and a learning
rate that falls from the same value to zero along a cosine over its whole length. Everything runs on one
thread, and times are its CPU time, which does not grow while other processes have the machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import graphsplit as gs
from graphsplit.passes.widen import widen

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import paper_cifar10
import paper_mnist

Results = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"
NAME = "partition_training"
PAPER_STEPS = {("LeNet", 2): 2.10, ("LeNet", 5): 3.17, ("LeNet", 10): 4.17, ("local layers", 2): 3.3}
GROUPS = {
    "convolutions": ("mkldnn_convolution", "convolution_backward"),
    "matrix products of the local layers": ("bmm",),
    "copies": ("copy_", "fill_", "cat"),
    "max pooling": ("max_pool2d_with_indices", "max_pool2d_with_indices_backward"),
    "average pooling of the normalisation": ("avg_pool3d", "avg_pool3d_backward"),
    "element by element, and the rest": (),
}
PROTOCOL = (
    "batches of 32, SGD with momentum and weight decay, a rate that falls from 0.01 to 0 along a cosine"
)
NOISE = 0.01
K = 2


def small_local() -> nn.Sequential:
    """The shape of the paper's CIFAR-10 network for digits of 8 × 8."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        paper_cifar10.normalisation(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        paper_cifar10.normalisation(),
        paper_cifar10.LocallyConnected(32, 32, 4),
        nn.ReLU(),
        paper_cifar10.LocallyConnected(32, 16, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )


# -- one step ------------------------------------------------------------------------------------------------


def steps(rounds: int) -> list[Results]:
    """CPU seconds of forward, backward and optimizer step; models take turns, so that load falls on all.

    Other processes slow down memory and caches: the least of all rounds is what the step takes by itself.
    """
    cases: list[tuple[str, nn.Module, Tensor, Sequence[int]]] = [
        ("LeNet", paper_mnist.lenet(), torch.randn(64, 1, 28, 28), (2, 5, 10)),
        ("local layers", paper_cifar10.network(), torch.randn(64, 3, 24, 24), (2,)),
    ]
    rows = []
    for name, model, x, ks in cases:
        targets = torch.randint(10, (len(x),))
        models = [model] + [gs.partition(model, x[:2], k=k).submodels[0] for k in ks]
        learners = [paper_mnist.sgd(each) for each in models]
        times: list[list[float]] = []
        for _ in range(rounds + 2):
            times.append([])
            for each, learner in zip(models, learners, strict=True):
                start = time.process_time()
                learner.zero_grad()
                functional.cross_entropy(each(x), targets).backward()
                learner.step()
                times[-1].append(time.process_time() - start)
        flops = [flops_of(each, x) for each in models]
        for place, k in enumerate(ks, 1):
            ratios = sorted(row[0] / row[place] for row in times[2:])
            rows.append({
                "model": name, "k": k, "full": min(row[0] for row in times[2:]),
                "part": min(row[place] for row in times[2:]),
                "ratio": statistics.median(ratios), "low": ratios[len(ratios) // 4],
                "high": ratios[3 * len(ratios) // 4], "flops": flops[0] / flops[place],
                "paper": PAPER_STEPS[name, k],
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def breakdown(rounds: int) -> dict[str, list[float]]:
    """Where a step of the CIFAR-10 network goes: seconds of the full model and of a half, by kind of op.

    The profiler knows wall time only, which load makes longer, never shorter: the least of all rounds counts.
    """
    x, targets = torch.randn(64, 3, 24, 24), torch.randint(10, (64,))
    model = paper_cifar10.network()
    models = (model, gs.partition(model, x[:2], k=2).submodels[0])
    found = {group: [math.inf] * len(models) for group in GROUPS}
    for _ in range(rounds):
        for place, each in enumerate(models):
            each.zero_grad()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                functional.cross_entropy(each(x), targets).backward()
            for group, seconds in by_group(profiler).items():
                found[group][place] = min(found[group][place], seconds)
    return found


def by_group(profiler: torch.profiler.profile) -> dict[str, float]:
    """Seconds of ops by their group, those that they call left out."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for op in profiler.key_averages():
        name = op.key.removeprefix("aten::")
        group = next(group for group, names in GROUPS.items() if not names or name in names)
        seconds[group] += op.self_cpu_time_total * 1e-6
    return seconds


def flops_of(model: nn.Module, x: Tensor) -> int:
    """FLOPs of a forward and a backward pass, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return counter.get_total_flops()


# -- whole schedules -----------------------------------------------------------------------------------------


class Batches:
    """A loader that notes the CPU seconds that each pass over it took, training between batches included."""

    def __init__(self, loader: DataLoader[tuple[Tensor, ...]]) -> None:
        self.loader = loader
        self.seconds: list[float] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        start = time.process_time()
        yield from self.loader
        self.seconds.append(time.process_time() - start)


class Experiment:
    """One network on digits, one seed at a time."""

    def __init__(self, build: Callable[[], nn.Module], size: int, lr: float, epochs: int) -> None:
        self.build, self.lr, self.epochs = build, lr, epochs
        self.train_set = TensorDataset(*gs.data.digits(train=True, size=size))
        self.test_images, self.test_labels = gs.data.digits(train=False, size=size)
        self.test = [(self.test_images, self.test_labels)]

    def data(self) -> Batches:
        """Shuffled batches of 32."""
        return Batches(DataLoader(self.train_set, 32, shuffle=True))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9, weight_decay=0.0005)

    def decay(self, optimizer: torch.optim.Optimizer, epochs: int, done: int = 0) -> LambdaLR:
        """Half a cosine over the batches of ``epochs`` epochs, of which the first ``done`` are behind us."""
        steps = len(self.data())
        return LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * (step / steps + done) / epochs)) / 2)

    def partition(self, seed: int) -> gs.Partition:
        """Freshly drawn sub-models."""
        torch.manual_seed(seed)
        return gs.partition(self.build(), self.test_images[:2], k=K, init="fresh", seed=seed)

    def fit(self, model: nn.Module, seed: int, epochs: range, total: int) -> Results:
        """Train one model for the epochs of these numbers out of a total."""
        data, optimizer = self.data(), self.optimizer(model)
        found = gs.train.fit(
            model, optimizer, functional.cross_entropy, data, len(epochs), test=self.test,
            scheduler=self.decay(optimizer, total, epochs.start), step_every_batch=True,
            error=gs.train.misclassified, seed=seed + 1000 * epochs.start,
        )  # fmt: skip
        return {"errors": [epoch.test_error for epoch in found], "seconds": sum(data.seconds)}

    def baseline(self, seed: int) -> Results:
        """The full model from scratch."""
        torch.manual_seed(seed)
        model = gs.emit(gs.trace(self.build(), self.test_images[:2]))
        return self.fit(model, seed, range(self.epochs), self.epochs)

    def duplicated(self, seed: int) -> Results:
        """The full model with cross-unit ops duplicated, and all weights (cross weights too) drawn anew."""
        part = self.partition(seed)
        model = part.merge()
        torch.manual_seed(seed)
        fresh = dict(self.build().named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(fresh[name])
        return self.fit(model, seed, range(self.epochs), self.epochs)

    def merged(self, seed: int, merge_at: int) -> Results:
        """A schedule, with the diversity of its sub-models when they are merged."""
        data = self.data()
        trained = gs.train.PartitionSchedule(
            self.partition(seed), self.optimizer, functional.cross_entropy, merge_at=merge_at,
            epochs=self.epochs, scheduler=partial(self.decay, epochs=self.epochs), step_every_batch=True,
            error=gs.train.misclassified, seed=seed,
        ).fit(data, self.test)  # fmt: skip
        history = trained.history
        apart = [sum(data.seconds[part * merge_at : (part + 1) * merge_at]) for part in range(K)]
        together = sum(data.seconds[K * merge_at :]) + history.merge_seconds
        return {
            "errors": [epoch.test_error for epoch in (*history.of(0), *history.of(None))],
            "seconds": sum(apart) + together,
            "parallel": max(apart) + together,
            "epoch": together / (self.epochs - merge_at),
            "diversity": self.diversity(trained.submodels),
        }

    def diversity(self, submodels: Sequence[nn.Module]) -> Results:
        """How differently sub-models see the test data: predictions and the units of the first layer."""
        with torch.no_grad():
            scores = [submodel.eval()(self.test_images) for submodel in submodels]
        guesses = [score.argmax(1) for score in scores]
        wrong = [guess != self.test_labels for guess in guesses]
        pairs = list(combinations(range(len(submodels)), 2))
        filters = [
            functional.normalize(next(submodel.parameters()).detach().flatten(1), dim=1)
            for submodel in submodels
        ]
        within = [similarity(each, each) for each in filters]
        across = [similarity(filters[a], filters[b]) for a, b in pairs]
        return {
            "disagree": statistics.mean(float((guesses[a] != guesses[b]).float().mean()) for a, b in pairs),
            "errors": statistics.mean(float(each.float().mean()) for each in wrong),
            "both_wrong": statistics.mean(float((wrong[a] & wrong[b]).float().mean()) for a, b in pairs),
            "mean_error": float((torch.stack(scores).mean(0).argmax(1) != self.test_labels).float().mean()),
            "within": statistics.mean(within),
            "across": statistics.mean(across),
        }

    def net2wider(self, seed: int, merge_at: int, epochs: int) -> Results:
        """A model of half the width for ``merge_at`` epochs, widened, and trained up to ``epochs``."""
        small = self.partition(seed).submodels[0]
        first = self.fit(small, seed, range(merge_at), epochs)
        state = {name: tensor.detach() for name, tensor in small.named_parameters()}
        trained = {name: tensor.requires_grad_() for name, tensor in state.items()}
        program = self.partition(seed).programs[0].with_state(trained)
        model = gs.emit(widen(program, K, noise=NOISE, seed=seed).program)
        second = self.fit(model, seed, range(merge_at, epochs), epochs)
        return {
            "errors": [*first["errors"], *second["errors"]],
            "seconds": first["seconds"] + second["seconds"],
        }


def similarity(a: Tensor, b: Tensor) -> float:
    """Mean over units of ``a`` of the absolute cosine to the nearest unit of ``b``, itself left out."""
    cosine = (a @ b.T).abs()
    if a is b:
        cosine.fill_diagonal_(0)
    return float(cosine.max(1).values.mean())


def schedules(experiment: Experiment, seeds: int, *, duplicated: bool) -> Iterator[Results]:
    """Every schedule; lists over seeds by name. Given after each seed: a run that is stopped leaves some."""
    points = [experiment.epochs * quarter // 4 for quarter in range(4)]
    found: dict[str, list[Results]] = {}
    for seed in range(seeds):
        found.setdefault("full model", []).append(experiment.baseline(seed))
        if duplicated:
            found.setdefault("duplicated", []).append(experiment.duplicated(seed))
        for point in points:
            run = experiment.merged(seed, point)
            found.setdefault(f"merge at {point}", []).append(run)
            if point == experiment.epochs // 2 and not duplicated:
                spare = round((run["seconds"] - run["parallel"]) / run["epoch"])  # what sub-model 1 took
                for name, more in (("in turn", spare), ("in parallel", 0)):
                    wider = experiment.net2wider(seed, point, experiment.epochs + more)
                    found.setdefault(f"Net2WiderNet, time of merge at {point} {name}", []).append(wider)
            print(f"seed {seed}, merge at {point}: {run['errors'][-1]:.3f}", flush=True)
        yield {"protocol": PROTOCOL, "epochs": experiment.epochs, "points": points, "runs": found}


# -- the report ----------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def steps_table(rows: Sequence[Results]) -> list[str]:
    """Time of one step."""
    lines = [
        "| model | K | full model | sub-model | ratio | median of ratios, round by round (middle half) "
        "| ratio of FLOPs | paper |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['k']} | {row['full'] * 1e3:.1f} ms | {row['part'] * 1e3:.1f} ms "
            f"| {row['full'] / row['part']:.2f} "
            f"| {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) | {row['flops']:.2f} "
            f"| {row['paper']:.2f} |"
        )
    return lines


def breakdown_table(found: dict[str, list[float]]) -> list[str]:
    """Time by kind of op."""
    lines = ["| local layers, K = 2 | full model | sub-model | ratio |", "| --- | --- | --- | --- |"]
    for group, (full, part) in found.items():
        lines.append(f"| {group} | {full * 1e3:.1f} ms | {part * 1e3:.1f} ms | {full / part:.2f} |")
    return lines


def schedule_table(found: Results) -> list[str]:
    """Final errors and speed-ups."""
    base = found["runs"]["full model"]
    mean, deviation = spread([run["errors"][-1] for run in base])
    lines = [
        "| schedule | test error at the end | within one deviation of the full model | speed-up in turn "
        "| speed-up in parallel |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, runs in found["runs"].items():
        own, own_deviation = spread([run["errors"][-1] for run in runs])
        fits = "" if name == "full model" else ("yes" if own <= mean + deviation else "no")
        turn = statistics.median(b["seconds"] / r["seconds"] for b, r in zip(base, runs, strict=True))
        parallel = ""
        if "parallel" in runs[0]:
            ratio = statistics.median(b["seconds"] / r["parallel"] for b, r in zip(base, runs, strict=True))
            parallel = f"{ratio:.2f}"
        lines.append(f"| {name} | {own:.2%} ± {own_deviation:.2%} | {fits} | {turn:.2f} | {parallel} |")
    return lines


def diversity_table(found: Results) -> list[str]:
    """Sub-models at the moment of the merge."""
    lines = [
        "| merge at | error of a sub-model | of their mean | both wrong | they disagree "
        "| nearest filter within | nearest filter across |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for point in found["points"]:
        runs = [run["diversity"] for run in found["runs"][f"merge at {point}"]]
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        lines.append(
            f"| {point} | {mean['errors']:.2%} | {mean['mean_error']:.2%} | {mean['both_wrong']:.2%} "
            f"| {mean['disagree']:.2%} | {mean['within']:.2f} | {mean['across']:.2f} |"
        )
    return lines


def draw(found: Results, title: str, place: Path) -> None:
    """Test error over epochs: means over seeds on a logarithmic scale, merges marked by circles."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "graphsplit"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name in (name for name in found["runs"] if not name.startswith("Net2WiderNet")):
        errors = [run["errors"][: found["epochs"]] for run in found["runs"][name]]
        means = [statistics.mean(column) for column in zip(*errors, strict=True)]
        merge = int(name.removeprefix("merge at ")) if name.startswith("merge at ") else 0
        axes.plot(
            range(1, len(means) + 1), means, label=name, linewidth=1.4,
            marker="o", markerfacecolor="white", markevery=[merge - 1] if merge else [],
        )  # fmt: skip
    axes.set(title=title, xlabel="epochs", ylabel="test error", yscale="log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(place, metadata={"Date": None})
    pyplot.close(figure)


def write(results: Results) -> None:
    """The report, its plots, and the numbers behind them; sections that are not given stay as they were."""
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / f"{NAME}.json"
    results = (json.loads(kept.read_text()) if kept.exists() else {}) | results
    kept.write_text(json.dumps(results, indent=1) + "\n")
    lines = [
        "# Pre-training by partition",
        "",
        f"`python benchmarks/{NAME}.py`, {results['date']}, {results['machine']}. Times are CPU seconds of "
        "the one thread, because other processes used the machine too; read the ratios. Of the paper's "
        "figures, of a GPU, only those quoted here were at hand, not the paper itself: speed-ups of 1.45 in "
        "turn and 2.09 in parallel, and the ratios of one step.",
    ]
    if "steps" in results:
        lines += [
            "", "## One training step, batch of 64", "", *steps_table(results["steps"]), "",
            "Times are the least of all rounds. FLOPs fall by almost K², but work that is done once for each "
            "channel falls by K only: normalisation, pooling, activation functions. Forward and backward "
            "pass of the network with local layers, by kind of op, in wall time:", "",
            *breakdown_table(results["breakdown"]),
        ]  # fmt: skip
    titles = {
        "lenet": "The paper's LeNet on scikit-learn's digits (28 × 28), K = 2",
        "local": "Local layers and duplicated normalisation on scikit-learn's digits (8 × 8), K = 2",
    }
    for name, title in titles.items():
        if name not in results:
            continue
        found = results[name]
        seeds = len(found["runs"]["full model"])
        draw(found, title, RESULTS / f"{NAME}_{name}.svg")
        lines += [
            "", f"## {title}", "",
            f"{found['epochs']} epochs, {seeds} seeds, 1,437 images to train on, 360 to test (one of them is "
            f"0.28 %), {found['protocol']}. Speed-ups are medians over seeds of the full model's time by "
            "that of the schedule; in parallel counts the slower sub-model alone. The paper: 1.45 in turn, "
            "2.09 in parallel.",
            "", *schedule_table(found), "",
            f"![Test error by epoch]({NAME}_{name}.svg)", "",
            "Circles mark merges; before them the curve is that of sub-model 0.", "",
            "Diversity when the sub-models are merged (filters of the first layer: mean absolute cosine to "
            "the nearest other one of the same, and of the other sub-model):", "", *diversity_table(found),
        ]  # fmt: skip
    (RESULTS / f"{NAME}.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run the sections asked for, and write the report of all that have been run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=24, help="of a schedule; a multiple of 4")
    parser.add_argument("--rounds", type=int, default=30, help="steps to time")
    parser.add_argument("--only", choices=["steps", "lenet", "local"])
    options = parser.parse_args()
    if options.epochs % 4 or options.epochs < 4:
        parser.error("--epochs must be a multiple of 4")
    torch.set_num_threads(1)
    results: Results = {}
    results["date"] = str(datetime.date.today())
    results["machine"] = (
        f"{platform.machine()} with 1 thread, Python {platform.python_version()}, torch {torch.__version__}"
    )
    if options.only in (None, "steps"):
        results["steps"] = steps(options.rounds)
        results["breakdown"] = breakdown(options.rounds)
        write(results)
    if options.only in (None, "lenet"):
        experiment = Experiment(paper_mnist.lenet, 28, 0.01, options.epochs)
        for results["lenet"] in schedules(experiment, options.seeds, duplicated=False):
            write(results)
    if options.only in (None, "local"):
        experiment = Experiment(small_local, 8, 0.01, options.epochs)
        for results["local"] in schedules(experiment, options.seeds, duplicated=True):
            write(results)


if __name__ == "__main__":
    main()
