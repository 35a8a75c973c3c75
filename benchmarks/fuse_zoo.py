"""Every model of the test zoo fused: models of random weights as one module, against the same apart.

    python benchmarks/fuse_zoo.py [--only NAME ...] [-k 2 4 8] [--threads 2]

Certificates are those of ``FusedModule.verify``, for the first K: outputs, buffers and gradients in both
modes and at another batch size, in float64. Times are those of a forward and backward pass by which
``gs.fuse(auto=True)`` decides, in rounds in which the ways take turns; by vmap from the model itself.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import graphsplit as gs  # noqa: E402
from graphsplit._fuse import certify_fused  # noqa: E402
from graphsplit.errors import UserError  # noqa: E402
from graphsplit.fusion.cost import fusion_cost  # noqa: E402
from graphsplit.passes.fuse import fuse  # noqa: E402
from graphsplit.signature import as_call  # noqa: E402
from zoo import ZOO  # noqa: E402

TEXT = """# The test zoo, fused

Written by `python benchmarks/fuse_zoo.py`, {date}: torch {torch}, Python {python}, a CPU with
{threads} threads; {seconds:.0f} s.

{models} models: {fused} fused, the largest error of outputs, buffers and gradients against K = {first}
separate models {worst:.1e} in float64; {wrong} wrong; {untraced} refused by the tracer. Nodes of the fused
graph are {nodes:.2f} times those of one model, in the middle. Ops that run once for each model, in all:
{looped}.

Time of a forward and backward pass of K models in turn by that of the fused ones, batches as small as in the
tests, medians of {rounds} runs: {times}. Where that is below 1, `auto=True`, which measures the same, runs
every op once for each model: "in turn" in the table.

Time by `torch.vmap` over stacked state by that of the fused ones: {by_vmap}.

| model | largest error | nodes | {heads} | {vmap_heads} | ops that run once for each model |
| --- | --- | --- | {rule} | {rule} | --- |
{rows}
"""


def by_vmap(models: list[torch.nn.Module], call: tuple[Any, Any]) -> None:
    """A forward and backward pass by torch.func."""
    parameters, buffers = torch.func.stack_module_state(models)
    base = models[0]

    def one(own: dict[str, Tensor], state: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(base, (own, state), *call)

    found = torch.vmap(one, randomness="different")(parameters, buffers)
    outputs = [
        value for value in pytree.tree_leaves(found) if isinstance(value, Tensor) and value.requires_grad
    ]
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def vmap_seconds(models: list[torch.nn.Module], call: tuple[Any, Any], rounds: int) -> float | None:
    """The median, or None where vmap does not know an op."""
    times = []
    try:
        for _ in range(rounds + 1):
            start = time.perf_counter()
            by_vmap(models, call)
            times.append(time.perf_counter() - start)
    except Exception as error:
        print(f"vmap: {str(error).splitlines()[0] if str(error) else type(error).__name__}", flush=True)
        return None
    return statistics.median(times[1:])


def summary(found: list[float]) -> str:
    """The least, the middle and the largest of ratios, and how many are not below one."""
    if not found:
        return "none"
    ordered = sorted(found)
    good = sum(value >= 1 for value in ordered)
    middle = ordered[len(ordered) // 2]
    ends = f"{ordered[0]:.2f} to {ordered[-1]:.2f}"
    return f"{middle:.2f} in the middle ({ends}), {good} of {len(found)} at least 1"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("-k", nargs="*", type=int, default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fuse_zoo.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    first = options.k[0]
    rows: list[str] = []
    errors: list[float] = []
    growth: list[float] = []
    ratios: dict[int, list[float]] = {k: [] for k in options.k}
    vmapped: dict[int, list[float]] = {k: [] for k in options.k}
    looped: Counter[str] = Counter()
    wrong = untraced = 0
    start = time.perf_counter()
    try:
        for name, entry in ZOO.items():
            if options.only and name not in options.only:
                continue
            call = as_call(entry.inputs())
            try:
                program = gs.trace(entry.build(), *call)
            except UserError as refusal:
                untraced += 1
                rows.append(
                    f"| {name} | refused by the tracer: {str(refusal)[:80]} |"
                    + " |" * (2 * len(options.k) + 2)
                )
                continue
            fused = fuse([program] * first)
            certificate = certify_fused(fused)
            looped.update(fused.looped)
            wrong += not certificate.ok
            errors.append(certificate.max_error)
            growth.append(len(fused.program.graph().nodes) / len(program.graph().nodes))
            inputs = program.signature.flatten(*call)
            cells: list[str] = []
            by: list[str] = []
            for k in options.k:
                many = [program] * k
                cost = fusion_cost(many, fuse(many).program, inputs, runs=options.rounds)
                ratios[k].append(cost.speedup)
                cells.append(f"{cost.speedup:.2f}" + ("" if cost.pays else ", in turn"))
                seconds = None
                if by[-1:] != ["fails"]:
                    seconds = vmap_seconds([entry.build() for _ in range(k)], call, options.rounds)
                by.append("fails" if seconds is None else f"{seconds / cost.fused:.2f}")
                if seconds is not None:
                    vmapped[k].append(seconds / cost.fused)
            ops = ", ".join(f"{op} ({count})" for op, count in sorted(fused.looped.items()))
            error = f"{certificate.max_error:.1e}" + ("" if certificate.ok else " **wrong**")
            rows.append(f"| {name} | {error} | {growth[-1]:.2f} | {' | '.join(cells + by)} | {ops} |")
            print(rows[-1], flush=True)
    except KeyboardInterrupt:
        print(f"stopped after {len(rows)} models: the table has those", flush=True)
    options.out.write_text(
        TEXT.format(
            date=datetime.date.today(), torch=torch.__version__, python=platform.python_version(),
            first=first, threads=options.threads, seconds=time.perf_counter() - start, models=len(rows),
            fused=len(errors) - wrong, worst=max(errors), wrong=wrong, untraced=untraced,
            nodes=sorted(growth)[len(growth) // 2],
            looped=", ".join(f"{op} ({count})" for op, count in looped.most_common()) or "none",
            times="; ".join(f"K = {k}: {summary(found)}" for k, found in ratios.items()),
            by_vmap="; ".join(
                f"K = {k}: {summary(found)}, {len(errors) - len(found)} fail" for k, found in vmapped.items()
            ),
            rounds=options.rounds, heads=" | ".join(f"K = {k}" for k in options.k),
            vmap_heads=" | ".join(f"vmap, K = {k}" for k in options.k),
            rule=" | ".join("---" for _ in options.k),
            rows="\n".join(rows),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
