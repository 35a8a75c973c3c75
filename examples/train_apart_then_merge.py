"""Train two sub-models apart, merge them with their momenta, and train the whole.

    python examples/train_apart_then_merge.py

A small network learns what a random network computes. Its two halves see the same data and never each other:
no gradient passes between them. The merged model starts as their mean; the weights between the halves, zero
at first, are trained from then on. Takes some seconds on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import graphsplit as gs

FEATURES, HIDDEN, CLASSES = 16, 64, 4


def task(examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Normal inputs, and the class that a fixed random network gives them."""
    inputs = torch.randn(examples, FEATURES, generator=torch.Generator().manual_seed(seed))
    teacher = torch.Generator().manual_seed(0)
    first = torch.randn(FEATURES, FEATURES, generator=teacher)
    second = torch.randn(FEATURES, CLASSES, generator=teacher)
    return inputs, (torch.tanh(inputs @ first) @ second).argmax(1)


def build() -> nn.Module:
    """A perceptron with two hidden layers."""
    return nn.Sequential(
        nn.Linear(FEATURES, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, CLASSES),
    )


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The same optimizer for all."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], epochs: int
) -> None:
    """Ordinary training; nothing of it knows of graphsplit."""
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(128):
            optimizer.zero_grad()
            functional.cross_entropy(model(data[0][batch]), data[1][batch]).backward()
            optimizer.step()


def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of right answers."""
    model.eval()
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


def main() -> dict[str, float]:
    """Run the whole of it; returns the accuracies."""
    torch.manual_seed(0)
    data, test = task(8192, seed=1), task(4096, seed=2)

    divided = gs.partition(build(), data[0][:2], k=2, init="fresh")
    optimizers = [sgd(submodel) for submodel in divided.submodels]
    for submodel, optimizer in zip(divided.submodels, optimizers, strict=True):
        train(submodel, optimizer, data, epochs=5)

    merged = divided.merge()
    optimizer = sgd(merged)
    divided.plan.merge_optimizer_states(optimizers, divided.submodels, merged, optimizer)
    found = {f"sub-model {n}": accuracy(submodel, test) for n, submodel in enumerate(divided.submodels)}
    found["merged, as it is"] = accuracy(merged, test)
    train(merged, optimizer, data, epochs=2)
    found["merged, trained on"] = accuracy(merged, test)
    return found


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:<20}{value:.1%}")
