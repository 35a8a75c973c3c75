"""EC-DNN inside Lightning: replicas train apart on shards, and follow their ensemble, each in a Trainer.

    python examples/lightning_ec_dnn.py
    python examples/lightning_ec_dnn.py -k 6 --rounds 5

A LightningModule as anyone has it, on scikit-learn's digits. In a round every replica takes steps on its
shard; then their ensemble, fused to one module, answers a share of each shard, and every replica takes steps
towards true targets and these answers (eq. 10 in docs/ensemble.md). Needs pytorch-lightning; takes a few
seconds on a CPU.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import graphsplit as gs

BATCH, SHARE, BETA = 32, 0.7, 0.5


class Classifier(pl.LightningModule):
    """A network and how it learns. The optimizer lives as long as the module, through all calls of fit."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The one that there is."""
        return self.optimizer

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Cross-entropy; where the batch holds answers of the ensemble, these are targets, too."""
        images, digits, *answers = batch
        scores = self.model(images)
        loss = functional.cross_entropy(scores, digits)
        for answer in answers:
            loss = (1 - BETA) * loss + BETA * functional.cross_entropy(scores, answer)
        return loss

    def test_step(self, batch: list[Tensor], _: int) -> None:
        """Loss and error."""
        images, digits = batch
        scores = self.model(images)
        self.log("loss", functional.cross_entropy(scores, digits))
        self.log("error", gs.train.misclassified(scores, digits))


def trainer() -> pl.Trainer:
    """One that goes through its data once."""
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def fit(module: Classifier, data: TensorDataset, rows: list[int], seed: int, first: int, steps: int) -> None:
    """Some steps on some rows of the data; the sampler knows where the steps before have stopped."""
    batches = gs.train.ShardSampler(rows, BATCH, seed, first, steps)
    trainer().fit(module, DataLoader(data, batch_sampler=batches))


def tested(model: nn.Module, data: TensorDataset) -> dict[str, Any]:
    """Loss and error of a model."""
    (found,) = trainer().test(Classifier(model), DataLoader(data, len(data)), verbose=False)
    return dict(found)


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Train; returns losses and errors of replicas, their ensemble, and the compressed ones, at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-k", type=int, default=3, help="number of replicas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="of a replica on its shard in a round")
    parser.add_argument("--compress", type=int, default=15, help="steps towards the ensemble in a round")
    options = parser.parse_args(arguments)
    pl.seed_everything(0, verbose=False)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # or every Trainer introduces itself
    images, digits = gs.data.digits()
    test = TensorDataset(*gs.data.digits(train=False))
    shards = [shard.tolist() for shard in torch.randperm(len(images)).chunk(options.k)]
    replicas = [
        Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
        for _ in shards
    ]
    found: dict[str, list[float]] = {}

    def record(name: str, *models: nn.Module) -> None:
        results = [tested(model, test) for model in models]
        for number in ("loss", "error"):
            found[f"{number} of {name}"] = [result[number] for result in results]

    for moment in range(options.rounds):
        for worker, (replica, shard) in enumerate(zip(replicas, shards, strict=True)):
            fit(replica, TensorDataset(images, digits), shard, worker, moment * options.steps, options.steps)
        team = gs.ensemble([replica.model for replica in replicas], args=images[:2]).eval()
        record("replicas", *team.members)
        record("the ensemble", team)
        with torch.no_grad():
            answers = team(images).softmax(1)
        for replica, shard in zip(replicas, shards, strict=True):
            chosen = torch.randperm(len(shard))[: round(SHARE * len(shard))].tolist()
            rows = [shard[number] for number in chosen]
            fit(replica, TensorDataset(images, digits, answers), rows, moment, 0, options.compress)
    record("compressed replicas", *(replica.model for replica in replicas))
    return found


if __name__ == "__main__":
    for name, values in main().items():
        print(f"{name:<32}" + " ".join(f"{value:.3f}" for value in values))
