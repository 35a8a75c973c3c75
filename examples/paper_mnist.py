"""The MNIST experiment of the partition paper (Miranda & Von Zuben, arXiv 1511.02954, section 3.1).

    python examples/paper_mnist.py                          # scikit-learn's digits, scaled to 28 × 28
    python examples/paper_mnist.py --data FOLDER --epochs 50 --merge-at 25
    torchrun --nproc-per-node=2 examples/paper_mnist.py --parallel

Caffe's LeNet with its solver: SGD with momentum 0.9, weight decay 0.0005, a learning rate of
0.01 · (1 + 0.0001 · t)^-0.75 at step t. FOLDER holds MNIST's four files, gzip or not. Nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs

Loader = DataLoader[tuple[Tensor, ...]]


def lenet() -> nn.Sequential:
    """Caffe's LeNet: 431,080 parameters; there is no ReLU behind its convolutions."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


example_inputs = (torch.zeros(2, 1, 28, 28),)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of Caffe's solver."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.0005)


def inverse_decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Caffe's policy "inv", stepped after every batch."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + 0.0001 * step) ** -0.75)


def loaders(folder: str | None, batch: int) -> tuple[Loader, Loader]:
    """Training and test data."""

    def load(train: bool) -> Loader:
        if folder is None:
            images, labels = gs.data.digits(train=train, size=28)
        else:
            images, labels = gs.data.mnist(folder, train=train)
        return DataLoader(TensorDataset(images, labels), batch if train else 500, shuffle=train)

    return load(True), load(False)


def main(arguments: list[str] | None = None) -> gs.train.History:
    """Train sub-models, merge them, train on; returns what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", help="folder of MNIST's files")
    parser.add_argument("-k", type=int, default=2, help="number of sub-models")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--merge-at", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parallel", action="store_true", help="in the processes of torchrun")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    train, test = loaders(options.data, options.batch)
    part = gs.partition(lenet(), example_inputs, k=options.k, init="fresh", seed=options.seed)
    schedule = gs.train.PartitionSchedule(
        part,
        sgd,
        functional.cross_entropy,
        merge_at=options.merge_at,
        epochs=options.epochs,
        mode="parallel" if options.parallel else "in_turn",
        scheduler=inverse_decay,
        step_every_batch=True,
        error=gs.train.misclassified,
        device=options.device,
        seed=options.seed,
        on_epoch=print,
    )
    return schedule.fit(train, test).history


if __name__ == "__main__":
    main()
