"""A network that is pruned before training, by weights and by whole units, and then trained.

    python examples/sparse_from_the_start.py
    python examples/sparse_from_the_start.py --method synflow --sparsity 0.95

On scikit-learn's digits; takes some seconds on a CPU.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train dense, masked, shuffled and smaller; returns the test errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--method", default="snip", choices=["snip", "grasp", "synflow", "magnitude", "random"]
    )
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    images, digits = gs.data.digits()

    masks = gs.sparsify(
        model, data=(images, digits), loss=F.cross_entropy, method=options.method, sparsity=options.sparsity
    )
    for row in masks.report():
        print(f"{row.name}: {row.kept:,} of {row.size:,} weights, {row.density:.1%}")
    units = gs.prune_units(
        model, data=(images, digits), loss=F.cross_entropy, method=options.method, amount=0.5
    )
    print(units, "- the certificate holds" if units.verify().ok else "- THE CERTIFICATE FAILED")

    errors = {}
    for name, module in {
        "dense": gs.emit(masks.program),
        "masked": masks.module(),
        "masked, shuffled": masks.shuffled(0).module(),
        "half of the units": units.module,
    }.items():
        errors[name] = trained(module, images, digits, options.epochs)
        print(f"{name}: test error {errors[name]:.2%}")
    return errors


def trained(module: nn.Module, images: torch.Tensor, digits: torch.Tensor, epochs: int) -> float:
    """The test error after training."""
    data = DataLoader(TensorDataset(images, digits), 64, shuffle=True, generator=torch.Generator())
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    records = gs.train.fit(
        module, optimizer, F.cross_entropy, data, epochs, test=[gs.data.digits(train=False)],
        error=gs.train.misclassified,
    )  # fmt: skip
    found = records[-1].test_error
    assert found is not None
    return found


if __name__ == "__main__":
    main()
