"""Do local critics point downhill? The largest mu of every group over the epochs (arXiv 2102.01963, V-A).

    python benchmarks/sufficient_descent.py [--epochs 15]

The 300-150-10 network and the small ResNet of the examples on scikit-learn's digits, with the rates that
`benchmarks/local_critics.py` found; gradients over 512 training images.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
from local_critics import resnet  # noqa: E402
from synthetic_halves import mlp  # noqa: E402

CASES = (("mlp", mlp, ["3", "5"]), ("resnet", resnet, ["2"]))
NAME = "sufficient_descent"
RATES = (3e-3, 9e-4)
SAMPLE = 512
TEXT = """# Sufficient descent

Written by `python benchmarks/sufficient_descent.py`, {date}: torch {torch}, Python {python}.

A group follows the gradient `g` of its critic's loss, backpropagation the gradient `d` of the model's. The
largest `mu` for which `<d, g> >= mu |d|^2` is 1 for backpropagation and has to stay above 0. Over {epochs}
epochs on digits, gradients over {sample} training images, after every epoch:

| model | n | group | least | median | last | least cosine |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

{figures}
"""


def measure(build: Callable[[], nn.Module], at: list[str], epochs: int) -> gs.train.SufficientDescent:
    """One model, with a critic at each of the places."""
    torch.manual_seed(0)
    x, y = gs.data.digits()
    local = gs.local_critics(build(), x[:4], at=at)
    local.configure(
        gs.train.Recipe(
            optimizer=lambda module: torch.optim.Adam(module.parameters(), RATES[0]),
            critic_optimizer=lambda module: torch.optim.Adam(module.parameters(), RATES[1]),
        )
    )
    check = gs.train.SufficientDescent(local, [(x[:SAMPLE], y[:SAMPLE])])
    data = DataLoader(TensorDataset(x, y), 32, shuffle=True, generator=torch.Generator())
    local.fit(data, epochs, on_epoch=check)
    return check


def main() -> None:
    """Train, and write table and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = ROOT / "benchmarks" / "results"
    rows, figures = [], []
    for name, build, at in CASES:
        check = measure(build, at, options.epochs)
        file = f"{NAME}_{name}.svg"
        check.plot(results / file)
        figures.append(f"![The largest mu of every group of the {name}, by epoch]({file})")
        for group in range(len(at)):
            values = [row[group] for row in check.values]
            cosine = min(row[group] for row in check.cosines)
            middle = sorted(values)[len(values) // 2]
            cells = " | ".join(f"{value:.3f}" for value in (min(values), middle, values[-1], cosine))
            rows.append(f"| {name} | {len(at)} | {group} | {cells} |")
            print(rows[-1], flush=True)
    (results / f"{NAME}.md").write_text(
        TEXT.format(
            date=datetime.date.today(), torch=torch.__version__, python=platform.python_version(),
            epochs=options.epochs, sample=SAMPLE, rows="\n".join(rows), figures="\n\n".join(figures),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
