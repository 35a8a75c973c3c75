"""Two layer groups on two processes of one core each: time, bytes and memory, against backpropagation.

    python benchmarks/local_critics_time.py [--rounds 5] [--only resnet lstm]

Every round runs an epoch of each method in processes of their own, one thread each, pinned to a core each;
the epoch before it warms up. Backpropagation runs in one process. Local critics run with a queue of two
batches, pipelined backpropagation is torch.distributed.pipelining's 1F1B schedule on the same two groups.
Bytes are those of one epoch. Peak memory is what torch's allocator held at most in a step, with weights.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import graphsplit as gs
from graphsplit.train.losses import cross_entropy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from memory import peak_bytes  # noqa: E402

METHODS = ("backpropagation", "local critics", "pipelined backpropagation")
MICROBATCHES = 4
TEXT = """# Local critics on two processes

Written by `python benchmarks/local_critics_time.py {arguments}`, {date}: torch {torch}, Python {python},
{cpu}. One thread a process, a core for each process; medians of {rounds} rounds, in which the methods take
turns. {cores} cores in all.

| model | method | epoch | against backpropagation | by rounds | bytes down | bytes up |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

Bytes of pipelined backpropagation are those of the tensors of its cut, and of their gradients. The paper's
smallest case is 27.8 % less than backpropagation.

Peak memory of a step (SGD with momentum), weights, gradients and optimizer included:

| model | whole model | process 0, with the critic | process 1 |
| --- | --- | --- | --- |
{memory}
"""


class Block(nn.Module):
    """Two convolutions and a skip, which takes every second pixel and pads channels where the width grows."""

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.stride, self.more = (2, width - given) if width != given else (1, 0)
        self.first = nn.Conv2d(given, width, 3, self.stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, given, H, W]``."""
        y = self.norm2(self.second(torch.relu(self.norm1(self.first(x)))))
        skip = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return torch.relu(y + skip)


def resnet() -> nn.Module:
    """ResNet-56 for images of 32 x 32 (He et al., arXiv 1512.03385)."""
    widths = [16] * 9 + [32] * 9 + [64] * 9
    blocks = [Block(given, width) for given, width in zip([16, *widths], widths, strict=False)]
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class CharLSTM(nn.Module):
    """Characters to scores of the next."""

    def __init__(self, symbols: int = 50, width: int = 300, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, 128)
        self.lstm = nn.LSTM(128, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def forward(self, characters: Tensor) -> Tensor:
        """``[N, L]`` to ``[N, L, symbols]``."""
        scores: Tensor = self.head(self.lstm(self.embed(characters))[0])
        return scores


@dataclass(frozen=True)
class Case:
    """A model with its data, and the module at which the second group starts; None balances FLOPs."""

    build: Callable[[], nn.Module]
    data: Callable[[], list[tuple[Tensor, Tensor]]]
    at: str | None = None


def images() -> list[tuple[Tensor, Tensor]]:
    """Random images and classes: only the time matters."""
    return [(torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))) for _ in range(8)]


def text() -> list[tuple[Tensor, Tensor]]:
    """Random characters."""
    batches = [torch.randint(0, 50, (32, 65)) for _ in range(12)]
    return [(batch[:, :-1], batch[:, 1:]) for batch in batches]


CASES = {"resnet": Case(resnet, images, "12"), "lstm": Case(CharLSTM, text)}


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    """The same for all."""
    return torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)


