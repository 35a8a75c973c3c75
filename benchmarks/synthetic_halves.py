"""Parts trained apart on synthetic labels, joined, and recovered, against the whole model.

    python benchmarks/synthetic_halves.py [--only digits emnist] [--seeds 5]

Left part, right part and whole train for the same number of epochs, with Adam at one rate; recovery epochs
come on top, and the whole model has as many. "emnist": no data of EMNIST are at hand, so images of its shape,
28 x 28 in 47 classes, are made: a smooth random pattern for each class, moved by up to three pixels, with
noise. Memory of a step is that of the cost model, FLOPs those of a forward pass of one example.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs

ROOT = Path(__file__).resolve().parents[1]
RECOVERY = (0, 1, 2, 4)
TEXT = """# Parts trained on synthetic labels

Written by `python benchmarks/synthetic_halves.py`, {date}: torch {torch}, Python {python}; {seeds} seeds,
batches of 32, Adam with a rate of 0.001. Test error in percent, mean and standard deviation. The whole model
has the epochs of a part and those of recovery. Only the abstract of arXiv 2403.11204 was at hand, so none of
its figures stands here.

| data | cut at | epochs of a part | joined | {columns} | whole model, {epochs} |
| --- | --- | --- | --- | {rule} | --- |
{rows}

| data | part | parameters | memory of a step | FLOPs | of the whole model |
| --- | --- | --- | --- | --- | --- |
{costs}
"""
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model with its data, and the module at which the right part starts."""

    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Data, Data]]
    at: str
    classes: int
    epochs: int


def mlp() -> nn.Module:
    """300-150-10, as in table III of arXiv 2102.01963."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 150), nn.ReLU(), nn.Linear(150, 10)
    )


def digits() -> tuple[Data, Data]:
    """scikit-learn's."""
    return gs.data.digits(), gs.data.digits(train=False)


def convolutional() -> nn.Module:
    """Images ``[N, 1, 28, 28]`` to scores of 47 classes."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(),
        nn.Linear(128, 47),
    )  # fmt: skip


def made() -> tuple[Data, Data]:
    """Images of EMNIST's shape."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(47, 1, 7, 7, generator=generator)
    patterns = functional.interpolate(coarse, (28, 28), mode="bicubic")

    def draw(count: int) -> Data:
        classes = torch.randint(0, 47, (count,), generator=generator)
        moves = torch.randint(-3, 4, (count, 2), generator=generator).tolist()
        images = [
            patterns[label].roll(move, (1, 2)) for label, move in zip(classes.tolist(), moves, strict=True)
        ]
        return torch.stack(images) + 2.0 * torch.randn(count, 1, 28, 28, generator=generator), classes

    return draw(4700), draw(1880)


CASES = {
    "digits": Case(mlp, digits, "3", 10, 30),
    "emnist": Case(convolutional, made, "9", 47, 8),
}


def errors(case: Case, seed: int, data: tuple[Data, Data]) -> list[float]:
    """Test errors: joined, after each number of recovery epochs, and of the whole model."""
    train, test = data
    tests = [test]

    def batches() -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(*train), 32, shuffle=True, generator=torch.Generator())

    torch.manual_seed(seed)
    labels = gs.train.Labels(case.classes, noise=0.5, seed=seed)
    halves = gs.synthetic_halves(case.build(), train[0][:2], at=case.at, labels=labels)
    joined = halves.fit(
        batches(), case.epochs, recovery=max(RECOVERY), test=tests, error=gs.train.misclassified
    )
    assert joined.before is not None
    found = [joined.before[1], *(joined.recovery[count - 1].test_error for count in RECOVERY[1:])]
    torch.manual_seed(seed)
    whole = case.build()
    epochs = case.epochs + max(RECOVERY)
    found.append(
        gs.train.fit(
            whole, torch.optim.Adam(whole.parameters(), 1e-3), functional.cross_entropy, batches(), epochs,
            test=tests, error=gs.train.misclassified, seed=seed,
        )[-1].test_error
    )  # fmt: skip
    return [100 * error for error in found if error is not None]


def costs(name: str, case: Case, example: Tensor) -> list[str]:
    """A row for each part."""
    halves = gs.synthetic_halves(case.build(), example, at=case.at, labels=case.classes)
    *parts, whole = halves.costs()
    return [
        f"| {name} | {number} | {part.parameters:,} | {part.memory / 1e6:.2f} MB | "
        f"{part.flops / len(example):,.0f} | {part.memory / whole.memory:.0%} of the memory, "
        f"{part.flops / whole.flops:.0%} of the FLOPs |"
        for number, part in enumerate(parts)
    ]


def main() -> None:
    """Train, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "synthetic_halves.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, sizes = [], []
    for name in options.only:
        case = CASES[name]
        data = case.data()
        found = [errors(case, seed, data) for seed in range(options.seeds)]
        cells = " | ".join(
            f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
            for values in zip(*found, strict=True)
        )
        rows.append(f"| {name} | {case.at} | {case.epochs} | {cells} |")
        sizes += costs(name, case, data[0][0][:32])
        print(rows[-1], flush=True)
    options.out.write_text(
        TEXT.format(
            date=datetime.date.today(), torch=torch.__version__, python=platform.python_version(),
            seeds=options.seeds, epochs=f"{max(RECOVERY)} epochs more",
            columns=" | ".join(f"{count} recovery" for count in RECOVERY[1:]),
            rule=" | ".join("---" for _ in RECOVERY[1:]), rows="\n".join(rows), costs="\n".join(sizes),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
