"""Layer groups that train by local critics, without waiting for the backward pass, each prefix a model.

    python examples/local_critics.py
    python examples/local_critics.py --model lstm -n 2
    torchrun --standalone --nproc-per-node=3 examples/local_critics.py -n 2 --parallel

A small ResNet on scikit-learn's digits, or an LSTM or a GPT of characters on the source of Python's modules.
With --parallel each process trains one group; the numbers are the same. Takes about a minute on a CPU.
"""

from __future__ import annotations

import argparse
import os

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs

LENGTH = 32


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
    """Images ``[N, 1, 8, 8]`` to scores of ten digits."""
    stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    blocks = [Block(width) for _ in range(3)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class CharLSTM(nn.Module):
    """Characters ``[N, L]`` to scores ``[N, L, symbols]``."""

    def __init__(self, symbols: int, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.lstm = nn.LSTM(width, width, num_layers=3, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def forward(self, characters: Tensor) -> Tensor:
        """Scores of the next character."""
        scores: Tensor = self.head(self.lstm(self.embed(characters))[0])
        return scores


class CharGPT(nn.Module):
    """Characters ``[N, L]`` to scores ``[N, L, symbols]``."""

    def __init__(self, symbols: int, width: int = 64) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(symbols, width), nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.head = nn.Linear(width, symbols)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, characters: Tensor) -> Tensor:
        """Scores of the next character."""
        x = self.embed(characters) + self.place.weight
        for layer in self.layers:
            x = layer(x, src_mask=self.mask)
        scores: Tensor = self.head(x)
        return scores


def loaders(*pairs: tuple[Tensor, Tensor]) -> list[DataLoader[tuple[Tensor, ...]]]:
    """Training batches in random order, and test batches."""
    train, test = (TensorDataset(*pair) for pair in pairs)
    return [DataLoader(train, 32, shuffle=True, generator=torch.Generator()), DataLoader(test, 256)]


def main(arguments: list[str] | None = None) -> list[gs.train.LocalEpoch]:
    """Cut, train, and show what each prefix has learned; returns what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=("resnet", "lstm", "gpt"), default="resnet")
    parser.add_argument("-n", type=int, default=2, help="number of critics, one less than groups")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--characters", type=int, default=60_000, help="of Python's modules")
    parser.add_argument("--parallel", action="store_true", help="one group in each process of torchrun")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.model == "resnet":
        train, test = loaders(gs.data.digits(), gs.data.digits(train=False))
        model = resnet()
    else:
        text = gs.data.standard_library(options.characters)
        windows = [gs.data.windows(part, LENGTH, batch=len(part))[0] for part in (text.train, text.valid)]
        train, test = loaders(*windows)
        model = (CharLSTM if options.model == "lstm" else CharGPT)(len(text.symbols))
    example = next(iter(test))[0][:2]
    local = gs.local_critics(model, example, n=options.n)
    history = local.fit(
        train, options.epochs, test=test, error=None if options.model != "resnet" else gs.train.misclassified,
        parallel=options.parallel, on_epoch=print,
    )  # fmt: skip
    if int(os.environ.get("RANK", "0")) == 0:
        for number, item in enumerate(local.complexity()):
            print(f"sub-model {number}: {item.parameters:,} parameters, {item.flops:,.0f} FLOPs an example")
        sure = local.anytime().predict(next(iter(test))[0], confidence=0.9)
        print("examples that leave at each exit:", torch.bincount(sure.exits, minlength=local.n + 1).tolist())
    return history


if __name__ == "__main__":
    main()
