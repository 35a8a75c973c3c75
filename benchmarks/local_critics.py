"""Local critics against backpropagation on scikit-learn's digits: errors of every sub-model over seeds.

    python benchmarks/local_critics.py [--only mlp resnet] [--seeds 5] [--epochs 60]

The same model, optimizer (Adam), rate, batches and number of epochs for both; the rate falls to zero by a
cosine. Backpropagation trains the whole model, local critics train groups with n critics. Errors are those of
the test data after the last epoch, in percent, mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs

ROOT = Path(__file__).resolve().parents[1]
TEXT = """# Local critics against backpropagation

Written by `python benchmarks/local_critics.py {arguments}`, {date}: torch {torch}, Python
{python}.

scikit-learn's digits (1,437 for training, 360 for the test), {seeds} seeds, {epochs} epochs, batches of 32,
Adam with a rate of 0.001 that falls to zero by a cosine, for both. Test error in percent, mean and standard
deviation. Sub-model i is groups 0 to i with critic i; the last column is the model itself.

| model | method | {columns} | the model |
| --- | --- | {rule} | --- |
{rows}

Parameters and FLOPs of an example, critics included:

| model | n | parameters | FLOPs |
| --- | --- | --- | --- |
{sizes}
"""


def mlp() -> nn.Module:
    """The paper's table III: 300 and 150 hidden units."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 150), nn.ReLU(), nn.Linear(150, 10)
    )


class Block(nn.Module):
    """Two convolutions and a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Images of ``width`` channels."""
        return torch.relu(x + self.body(x))


def resnet(width: int = 16) -> nn.Module:
    """A small one of three blocks."""
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    blocks = [Block(width) for _ in range(3)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


# Where the groups start, for each number of critics.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[int, list[str]]]] = {
    "mlp": (mlp, {1: ["3"], 2: ["3", "5"]}),
    "resnet": (resnet, {1: ["2"], 2: ["1", "3"]}),
}
Rows = list[list[float]]


def data(seed: int) -> tuple[DataLoader[tuple[Tensor, ...]], list[tuple[Tensor, Tensor]]]:
    """Training batches in an order of this seed, and the test data."""
    generator = torch.Generator().manual_seed(seed)
    train = DataLoader(TensorDataset(*gs.data.digits()), 32, shuffle=True, generator=generator)
    return train, [gs.data.digits(train=False)]


def backpropagation(build: Callable[[], nn.Module], seed: int, epochs: int) -> list[float]:
    """Test error of the whole model."""
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    train, test = data(seed)
    records = gs.train.fit(
        model, optimizer, functional.cross_entropy, train, epochs, test=test, scheduler=schedule,
        error=gs.train.misclassified, seed=seed,
    )  # fmt: skip
    error = records[-1].test_error
    assert error is not None
    return [error]


def local(build: Callable[[], nn.Module], places: Sequence[str], seed: int, epochs: int) -> list[float]:
    """Test errors of every sub-model."""
    torch.manual_seed(seed)
    train, test = data(seed)
    critics = gs.local_critics(build(), test[0][0][:4], at=places, seed=seed)
    recipe = gs.train.Recipe(scheduler=lambda made: torch.optim.lr_scheduler.CosineAnnealingLR(made, epochs))
    critics.configure(recipe)
    records = critics.fit(train, epochs)
    assert len(records) == epochs
    return list(critics.evaluate(test, error=gs.train.misclassified)[1])


def cells(rows: Rows, columns: int) -> str:
    """Mean and deviation of each sub-model, the model last."""
    found = [
        f"{100 * statistics.mean(values):.2f} ± {100 * statistics.stdev(values):.2f}"
        for values in zip(*rows, strict=True)
    ]
    return " | ".join([*found[:-1], *["-"] * (columns - len(found) + 1), found[-1]])


def main() -> None:
    """Train, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "local_critics.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = max(n for name in options.only for n in MODELS[name][1])
    rows, sizes = [], []
    for name in options.only:
        build, places = MODELS[name]
        whole = [backpropagation(build, seed, options.epochs) for seed in range(options.seeds)]
        rows.append(f"| {name} | backpropagation | {cells(whole, columns)} |")
        print(rows[-1], flush=True)
        for n, at in places.items():
            found = [local(build, at, seed, options.epochs) for seed in range(options.seeds)]
            rows.append(f"| {name} | local critics, n = {n} | {cells(found, columns)} |")
            print(rows[-1], flush=True)
            critics = gs.local_critics(build(), gs.data.digits()[0][:4], at=at)
            parts = critics.complexity()
            counts = " / ".join(f"{item.parameters:,}" for item in parts)
            flops = " / ".join(f"{item.flops:,.0f}" for item in parts)
            sizes.append(f"| {name} | {n} | {counts} | {flops} |")
    options.out.write_text(
        TEXT.format(
            arguments=" ".join(sys.argv[1:]), date=datetime.date.today(), torch=torch.__version__,
            python=platform.python_version(),
            seeds=options.seeds, epochs=options.epochs,
            columns=" | ".join(f"sub-model {number}" for number in range(columns)),
            rule=" | ".join(["---"] * columns), rows="\n".join(rows), sizes="\n".join(sizes),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
