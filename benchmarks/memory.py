"""The cost model of `fit` (graphsplit/memory.py) against measured peaks of training.

    python benchmarks/memory.py [--models LSTM ...] [--out benchmarks/results/memory.md]

The largest sub-model of a partition takes two training steps (forward pass, cross-entropy, backward pass,
optimizer step) in a fresh process. On a GPU the measured peak is `torch.cuda.max_memory_allocated`. On a CPU
torch's profiler records what torch's allocator gives and takes back, temporaries of oneDNN included; the peak
is their running sum at its highest, with the weights. The peak of the resident set is not used: code that the
kernel loads and takes back, and heaps of free blocks, change it by tens of MB from run to run, and pages that
were never written to are not in it.

Optimizers run with foreach=True, as torch chooses by itself on an accelerator. On a CPU it loops over
parameters by default, which takes less. SGD has a weight decay.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import graphsplit as gs
from graphsplit.memory import Optimizer, training_memory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import paper_cifar10
import paper_mnist
from models import Logits, densenet

KS = (1, 2, 4)
STEPS = 2
OPTIMIZERS: dict[Optimizer, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "momentum": lambda model: torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, foreach=True
    ),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-4, foreach=True),
}


class CharacterLSTM(nn.Module):
    """Two layers of 256 units on embedded characters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 256)
        self.lstm = nn.LSTM(256, 256, 2, batch_first=True)
        self.head = nn.Linear(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[N, T, 128]`` of the next characters."""
        y, _ = self.lstm(self.embedding(x))
        scores: Tensor = self.head(y)
        return scores


def resnet() -> nn.Module:
    """ResNet-50 of transformers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return Logits(ResNetForImageClassification(ResNetConfig(num_labels=1000)))


def vit() -> nn.Module:
    """Four layers of ViT-B/16, on images of 96 × 96."""
    from transformers import ViTConfig, ViTForImageClassification

    return Logits(ViTForImageClassification(ViTConfig(num_hidden_layers=4, image_size=96, num_labels=1000)))


def gpt2() -> nn.Module:
    """Four layers of GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return Logits(GPT2LMHeadModel(GPT2Config(n_layer=4, use_cache=False)))


def bert() -> nn.Module:
    """Four layers of BERT-base."""
    from transformers import BertConfig, BertForSequenceClassification

    return Logits(BertForSequenceClassification(BertConfig(num_hidden_layers=4)))


def images(batch: int, channels: int, size: int) -> Callable[[], Tensor]:
    """Noise ``[N, C, H, W]``."""
    return lambda: torch.randn(batch, channels, size, size)


def tokens(batch: int, length: int, vocabulary: int) -> Callable[[], Tensor]:
    """Random tokens ``[N, T]``."""
    return lambda: torch.randint(vocabulary, (batch, length))


@dataclass(frozen=True)
class Case:
    """A model and the batch that it is trained on."""

    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]


CASES = {
    "LeNet": Case(paper_mnist.lenet, images(256, 1, 28)),
    "CIFAR-10 network": Case(paper_cifar10.network, images(64, 3, 24)),
    "ResNet-50": Case(resnet, images(8, 3, 64)),
    "DenseNet (6, 12, 8)": Case(lambda: densenet((6, 12, 8)), images(8, 3, 64)),
    "ViT-B/16, 4 layers": Case(vit, images(4, 3, 96)),
    "GPT-2, 4 layers": Case(gpt2, tokens(2, 32, 50257)),
    "BERT, 4 layers": Case(bert, tokens(4, 64, 30522)),
    "LSTM, 2 layers": Case(CharacterLSTM, tokens(16, 64, 128)),
}


# -- one measurement, in a process of its own ----------------------------------------------------------------


def measure(name: str, k: int) -> list[dict[str, Any]]:
    """Prediction and peaks in bytes, with each optimizer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = CASES[name].batch()
    program = gs.partition(CASES[name].build(), batch, k=k).programs[0]
    predicted = {optimizer: training_memory(program, optimizer) for optimizer in OPTIMIZERS}
    model = gs.emit(program)
    del program
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    measured = peak_on_cuda if torch.cuda.is_available() else peak_on_cpu
    return [
        {
            "name": optimizer,
            **dataclasses.asdict(memory),
            "predicted": memory.total,
            "measured": weights + measured(model, batch, optimizer),
        }
        for optimizer, memory in predicted.items()
    ]


def train(model: nn.Module, batch: Tensor, optimizer: Optimizer) -> None:
    """Some steps of the usual loop; nothing is left of them."""
    learner = OPTIMIZERS[optimizer](model)
    x = batch.clone()
    for _ in range(STEPS):
        learner.zero_grad()
        scores = model(x).flatten(0, -2)
        targets = torch.zeros(len(scores), dtype=torch.long, device=x.device)
        functional.cross_entropy(scores, targets).backward()
        learner.step()
    learner.zero_grad()


def peak_on_cuda(model: nn.Module, batch: Tensor, optimizer: Optimizer) -> int:
    """Bytes that CUDA's allocator held at most, beyond the model."""
    model, batch = model.cuda(), batch.cuda()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train(model, batch, optimizer)
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(model: nn.Module, batch: Tensor, optimizer: Optimizer) -> int:
    """Bytes that torch's CPU allocator held at most, beyond the model."""
    return peak_bytes(partial(train, model, batch, optimizer))


def peak_bytes(function: Callable[[], None]) -> int:
    """Bytes that torch's CPU allocator held at most while a function ran, beyond what it held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = sorted((each["ts"], each["args"]["Bytes"]) for each in events if each["name"] == "[memory]")
    return max(accumulate(size for _, size in memory))


# -- the report ----------------------------------------------------------------------------------------------


def in_a_process(name: str, k: int) -> list[dict[str, Any]]:
    """`measure`, in a fresh process."""
    call = [sys.executable, __file__, "--measure", name, str(k)]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def megabytes(count: int) -> str:
    """In units of 10⁶ bytes."""
    return f"{count / 1e6:.1f}"


def report(names: Sequence[str]) -> list[str]:
    """A row for each model, K and optimizer."""
    lines = [
        "| model | batch | K | optimizer | state | optimizer's | both passes | update | predicted "
        "| measured peak | predicted / measured |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ratios = []
    for name in names:
        shape = " × ".join(map(str, CASES[name].batch().shape))
        for k in KS:
            for found in in_a_process(name, k):
                ratios.append(found["predicted"] / found["measured"])
                parts = ("state", "optimizer", "passes", "update", "predicted", "measured")
                row = f"| {name} | {shape} | {k} | {found['name']} | "
                row += " | ".join(megabytes(found[part]) for part in parts) + f" | {ratios[-1]:.2f} |"
                lines.append(row)
                print(row, flush=True)
    below = sum(ratio < 1 for ratio in ratios)
    return [
        f"Sizes in MB (10⁶ bytes). Predicted by measured lies between {min(ratios):.2f} and "
        f"{max(ratios):.2f}; the prediction is the lower one in {below} of {len(ratios)} rows.",
        "",
        *lines,
    ]


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory.md"))
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "K"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, k = options.measure
        print(json.dumps(measure(name, int(k))))
        return
    table = report(options.models)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, 1 thread"
    lines = [
        "# Memory of training: predicted and measured",
        "",
        f"`python benchmarks/memory.py`, {datetime.date.today()}, {platform.machine()} ({device}), Python "
        f"{platform.python_version()}, torch {torch.__version__}.",
        "",
        "The largest sub-model of each partition takes two training steps in a fresh process. The measured "
        "peak is that of torch's allocator. The prediction is state, optimizer's states, and the larger one "
        "of what both passes hold and what is held during the update.",
        "",
        *table,
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
