"""Pruning at initialisation on the digits: 64-300-100-10, five seeds, test error after training.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/sparsify.py [--epochs 60] [--seeds 5]

Networks that are dense, or pruned by each method at 90, 95 and 98 %, all with the same data order, trained at
once by ``gs.fuse`` and ``PerModelSGD``; the masks are buffers of the fused module. Learning rates are chosen
before, for each method and sparsity and for the dense networks alike, by validation on a part of the training
images with seeds that are not among those of the table.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphsplit as gs
from graphsplit.sparsity import Method

ROOT = Path(__file__).resolve().parents[1]
SPARSITIES = (0.9, 0.95, 0.98)
BATCH = 64

TEXT = """# Pruned at initialisation

Written by `python benchmarks/sparsify.py`, {date}: torch {torch}, Python {python}, one thread,
{seconds:.0f} s.

The digits of scikit-learn (1,437 to train on, 360 to test), 64-300-100-10 with ReLU and Glorot's normal
weights, {seeds} seeds, {epochs} epochs of SGD with momentum 0.9 and weight decay {decay} in batches of
{batch}, the learning rate falling linearly to zero. SNIP sees all training images as a batch, GraSP ten of
each class (`gs.data.balanced`), both in train mode; SynFlow takes 100 rounds; all rank all weights together.

The rate at the start is one of {rates}, for every row and column the one of the smallest
error on {held} of the training images after training on the others, mean of {searched} seeds
that are not those of the table; the test images had no part in it.

Test error in percent, mean and standard deviation over the seeds, the rate, and in brackets the largest
number of layers, in any seed, of which nothing was left.

| | {heads} |
| --- | {lines} |
| dense | {dense} |
{rows}

{verdict}
"""
RATES = (0.03, 0.1, 0.3, 1.0)
DECAY = 5e-4
SEARCHED = (100, 101)
"""Seeds of the networks by which rates are chosen."""
HELD = 5
"""One in so many of the training images validates."""
Key = tuple[str, float]
Pair = tuple[Tensor, Tensor]


def network(seed: int) -> nn.Module:
    """A fresh one, with Glorot's normal weights and biases of zero, as in the paper of SNIP."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def pruned(seeds: Iterable[int], data: Pair) -> dict[Key, list[gs.Masks]]:
    """Masks of every method and sparsity, of each seed; dense ones keep all."""
    found: dict[Key, list[gs.Masks]] = {}
    kinds: list[tuple[Method, float]] = [(m, s) for m in get_args(Method) for s in SPARSITIES]
    few = gs.data.balanced(data, 10)
    for seed in seeds:
        program = gs.trace(network(seed), data[0][:8])
        for method, sparsity in [("random", 0.0), *kinds]:
            seen = few if method == "grasp" else data
            masks = gs.sparsify(
                program, method=method, sparsity=sparsity, data=seen, loss=F.cross_entropy, seed=seed
            )
            found.setdefault((method if sparsity else "dense", sparsity), []).append(masks)
    return found


def trained(masks: list[gs.Masks], rates: list[float], epochs: int, data: Pair, test: Pair) -> list[float]:
    """Test errors after training all of them at once, each with its own rate."""
    fused = gs.fuse([item.module() for item in masks])
    optimizer = gs.train.PerModelSGD(fused, rates, momentum=0.9, weight_decay=DECAY)
    images, labels = data
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for index in order.split(BATCH)[: len(labels) // BATCH]:
            outputs = fused(images[index])
            loss = F.cross_entropy(outputs.flatten(0, 1), labels[index].repeat(len(masks)), reduction="sum")
            optimizer.zero_grad()
            (loss / BATCH).backward()
            optimizer.step()
            schedule.step()
        print(f"{len(masks)} networks, epoch {epoch + 1} of {epochs}", flush=True)
    images, labels = test
    with torch.no_grad():
        wrong = fused.eval()(images).argmax(2) != labels
    return [float(share) for share in wrong.double().mean(1)]


def chosen(epochs: int, data: Pair) -> dict[Key, float]:
    """The rate of the smallest validation error, of every method and sparsity."""
    images, labels = data
    count = len(labels) // HELD
    rest = images[count:], labels[count:]
    found = pruned(SEARCHED, rest)
    tried = [(key, rate, item) for key, group in found.items() for rate in RATES for item in group]
    masks, rates = [item for *_, item in tried], [rate for _, rate, _ in tried]
    errors = trained(masks, rates, epochs, rest, (images[:count], labels[:count]))
    means: dict[Key, dict[float, float]] = {}
    for (key, rate, _), error in zip(tried, errors, strict=True):
        own = means.setdefault(key, {})
        own[rate] = own.get(rate, 0.0) + error / len(SEARCHED)
    print({key: {rate: round(100 * e, 2) for rate, e in own.items()} for key, own in means.items()})
    return {key: min(own, key=lambda rate: own[rate]) for key, own in means.items()}


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sparsify.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "nothing is left")
    torch.set_num_threads(1)
    start = time.perf_counter()
    data = gs.data.digits()
    rates = chosen(options.epochs, data)
    found = pruned(range(options.seeds), data)
    masks = [item for group in found.values() for item in group]
    starts = [rates[key] for key, group in found.items() for _ in group]
    errors = iter(trained(masks, starts, options.epochs, data, gs.data.digits(train=False)))
    errors_of = {key: [next(errors) for _ in group] for key, group in found.items()}
    dense = statistics.mean(errors_of["dense", 0.0])
    rows, verdict = [], []
    for method in get_args(Method):
        cells = []
        for sparsity in SPARSITIES:
            cut = max(len(item.cut) for item in found[method, sparsity])
            cell = f"{shown(errors_of[method, sparsity])}, {rates[method, sparsity]:g}"
            cells.append(cell + (f" ({cut})" if cut else ""))
        rows.append(f"| {method} | {' | '.join(cells)} |")
    for method in ("snip", "grasp"):
        for sparsity in SPARSITIES[:2]:
            gap = statistics.mean(errors_of[method, sparsity]) - dense
            met = "met" if gap <= 0.01 else "missed"
            verdict.append(
                f"- {method} at {sparsity:.0%} within 1 point of dense: {met} ({100 * gap:+.2f} points)"
            )
        ahead = statistics.mean(errors_of["random", 0.98]) - statistics.mean(errors_of[method, 0.98])
        verdict.append(f"- {method} at 98% against random: {100 * ahead:+.2f} points better")
    first = f"{shown(errors_of['dense', 0.0])}, {rates['dense', 0.0]:g}"
    options.out.write_text(
        TEXT.format(
            date=datetime.date.today(), torch=torch.__version__, python=platform.python_version(),
            seconds=time.perf_counter() - start, seeds=options.seeds,
            epochs=options.epochs, batch=BATCH, decay=DECAY, heads=" | ".join(f"{s:.0%}" for s in SPARSITIES),
            rates=", ".join(f"{rate:g}" for rate in RATES), held=len(data[1]) // HELD, searched=len(SEARCHED),
            lines=" | ".join("---" for _ in SPARSITIES),
            dense=" | ".join([first, *("" for _ in SPARSITIES[1:])]),
            rows="\n".join(rows), verdict="\n".join(verdict),
        )
    )  # fmt: skip
    print(options.out.read_text())


def shown(errors: list[float]) -> str:
    """Mean and standard deviation in percent."""
    spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
    return f"{100 * statistics.mean(errors):.2f} ± {100 * spread:.2f}"


if __name__ == "__main__":
    main()
