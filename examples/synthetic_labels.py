"""Two halves of a network that train apart on synthetic labels, are joined, and recover.

    python examples/synthetic_labels.py
    python examples/synthetic_labels.py --epochs 20 --recovery 2 --noise 0.5

On scikit-learn's digits. The left half never sees the right one, nor the right one an image.
Takes about half a minute on a CPU.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train both halves, join them, train the whole a little; returns the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="of each half")
    parser.add_argument("--recovery", type=int, default=2, help="epochs of the whole model")
    parser.add_argument("--noise", type=float, default=0.5, help="on the labels that the right half is given")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    images, digits = gs.data.digits()
    data = DataLoader(TensorDataset(images, digits), 32, shuffle=True, generator=torch.Generator())
    labels = gs.train.Labels(classes=10, noise=options.noise)
    halves = gs.synthetic_halves(model, images[:2], at="5", labels=labels)
    *parts, whole = halves.costs()
    for number, part in enumerate(parts):
        print(f"part {number}: {part.memory / whole.memory:.0%} of the memory of a training step")
    joined = halves.fit(
        data, options.epochs, recovery=options.recovery, test=[gs.data.digits(train=False)],
        error=gs.train.misclassified,
    )  # fmt: skip
    assert joined.before is not None and joined.before[1] is not None
    after = joined.recovery[-1].test_error if joined.recovery else joined.before[1]
    assert after is not None
    print(f"test error {joined.before[1]:.2%} when joined, {after:.2%} after {options.recovery} epochs more")
    return {"joined": joined.before[1], "recovered": after}


if __name__ == "__main__":
    main()
