"""Time to divide a model in two (analysis, plan and emission) against Torch-Pruning 1.6.1 halving it.

    python benchmarks/compile_time.py [--runs 5] [--out benchmarks/results/compile_time.md]

Tracing stands apart, in a column of its own. Three more tables: cost over the number of layers, emission at
K = 1 (forward and backward against the original, eager), and a Llama of 405 billion parameters on the meta
device. Torch-Pruning is timed for `DependencyGraph.build_dependency` and a `BasePruner` step at a ratio of
one half; it works in place, so that every run gets a fresh model. Both are given the same example inputs.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from models import CASES, Case, bert_base
from torch import nn

import graphsplit as gs
from graphsplit.analysis import analyse


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, without garbage collection (as in timeit), which is done before."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    finally:
        gc.enable()


def halve_with_torch_pruning(case: Case, model: nn.Module, example: torch.Tensor) -> str:
    """Dependency graph and one pruning step; a word on how it went."""
    import torch_pruning as tp

    before = sum(p.numel() for p in model.parameters())
    heads = {}
    for module in model.modules():
        if hasattr(module, "num_attention_heads") and hasattr(module, "query"):
            for projection in (module.query, module.key, module.value):
                heads[projection] = module.num_attention_heads
    pruner = tp.pruner.BasePruner(
        model, example, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=[model.get_submodule(case.head)], num_heads=heads,
    )  # fmt: skip
    pruner.step()
    return f"{sum(p.numel() for p in model.parameters()) / before:.2f} of the parameters"


def compile_times(runs: int) -> list[str]:
    """A row for each model: medians, and the ratio of medians."""
    lines = [
        "| model | graphsplit: trace | analysis + plan + emission | Torch-Pruning: graph + halving | ratio "
        "| spread of the ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        traces: list[float] = []
        ours: list[float] = []
        theirs: list[float] = []
        notes = [""]
        example = case.example()
        for _ in range(runs + 1):
            model = case.build()
            start = time.perf_counter()
            program = gs.trace(model, (example,))
            traces.append(time.perf_counter() - start)
            ours.append(seconds(partial(_emit, program)))
            del program
            try:
                theirs.append(seconds(partial(_note, notes, case, model, example)))
            except Exception as error:  # what the other tool cannot do is a result, too
                notes.append(f"fails: {type(error).__name__}: {str(error)[:60]}")
                break
        traces, ours, theirs = traces[1:] or traces, ours[1:] or ours, theirs[1:]
        own = statistics.median(ours)
        row = f"| {case.name} | {statistics.median(traces):.2f} s | {own * 1e3:.0f} ms |"
        if theirs:
            other = statistics.median(theirs)
            ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
            row += f" {other * 1e3:.0f} ms ({notes[-1]}) | {other / own:.1f} "
            row += f"| {ratios[0]:.1f} to {ratios[-1]:.1f} |"
        else:
            row += f" {notes[-1]} | | |"
        lines.append(row)
        print(row, flush=True)
    return lines


def _emit(program: gs.Program) -> list[gs.ProgramModule]:
    return gs.partition(program, k=2).submodels


def _note(notes: list[str], case: Case, model: nn.Module, example: torch.Tensor) -> None:
    notes.append(halve_with_torch_pruning(case, model, example))


def layers_table(runs: int) -> list[str]:
    """Cost over depth: BERT of base width."""
    lines = [
        "| layers of BERT | trace | analysis + plan | analysis + plan, per layer |",
        "| --- | --- | --- | --- |",
    ]
    for layers in (3, 6, 12, 24, 48):
        with torch.device("meta"):
            model = bert_base(layers)
            example = torch.zeros(2, 128, dtype=torch.long)
        start = time.perf_counter()
        program = gs.trace(model, (example,))
        traced = time.perf_counter() - start
        found = statistics.median(seconds(partial(analyse, program, 2)) for _ in range(runs))
        lines.append(f"| {layers} | {traced:.2f} s | {found * 1e3:.0f} ms | {found * 1e3 / layers:.2f} ms |")
        print(lines[-1], flush=True)
    return lines


def emission_table(runs: int) -> list[str]:
    """Forward plus backward of the emitted module at K = 1 against the original's, in turn, eager."""
    lines = [
        "| model | original | emitted at K = 1 | ratio of medians | median of paired ratios |",
        "| --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        torch.manual_seed(0)
        model = case.build().train()
        example = case.example()
        emitted = gs.partition(model, (example,), k=1).submodels[0].train()
        pairs = []
        for number in range(3 * runs + 2):
            first, second = (model, emitted) if number % 2 else (emitted, model)
            a = seconds(partial(_step, first, example))
            b = seconds(partial(_step, second, example))
            pairs.append((a, b) if number % 2 else (b, a))
        pairs = pairs[2:]
        original = statistics.median(a for a, _ in pairs)
        ours = statistics.median(b for _, b in pairs)
        paired = statistics.median(b / a for a, b in pairs)
        lines.append(
            f"| {case.name} | {original * 1e3:.0f} ms | {ours * 1e3:.0f} ms | {ours / original:.3f} "
            f"| {paired:.3f} |"
        )
        print(lines[-1], flush=True)
    return lines


def _step(module: nn.Module, example: torch.Tensor) -> None:
    module(example).sum().backward()
    for parameter in module.parameters():
        parameter.grad = None


def llama_table() -> list[str]:
    """A Llama of 405 billion parameters on the meta device, planned for K = 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
            num_key_value_heads=8, vocab_size=128256,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        tokens = torch.zeros(2, 8, dtype=torch.long)
    start = time.perf_counter()
    program = gs.trace(model, (tokens,))
    traced = time.perf_counter()
    partition = gs.partition(program, k=8)
    text = partition.plan.to_json()
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    share = partition.plan.parameter_counts()[0]
    row = (
        f"| {program.parameter_count():,} | {share:,} | {traced - start:.0f} s | {done - traced:.0f} s "
        f"| {done - start:.0f} s | {peak:.1f} GB | {len(text) / 1e6:.1f} MB |"
    )
    print(row, flush=True)
    head = (
        "| parameters | of one sub-model | trace | analysis + plan | together | peak memory of the process "
        "| plan as JSON |"
    )
    return [head, "| --- | --- | --- | --- | --- | --- | --- |", row]


def main() -> None:
    """Measure, print every row, and write the tables where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=["llama", "compile", "layers", "emission"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = [
        "# Compile time",
        "",
        f"`python benchmarks/compile_time.py --runs {options.runs}`, {datetime.date.today()}, "
        f"{platform.machine()} with {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, Torch-Pruning {importlib.metadata.version('torch-pruning')}. Medians.",
    ]
    tables: list[tuple[str, str, Callable[[], list[str]]]] = [
        ("llama", "A Llama of 405 billion parameters on the meta device, K = 8", llama_table),
        ("compile", "Dividing in two", lambda: compile_times(options.runs)),
        ("layers", "Over the number of layers", lambda: layers_table(options.runs)),
        ("emission", "Emission at K = 1: forward plus backward, eager", lambda: emission_table(options.runs)),
    ]
    for name, title, table in tables:
        if options.only in (None, name):
            lines += ["", f"## {title}", "", *table()]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
