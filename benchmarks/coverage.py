"""What graphsplit divides, model by model, beside Torch-Pruning 1.6.1: writes ``docs/coverage.md``.

    python benchmarks/coverage.py [--only NAME ...] [--jobs 2] [--timeout 30] [--resume FILE] [--out FILE]

Every model of the test zoo is divided at K = 2 and, where its sizes allow, at K = 4, and verified in float64
as the tests do; the traced model is compared with the original in float32, too. Torch-Pruning is asked to
halve the same model in the same environment by its public API, without hints for single models: output
layers (linear and convolutional ones whose result is an output) are left alone, as graphsplit leaves them.
Models run in processes beside this one, with a limit on processor time and memory for each. With
``--resume`` results are kept in a file as they come, and a second run goes on where the first was ended:
delete a line to run its model again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import queue
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import graphsplit as gs  # noqa: E402
from graphsplit.errors import UserError  # noqa: E402
from graphsplit.program import Program, op_name  # noqa: E402
from graphsplit.signature import as_call  # noqa: E402
from graphsplit.verification import BOUND  # noqa: E402
from zoo import ZOO  # noqa: E402

KS = (2, 4)
TOOLS = ("graphsplit", "torch-pruning")
WAIT = 30  # times the limit on processor time: how long a process may be silent, on a machine with other work
MEMORY = 6 * 2**30  # bytes of address space for a process that tries models
TEXT = """# Coverage

Written by `python benchmarks/coverage.py`, {date}: {versions}.

Every model of the test zoo (`tests/zoo/`). *Exact* means that the exact merge is the mean of the sub-models
in float64 (error under {bound}), with independent random weights in each, and that the traced model equals
the original in float32, with its gradients; the number beside it is the share of the parameters that the
largest sub-model holds (1/K² where every layer is divided on both sides). *Refused* models are named with
the sentence of the error. *Kept whole* names what every sub-model computes in full.

Torch-Pruning is asked to halve the same model, without hints for single models, output layers left alone:
the column says in how many of the inner linear and convolutional layers half of the outputs are left, where
the model still runs; whether it then computes what it should (whole heads, for one) is not asked; it varies
from run to run (101 and 98 models halved in two runs of the same versions). Either
tool has {timeout} s of processor time and {memory} GiB for a model.

## Summary

{summary}

## Models

