"""Train the same network with four learning rates at once, as one module, and keep the best.

    python examples/train_fused.py
    python examples/train_fused.py --rates 0.003 0.01 0.03 0.1 0.3 --epochs 10

On scikit-learn's digits. Every op does the work of all networks; each has weights, running statistics,
dropout and a learning rate of its own. Takes about ten seconds on a CPU.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional

import graphsplit as gs


def network() -> nn.Module:
    """Images ``[N, 1, 8, 8]`` to scores of ten digits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> list[float]:
    """Train all, and show the test error of each; returns the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01, 0.03, 0.1])
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    images, digits = gs.data.digits()
    models = [network() for _ in options.rates]
    fused = gs.fuse(models, images[:2])
    error = fused.verify().max_error
    print(f"{fused.k} networks in one graph of {len(fused.graph.nodes)} nodes, within {error:.0e} of each")
    optimizer = gs.train.PerModelSGD(fused, rate=options.rates, momentum=0.9)
    for epoch in range(options.epochs):
        for batch in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            scores = fused(images[batch])  # [K, N, 10]
            losses = torch.stack([functional.cross_entropy(own, digits[batch]) for own in scores])
            losses.sum().backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: losses " + " ".join(f"{loss:.3f}" for loss in losses.tolist()))
    test, labels = gs.data.digits(train=False)
    with torch.no_grad():
        guesses = fused.eval()(test).argmax(2)
    errors = [float(error) for error in (guesses != labels).float().mean(1)]
    for rate, error in zip(options.rates, errors, strict=True):
        print(f"rate {rate:g}: test error {error:.2%}")
    best = fused.models()[errors.index(min(errors))]  # a module of its own, its weights a view
    assert best(test[:1]).shape == (1, 10)
    return errors


if __name__ == "__main__":
    main()