def mean_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of a batch."""
    return cross_entropy(scores, targets).mean()


def critics(case: Case) -> gs.LocalCritics:
    """Two groups."""
    torch.manual_seed(0)
    local = gs.local_critics(case.build(), case.data()[0][0], at=[case.at] if case.at else None)
    local.configure(gs.train.Recipe(sgd))
    return local


# -- one measurement, in processes of its own ----------------------------------------------------------------


def work(name: str, method: str) -> dict[str, Any]:
    """Seconds of the second epoch, and bytes."""
    case = CASES[name]
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {int(os.environ.get("RANK", "0")) % (os.cpu_count() or 1)})
    data = case.data()
    if method == "backpropagation":
        torch.manual_seed(0)
        model = case.build()
        seconds = gs.train.fit(model, sgd(model), mean_loss, data, 2)[-1].seconds
        return {"seconds": seconds, "down": 0, "up": 0}
    if method == "local critics":
        record = critics(case).fit(data, 2, parallel=True, queue=2)[-1]
        return {"seconds": record.seconds, "down": record.bytes_down, "up": record.bytes_up}
    return pipelined(case, data)


def pipelined(case: Case, data: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Two epochs of the 1F1B schedule."""
    from torch.distributed.pipelining import Schedule1F1B

    dist.init_process_group("gloo")
    groups = critics(case).groups
    stage = groups.pipeline_stage()
    optimizer = sgd(stage.submod)
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn=mean_loss)
    seconds = 0.0
    for _ in range(2):
        dist.barrier()
        start = time.perf_counter()
        for inputs, targets in data:
            if dist.get_rank() == 0:
                schedule.step(inputs)
            else:
                schedule.step(target=targets, losses=[])
            optimizer.step()
            optimizer.zero_grad()
        dist.barrier()
        seconds = time.perf_counter() - start
    crossing = sum(meta.zeros().nbytes for meta in groups.frontiers[0]) // len(data[0][0])
    examples = sum(len(inputs) for inputs, _ in data)
    dist.destroy_process_group()
    return {"seconds": seconds, "down": crossing * examples, "up": crossing * examples}


def memory(name: str) -> list[int]:
    """Peaks of a step of the whole model and of each process."""
    case = CASES[name]
    torch.set_num_threads(1)
    inputs, targets = case.data()[0]
    torch.manual_seed(0)
    model = case.build()
    optimizer = sgd(model)

    def whole() -> None:
        for _ in range(2):
            optimizer.zero_grad()
            mean_loss(model(inputs), targets).backward()
            optimizer.step()

    local = critics(case)
    first, second = local.stages
    with torch.no_grad():
        given = first.run([inputs], 0)

    def front() -> None:
        for step in range(2):
            passed = first.forward([inputs], targets, step)
            first.learn(passed.losses)
            for learner in first.learners:
                learner.update()

    def back() -> None:
        for step in range(2):
            second.forward(given, targets, step)
            second.learners[0].update()

    found = []
    for function, modules in ((whole, [model]), (front, first.modules), (back, second.modules)):
        weights = sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))
        found.append(weights + peak_bytes(function))
    return found


# -- the report ----------------------------------------------------------------------------------------------


def run(name: str, method: str) -> dict[str, Any]:
    """`work` in one or two fresh processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    count = 1 if method == "backpropagation" else 2
    call = [sys.executable, __file__, "--work", name, method]
    processes = []
    for rank in range(count):
        place = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | place
        processes.append(subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env=environment))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{name} by {method} failed")
    found: dict[str, Any] = json.loads(outputs[-1].splitlines()[-1])
    return found


def processor() -> str:
    """Its name, where Linux says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "local_critics_time.md")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(*options.work)))
        return
    if options.memory:
        print(json.dumps(memory(options.memory)))
        return
    rows, peaks = [], []
    for name in options.only:
        rounds = [{method: run(name, method) for method in METHODS} for _ in range(options.rounds)]
        for method in METHODS:
            seconds = statistics.median(found[method]["seconds"] for found in rounds)
            changes = [found[method]["seconds"] / found[METHODS[0]]["seconds"] - 1 for found in rounds]
            spread = f"{min(changes):+.1%} to {max(changes):+.1%}"
            last = rounds[-1][method]
            rows.append(
                f"| {name} | {method} | {seconds:.2f} s | {statistics.median(changes):+.1%} | {spread} | "
                f"{last['down']:,} | {last['up']:,} |"
            )
            print(rows[-1], flush=True)
        call = [sys.executable, __file__, "--memory", name]
        done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
        sizes = [f"{count / 1e6:.1f} MB" for count in json.loads(done.stdout.splitlines()[-1])]
        peaks.append(f"| {name} | {' | '.join(sizes)} |")
        print(peaks[-1], flush=True)
    options.out.write_text(
        TEXT.format(
            arguments=" ".join(sys.argv[1:]), date=datetime.date.today(), torch=torch.__version__,
            python=platform.python_version(), cpu=processor(), cores=os.cpu_count(),
            rounds=options.rounds, rows="\n".join(rows), memory="\n".join(peaks),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
