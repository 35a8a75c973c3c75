"""A training step of K models: fused, by vmap, and one after the other.

    python benchmarks/fuse.py [--only LeNet ...] [-k 2 4 8] [--rounds 7] [--device cuda] [--compile]

Forward and backward pass and a step of SGD with momentum. Three ways to train K models of one architecture
on one batch: in turn, as one module by ``gs.fuse``, and by ``torch.func.stack_module_state`` with ``vmap``.
The ways take turns in every round, so that what else the machine does meets all of them; times are medians,
ratios are medians of the ratios of the rounds. On a CPU one thread is used.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import graphsplit as gs

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import paper_cifar10  # noqa: E402
import paper_mnist  # noqa: E402
import small_gpt  # noqa: E402

TEXT = """# Fused models

Written by `python benchmarks/fuse.py {arguments}`, {date}: torch {torch}, Python {python}, {place}.

A training step of K models on one batch, medians of {rounds} rounds in which the three ways take turns.
Ratios above 1 say that the fused module is faster. "looped": ops that run once for each model, as there is no
rule.

| model | batch | K | in turn | fused | vmap | in turn / fused | vmap / fused | looped |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""
Step = Callable[[], None]


class Block(nn.Module):
    """Two convolutions and a skip."""

    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(given, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        same = stride == 1 and given == width
        self.skip = nn.Identity() if same else nn.Conv2d(given, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, given, H, W]``."""
        y = torch.relu(self.norm1(self.first(x)))
        return torch.relu(self.norm2(self.second(y)) + self.skip(x))


def resnet18() -> nn.Module:
    """ResNet-18 at a quarter of its width, for images of 32 x 32."""
    widths = [16, 16, 32, 32, 64, 64, 128, 128]
    blocks = [
        Block(given, width, 1 + (given < width)) for given, width in zip([16, *widths], widths, strict=False)
    ]
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


@dataclass(frozen=True)
class Case:
    """A model with a batch."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]


def _images(batch: int, channels: int, size: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(batch, channels, size, size), torch.randint(0, 10, (batch,)))


def _text() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 64, (16, 64)), torch.randint(0, 64, (16, 64))


CASES = (
    Case("LeNet", paper_mnist.lenet, _images(32, 1, 28)),
    Case("CIFAR-10 network of the paper", paper_cifar10.network, _images(16, 3, 24)),
    Case("ResNet-18, a quarter of its width", resnet18, _images(16, 3, 32)),
    Case("GPT of two layers", lambda: small_gpt.GPT(64, 64), _text),
)


def loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of classes or characters."""
    return functional.cross_entropy(scores.flatten(0, -2), targets.flatten())


def sgd(parameters: object) -> torch.optim.Optimizer:
    """The same for all ways."""
    return torch.optim.SGD(parameters, 0.01, momentum=0.9)  # type: ignore[arg-type]


def in_turn(models: list[nn.Module], x: Tensor, y: Tensor) -> Step:
    """One model after the other."""
    optimizers = [sgd(model.parameters()) for model in models]

    def step() -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()

    return step


def fused(module: nn.Module, parameters: list[nn.Parameter], x: Tensor, y: Tensor) -> Step:
    """One module."""
    optimizer = sgd(parameters)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack([loss(scores, y) for scores in module(x)]).sum().backward()
        optimizer.step()

    return step


def by_vmap(models: list[nn.Module], x: Tensor, y: Tensor) -> Step:
    """torch.func over stacked state."""
    parameters, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0]).to("meta")
    optimizer = sgd(list(parameters.values()))

    def one(own: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(base, (own, state), (x,))
        return found

    def step() -> None:
        optimizer.zero_grad()
        scores = torch.vmap(one, randomness="different")(parameters, buffers)
        torch.stack([loss(own, y) for own in scores]).sum().backward()
        optimizer.step()

    return step


def seconds(step: Step, device: str) -> float:
    """Of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case: Case, k: int, rounds: int, device: str, *, compiled: bool) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    models = [case.build().to(device) for _ in range(k)]
    x, y = (tensor.to(device) for tensor in case.batch())
    module = gs.fuse(models, x)
    run = torch.compile(module) if compiled else module
    steps: dict[str, Step] = {
        "in turn": in_turn(models, x, y),
        "fused": fused(run, list(module.parameters()), x, y),
    }
    try:
        vmapped = by_vmap(copy.deepcopy(models), x, y)
        vmapped()
        steps["vmap"] = vmapped
    except RuntimeError as error:
        print(f"{case.name}: vmap fails: {str(error).splitlines()[0]}", flush=True)
    for step in steps.values():
        for _ in range(2):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    cells = [f"{1e3 * statistics.median(times[name]):.1f} ms" if name in times else "fails" for name in
             ("in turn", "fused", "vmap")]  # fmt: skip
    ratios = [
        f"{statistics.median(a / b for a, b in zip(times[name], times['fused'], strict=True)):.2f}"
        if name in times
        else "-"
        for name in ("in turn", "vmap")
    ]
    looped = ", ".join(module.looped) or "none"
    return f"| {case.name} | {len(x)} | {k} | {' | '.join(cells)} | {' | '.join(ratios)} | {looped} |"


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="beginnings of the models' names")
    parser.add_argument("-k", nargs="*", type=int, default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="also compile the fused module")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fuse.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        if options.only and not case.name.startswith(tuple(options.only)):
            continue
        for k in options.k:
            rows.append(measure(case, k, options.rounds, options.device, compiled=options.compile))
            print(rows[-1], flush=True)
    place = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU with one thread"
    options.out.write_text(
        TEXT.format(
            arguments=" ".join(sys.argv[1:]), date=datetime.date.today(), torch=torch.__version__,
            python=platform.python_version(), place=place, rounds=options.rounds, rows="\n".join(rows),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
