"""Two halves of a GPT-2, trained apart by the Trainer of transformers, merged, and trained on by it.

    python examples/trainer_partition.py
    python examples/trainer_partition.py -k 4 --steps 200 --more 100

Random weights, and the characters of Python's own modules: nothing is downloaded. Sub-models are of the
class that they come from, GPT2LMHeadModel, with narrower layers. The merged model gives exactly the mean of
what they give, and goes on with their Adam moments. Needs transformers and accelerate; takes a few seconds
on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import graphsplit as gs

LENGTH = 32


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of a text. Labels are the inputs, which the loss moves on by one; the first is no target."""

    def __init__(self, numbers: Tensor) -> None:
        self.windows = numbers[: len(numbers) // LENGTH * LENGTH].view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        labels = self.windows[number].clone()
        labels[0] = -100  # the Trainer divides by the number of the others
        return {"input_ids": self.windows[number], "labels": labels}


class WithLoss(nn.Module):
    """A merged model runs its graph, which has no loss; with one it is what the Trainer expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss of GPT2LMHeadModel, and scores ``[N, L, symbols]``."""
        logits = self.model(input_ids=input_ids)["logits"]
        return {"loss": functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:]), "logits": logits}


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The same optimizer for all."""
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def trainer(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int, text: gs.data.Text, folder: str
) -> Trainer:
    """A Trainer as anyone has it."""
    settings = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=16, per_device_eval_batch_size=64, seed=seed,
        lr_scheduler_type="constant", use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True,
        logging_strategy="no", prediction_loss_only=True,
    )  # fmt: skip
    return Trainer(
        model, settings, train_dataset=Windows(text.train), eval_dataset=Windows(text.valid),
        optimizers=(optimizer, None),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train apart, merge, train on; returns losses on held-out text, and how far the merge is from a mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-k", type=int, default=2, help="number of sub-models")
    parser.add_argument("--steps", type=int, default=60, help="of each sub-model")
    parser.add_argument("--more", type=int, default=30, help="of the merged model")
    options = parser.parse_args(arguments)
    set_seed(0)
    text = gs.data.standard_library(60_000)
    config = GPT2Config(
        vocab_size=len(text.symbols), n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    example = {"input_ids": torch.zeros(2, LENGTH, dtype=torch.long)}
    part = gs.partition(GPT2LMHeadModel(config), kwargs=example, k=options.k, init="fresh", emit="module")
    optimizers = [adamw(submodel) for submodel in part.submodels]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (submodel, optimizer) in enumerate(zip(part.submodels, optimizers, strict=True)):
            own = trainer(submodel, optimizer, options.steps, number, text, folder)
            own.train()
            found[f"sub-model {number}"] = own.evaluate()["eval_loss"]

        merged = part.merge()
        optimizer = adamw(merged)
        part.plan.merge_optimizer_states(optimizers, part.submodels, merged, optimizer)
        found["from the mean"] = difference(merged, part.submodels, Windows(text.valid).windows[:8])
        whole = trainer(WithLoss(merged), optimizer, options.more, options.k, text, folder)
        found["merged, as it is"] = whole.evaluate()["eval_loss"]
        whole.train()
        found["merged, trained on"] = whole.evaluate()["eval_loss"]
    found["steps of Adam"] = float(optimizer.state[next(merged.parameters())]["step"])
    return found


def difference(merged: nn.Module, submodels: list[nn.Module], characters: Tensor) -> float:
    """Largest one between logits of the merged model and the mean of its sub-models'."""
    merged, *models = (copy.deepcopy(model).eval() for model in (merged, *submodels))
    with torch.no_grad():
        logits = [model(input_ids=characters)["logits"] for model in models]
        return float((merged(input_ids=characters)["logits"] - torch.stack(logits).mean(0)).abs().max())


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:<20}{value:.3g}")
