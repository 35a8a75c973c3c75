"""The record that describes one model of the zoo, and makers of its inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[], "tuple[Any, ...] | dict[str, Any]"]
VOCAB = 100


@dataclass(frozen=True)
class Entry:
    """A model of the zoo: how to build it, how to feed it, and the numbers of parts its sizes allow."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    family: str
    k: tuple[int, ...]


def entry(
    name: str, make: Callable[[], nn.Module], inputs: Inputs, family: str, k: tuple[int, ...] = (2, 4)
) -> Entry:
    """Return the entry of a model whose weights are seeded, and of which every weight matters."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = make()
        roughen(model)
        calibrate(model, inputs())
        return model

    return Entry(name, build, inputs, family, k)


@torch.no_grad()
def roughen(model: nn.Module) -> None:
    """Add noise to constant parameters (norm scales, zero biases), so that their slices differ."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


@torch.no_grad()
def calibrate(model: nn.Module, inputs: tuple[Any, ...] | dict[str, Any]) -> None:
    """Give the batch norms statistics of the inputs: with fresh ones, signals vanish in evaluation."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.9
    model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Return a seeded tensor of normal values."""
    return torch.randn(shape, generator=_generator(seed))


def integers(*shape: int, high: int = VOCAB, low: int = 5, seed: int = 1) -> Tensor:
    """Return a seeded tensor of integers from low (above the special tokens) to high - 1."""
    return torch.randint(low, high, shape, generator=_generator(seed))


def dense(*shape: int) -> Inputs:
    """Return the inputs of a model that takes one float tensor of this shape."""
    return lambda: (normal(*shape),)


def images(size: int = 32, channels: int = 3, batch: int = 2) -> Inputs:
    """Return the inputs of a model that takes a batch of square images."""
    return dense(batch, channels, size, size)


def tokens(length: int = 10, batch: int = 2) -> Inputs:
    """Return the inputs of a model that takes a batch of token ids."""
    return lambda: (integers(batch, length),)
