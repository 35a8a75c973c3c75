"""The CIFAR-10 experiment of the partition paper (Miranda & Von Zuben, arXiv 1511.02954, section 3.2).

    python examples/paper_cifar10.py --data FOLDER --epochs 100 --merge-at 50
    graphsplit partition examples/paper_cifar10.py -k 2 -o out/cifar10

The network of cuda-convnet with two locally connected layers: 2,112,970 parameters on crops of 24 × 24. Its
local response normalisation looks across channels, so that the merged model has it twice, once for each half.
FOLDER holds the binary version of CIFAR-10; without it, noise takes its place, to try the network out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs

CROP = 24


class LocallyConnected(nn.Module):
    """A 3 × 3 convolution, padded by 1, whose filters (and biases) differ from place to place.

    Args:
        channels: Of the input.
        filters: Of the output.
        size: Height and width.
    """

    def __init__(self, channels: int, filters: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(filters, channels, 9, size, size))
        self.bias = nn.Parameter(torch.zeros(filters, size, size))
        nn.init.normal_(self.weight, std=(2 / (9 * channels)) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``y[n, o, h, w] = x[n, c, h + i, w + j] w[o, c, (i j), h, w] + b[o, h, w]``."""
        padded = functional.pad(x, (1, 1, 1, 1))
        shifted = [
            padded[:, :, row : row + self.size, column : column + self.size]
            for row in range(3)
            for column in range(3)
        ]
        return torch.einsum("nckhw,ockhw->nohw", torch.stack(shifted, 2), self.weight) + self.bias


def normalisation() -> nn.Module:
    """Local response normalisation across 9 channels."""
    return nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)


def network() -> nn.Sequential:
    """2,112,970 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        normalisation(),
        nn.Conv2d(64, 64, 5, padding=2),
        nn.ReLU(),
        normalisation(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        LocallyConnected(64, 64, 6),
        nn.ReLU(),
        LocallyConnected(64, 32, 6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 6 * 6, 10),
    )


torch.manual_seed(0)
model = network
example_inputs = (torch.randn(2, 3, CROP, CROP),)


class Crops:
    """Batches of crops: at random places and mirrored by chance in training, from the middle in the test."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int, *, train: bool) -> None:
        self.train = train
        self.loader = DataLoader(TensorDataset(images, labels), batch, shuffle=train)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        margin = 32 - CROP
        for images, labels in self.loader:
            top, left = torch.randint(margin + 1, (2,)).tolist() if self.train else (margin // 2,) * 2
            images = images[:, :, top : top + CROP, left : left + CROP]
            mirrored = self.train and torch.rand(()) < 0.5
            yield images.flip(3) if mirrored else images, labels


def load(folder: str | None, batch: int) -> tuple[Crops, Crops]:
    """Training and test data, with the mean of the training images taken away."""
    if folder is None:
        found = [(torch.rand(256, 3, 32, 32), torch.randint(10, (256,))) for _ in range(2)]
    else:
        found = [gs.data.cifar10(folder, train=train) for train in (True, False)]
    mean = found[0][0].mean(0)
    train, test = ((images - mean, labels) for images, labels in found)
    return Crops(*train, batch, train=True), Crops(*test, batch, train=False)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Momentum and weight decay of cuda-convnet; one learning rate for all layers."""
    return torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=0.004)


def main(arguments: list[str] | None = None) -> gs.train.History:
    """Train sub-models, merge them, train on; returns what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", help="folder of CIFAR-10's binary files")
    parser.add_argument("-k", type=int, default=2, help="number of sub-models")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--merge-at", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parallel", action="store_true", help="in the processes of torchrun")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    part = gs.partition(network(), example_inputs, k=options.k, init="fresh", seed=options.seed)
    schedule = gs.train.PartitionSchedule(
        part,
        sgd,
        functional.cross_entropy,
        merge_at=options.merge_at,
        epochs=options.epochs,
        mode="parallel" if options.parallel else "in_turn",
        error=gs.train.misclassified,
        device=options.device,
        seed=options.seed,
        on_epoch=print,
    )
    return schedule.fit(*load(options.data, options.batch)).history


if __name__ == "__main__":
    main()