{table}
"""
VERDICTS = ("exact", "refused", "failed", "wrong")
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


# -- one model, in a process of its own ----------------------------------------------------------------------


def divided(name: str) -> dict[str, Any]:
    """Result of graphsplit for one model: operators, and by K the error, the share, what is kept whole."""
    entry = ZOO[name]
    model: nn.Module | Program = entry.build()
    operators: set[str] = set()
    results: dict[str, Any] = {}
    for k in entry.k:
        try:
            part = gs.partition(model, *as_call(entry.inputs()), k=k)
            certificate = part.verify()
        except UserError as refusal:
            results[str(k)] = {"refused": one_line(refusal)}
            continue
        except Exception as error:  # what the tool cannot do is a result, too
            results[str(k)] = {"failed": described(error)}
            continue
        model = part.program  # traced, and compared with the original
        operators = {op_name(node) for node in model.nodes() if node.op == "call_function"}
        counts, full = part.plan.parameter_counts(), part.plan.full_parameter_count()
        results[str(k)] = {
            "ok": certificate.ok,
            "share": max(counts) / full,
            "whole": list(dict.fromkeys(reason.split(" (")[0] for reason in part.analysis.kept_whole)),
        }
    return {"operators": len(operators), "results": results}


def described(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def one_line(error: Exception) -> str:
    """The sentence of an error, without place and hint."""
    text = str(error).split(" — ")[0].split(" (at ")[0]
    return " ".join(text.split())


def halved(name: str) -> str:
    """How far Torch-Pruning halves one model: in how many of its inner layers the outputs are halved."""
    import torch_pruning as tp

    entry = ZOO[name]
    model = entry.build().eval()
    args, kwargs = as_call(entry.inputs())
    heads = output_layers(model, args, kwargs)
    widths = {layer: layer.weight.shape for layer in model.modules() if isinstance(layer, LAYERS)}
    pruner = tp.pruner.BasePruner(
        model, kwargs or args, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=heads,
    )  # fmt: skip
    pruner.step()
    inner = [layer for layer in widths if layer not in heads]
    dims = {layer: int(isinstance(layer, TRANSPOSED)) for layer in inner}
    smaller = [layer for layer, dim in dims.items() if 2 * layer.weight.shape[dim] <= widths[layer][dim] + 1]
    with torch.no_grad():
        model(*args, **kwargs)
    if len(smaller) == len(inner):
        return "halved"
    return f"in part ({len(smaller)} of {len(inner)} layers)" if smaller else "not at all"


def output_layers(model: nn.Module, args: tuple[Any, ...], kwargs: Any) -> list[nn.Module]:
    """Layers whose result is an output of the model."""
    results: list[tuple[nn.Module, int]] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        results.append((module, output.untyped_storage().data_ptr()))

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, LAYERS)]
    with torch.no_grad():
        outputs = model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    places = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    return [module for module, place in results if place in places]


def result_of(name: str, tool: str, timeout: int) -> dict[str, Any]:
    """The result of one tool for one model, in so many seconds of processor time."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end after {timeout} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, timeout)
    try:
        return divided(name) if tool == "graphsplit" else {"pruned": halved(name)}
    except Exception as error:  # what a tool cannot do is a result, too
        return failed(tool, described(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


# -- all models ----------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Results by tool and model, and the file where they are kept as they come, one JSON object a line."""

    path: Path | None
    found: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.path is not None and self.path.exists():
            for line in self.path.read_text().splitlines():
                record = json.loads(line)
                self.found[record["tool"], record["model"]] = record["result"]

    def add(self, tool: str, name: str, result: dict[str, Any]) -> None:
        """Keep the result of one tool for one model."""
        with self._lock:
            print(name, tool, result, flush=True)
            self.found[tool, name] = result
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps({"tool": tool, "model": name, "result": result}) + "\n")


def run(names: list[str], tool: str, timeout: int, results: Results) -> None:
    """`result_of` for several models in another process, and in a new one after a model that ends it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    left = [name for name in names if (tool, name) not in results.found]
    while left:
        command = [sys.executable, __file__, f"--timeout={timeout}", "--tool", tool, "--worker", *left]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_read, args=(worker, lines), daemon=True).start()
        while left:
            try:
                line = lines.get(timeout=WAIT * timeout)
            except queue.Empty:
                results.add(tool, left.pop(0), failed(tool, "the process does not answer"))
                break
            if not line:
                results.add(tool, left.pop(0), failed(tool, "the process ended"))
                break
            results.add(tool, left.pop(0), json.loads(line))
        worker.kill()
        worker.wait()


def _read(worker: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    """Put the lines of a process into a queue, and an empty one at its end."""
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    lines.put("")


def failed(tool: str, reason: str) -> dict[str, Any]:
    """A model on which a tool broke."""
    if tool == "graphsplit":
        return {"operators": 0, "results": {"2": {"failed": reason}}}
    return {"pruned": f"fails: {reason}"}


def cell(result: dict[str, Any] | None) -> str:
    """One K of one model."""
    if result is None:
        return ""
    for word in ("refused", "failed"):
        if word in result:
            return f"{word}: {escaped(result[word])}"
    return f"exact, {result['share']:.2f}" if result["ok"] else "WRONG"


def escaped(text: str, limit: int = 110) -> str:
    """Text that a table may hold."""
    text = text.replace("|", "/").replace("<", "(").replace(">", ")").replace(str(ROOT), "")
    return text if len(text) <= limit else text[: limit - 3] + "..."


def verdict(result: dict[str, Any] | None) -> str:
    """The class of a result, for the summary."""
    if result is None:
        return "not asked"
    if "refused" in result or "failed" in result:
        return "refused" if "refused" in result else "failed"
    return "exact" if result["ok"] else "wrong"


def table(names: list[str], ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    """A row for each model."""
    lines = [
        "| model | family | operators | K = 2 | K = 4 | kept whole | Torch-Pruning |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, own, other in zip(names, ours, theirs, strict=True):
        results = own["results"]
        reasons = dict.fromkeys(reason for result in results.values() for reason in result.get("whole", []))
        lines.append(
            f"| {name} | {ZOO[name].family} | {own['operators'] or ''} | {cell(results.get('2'))} "
            f"| {cell(results.get('4'))} | {escaped('; '.join(reasons))} | {escaped(other['pruned'])} |"
        )
    return lines


def summary(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    """Counts of results."""
    lines = ["| | models | " + " | ".join(VERDICTS) + " |", "| --- | --- |" + " --- |" * len(VERDICTS)]
    for k in KS:
        counts = Counter(verdict(own["results"].get(str(k))) for own in ours)
        row = " | ".join(str(counts[word]) for word in VERDICTS)
        lines.append(f"| graphsplit, K = {k} | {len(ours) - counts['not asked']} | {row} |")
    classes = Counter(other["pruned"].split(" (")[0].split(":")[0] for other in theirs)
    found = ", ".join(f"{count} {word}" for word, count in sorted(classes.items()))
    return [*lines, "", f"Torch-Pruning, of {len(theirs)} models: {found}."]


def page(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], names: list[str], timeout: int) -> str:
    """The text of the page."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "torch-pruning"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package).split('+')[0]}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return TEXT.format(
        date=datetime.date.today(), versions=", ".join(versions), bound=f"{BOUND:.0e}",
        timeout=timeout, memory=MEMORY >> 30,
        summary="\n".join(summary(ours, theirs)), table="\n".join(table(names, ours, theirs)),
    )  # fmt: skip


def main() -> None:
    """Run every model and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=30)
    parser.add_argument("--resume", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--tool", help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        warnings.simplefilter("ignore")
        for name in options.worker:
            with contextlib.redirect_stdout(sys.stderr):
                result = json.dumps(result_of(name, options.tool, options.timeout))
            print(result, flush=True)
        return
    names = options.only or list(ZOO)
    results = Results(options.resume)
    tools = TOOLS if importlib.util.find_spec("torch_pruning") is not None else TOOLS[:1]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            pool.submit(run, names[start :: options.jobs], tool, options.timeout, results)
            for tool in tools
            for start in range(options.jobs)
        ]
        for job in jobs:
            job.result()
    ours = [results.found[TOOLS[0], name] for name in names]
    theirs = [results.found.get((TOOLS[1], name), {"pruned": "not installed"}) for name in names]
    options.out.write_text(page(ours, theirs, names, options.timeout))


if __name__ == "__main__":
    main()
