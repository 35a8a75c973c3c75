"""Replicas that train apart; their ensemble is the global model, and compression makes it one model again.

    python examples/ec_dnn.py
    python examples/ec_dnn.py --method ma --checkpoint run/
    torchrun --standalone --nproc-per-node=4 examples/ec_dnn.py --parallel --exchange predictions

A small network on scikit-learn's digits, dealt to K workers. With --parallel each process is one worker, and
the numbers are the same. Takes a few seconds on a CPU.
"""

from __future__ import annotations

import argparse
import os

import torch
from torch import nn
from torch.nn import functional

import graphsplit as gs


def perceptron() -> nn.Module:
    """Images ``[N, 1, 8, 8]`` to scores of ten digits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def main(arguments: list[str] | None = None) -> gs.train.EnsembleTrained:
    """Train, and make one module of the replicas; returns what training left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-k", type=int, default=4, help="number of workers")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tau", type=int, default=30, help="steps of a worker in a round")
    parser.add_argument("--method", choices=("ec", "ma", "e", "s"), default="ec")
    parser.add_argument("--weights", choices=("simple", "regression", "margin"), default="simple")
    parser.add_argument("--exchange", choices=("replicas", "predictions"), default="replicas")
    parser.add_argument("--checkpoint", help="a folder to go on from")
    parser.add_argument("--parallel", action="store_true", help="one worker in each process of torchrun")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    images, labels = gs.data.digits()
    training = gs.train.EnsembleCompression(
        k=options.k, rounds=options.rounds, tau=options.tau, method=options.method, weights=options.weights,
        exchange=options.exchange,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    )  # fmt: skip
    found = training.run(
        perceptron,
        (images, labels),
        functional.cross_entropy,
        test=[gs.data.digits(train=False)],
        error=gs.train.misclassified,
        parallel=options.parallel,
        checkpoint=options.checkpoint,
        on_round=print,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        last = found.rounds[-1]
        print(f"{last.bytes:,} bytes in a round between {training.workers} workers")
        if isinstance(found.global_model, gs.Ensemble):
            team = gs.ensemble(found.members, found.global_model.weights, images[:4]).eval()
            how = "fused to one module" if team.fused else "one after the other"
            print(f"the ensemble's {team.k} members are {how}, largest error {team.verify().max_error:.1e}")
    return found


if __name__ == "__main__":
    main()
