"""Every model of the test zoo fused: models of random weights as one module, against the same apart.

    python benchmarks/fuse_zoo.py [--only NAME ...] [-k 2 4 8] [--rounds 5] [--threads 2]

Certificates are those of ``FusedModule.verify``, for the first K: outputs, buffers and gradients in both
modes and at another batch size, in float64. Times are those of a forward and backward pass by which
``gs.fuse(auto=True)`` decides, in rounds in which the ways take turns; by vmap from the model itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
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

Written by `python benchmarks/fuse_zoo.py`: {made}.

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


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model, as plain data."""
    entry = ZOO[name]
    call = as_call(entry.inputs())
    try:
        program = gs.trace(entry.build(), *call)
    except UserError as refusal:
        return {"refused": str(refusal)[:80]}
    fused = fuse([program] * options.k[0])
    certificate = certify_fused(fused)
    inputs = program.signature.flatten(*call)
    found: dict[str, Any] = {
        "error": certificate.max_error,
        "ok": certificate.ok,
        "nodes": len(fused.program.graph().nodes) / len(program.graph().nodes),
        "looped": dict(sorted(fused.looped.items())),
        "in turn": [],
        "vmap": [],
    }
    for k in options.k:
        many = [program] * k
        cost = fusion_cost(many, fuse(many).program, inputs, runs=options.rounds)
        found["in turn"].append(cost.speedup)
        seconds = None
        if None not in found["vmap"]:
            seconds = vmap_seconds([entry.build() for _ in range(k)], call, options.rounds)
        found["vmap"].append(None if seconds is None else seconds / cost.fused)
    return found


def row(name: str, found: dict[str, Any], columns: int) -> str:
    """Of the table."""
    if "refused" in found:
        return f"| {name} | refused by the tracer: {found['refused']} |" + " |" * (2 * columns + 2)
    cells = [f"{found['error']:.1e}" + ("" if found["ok"] else " **wrong**"), f"{found['nodes']:.2f}"]
    cells += [f"{ratio:.2f}" + (", in turn" if ratio <= 1 else "") for ratio in found["in turn"]]
    cells += ["fails" if ratio is None else f"{ratio:.2f}" for ratio in found["vmap"]]
    ops = ", ".join(f"{op} ({count})" for op, count in found["looped"].items())
    return f"| {name} | {' | '.join(cells)} | {ops} |"


def report(found: dict[str, dict[str, Any]], made: list[str], options: argparse.Namespace) -> str:
    """The table, and what is in it."""
    measured = [one for one in found.values() if "refused" not in one]
    looped: Counter[str] = Counter()
    for one in measured:
        looped.update(one["looped"])
    by_turns, by_vmap = (
        {k: [one[way][place] for one in measured] for place, k in enumerate(options.k)}
        for way in ("in turn", "vmap")
    )
    wrong = sum(not one["ok"] for one in measured)
    nodes = sorted(one["nodes"] for one in measured)
    return TEXT.format(
        made="; ".join(made), rounds=options.rounds, first=options.k[0], models=len(found),
        fused=len(measured) - wrong, worst=max(one["error"] for one in measured), wrong=wrong,
        untraced=len(found) - len(measured), nodes=nodes[len(nodes) // 2],
        looped=", ".join(f"{op} ({count})" for op, count in looped.most_common()) or "none",
        times="; ".join(f"K = {k}: {summary(ratios)}" for k, ratios in by_turns.items()),
        by_vmap="; ".join(
            f"K = {k}: {summary([ratio for ratio in ratios if ratio])}, {ratios.count(None)} fail"
            for k, ratios in by_vmap.items()
        ),
        heads=" | ".join(f"K = {k}" for k in options.k),
        vmap_heads=" | ".join(f"vmap, K = {k}" for k in options.k),
        rule=" | ".join("---" for _ in options.k),
        rows="\n".join(row(name, one, len(options.k)) for name, one in found.items()),
    )  # fmt: skip


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of models, whose rows are measured anew")
    parser.add_argument("-k", nargs="*", type=int, default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    data = options.out / "fuse_zoo.json"
    before = json.loads(data.read_text()) if options.only and data.exists() else {"made": [], "models": {}}
    found: dict[str, dict[str, Any]] = before["models"]
    start = time.perf_counter()
    names = options.only or list(ZOO)
    try:
        for name in names:
            found[name] = measure(name, options)
            print(row(name, found[name], len(options.k)), flush=True)
    except KeyboardInterrupt:
        print(f"stopped after {len(found)} models: the table has those", flush=True)
    made = [
        *before["made"],
        f"{datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()}, a CPU with "
        f"{options.threads} threads, {time.perf_counter() - start:.0f} s, "
        + (f"rows of {', '.join(options.only)}" if options.only else "all"),
    ]
    data.write_text(json.dumps({"made": made, "models": found}, indent=1) + "\n")
    (options.out / "fuse_zoo.md").write_text(report(found, made, options))


if __name__ == "__main__":
    main()
