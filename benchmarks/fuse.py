"""Training steps of K models: fused, compiled, by vmap, and one after the other.

    python benchmarks/fuse.py [--sections steps submodels scaling written] [--only LeNet ...] [-k 2 4 8]
                              [--rounds 7] [--threads 2] [--device cuda] [--no-compile]

Forward and backward pass and a step of SGD with momentum, on one batch. The ways take turns in every round,
so that what else the machine does meets all of them; times are medians, ratios are medians of the ratios of
the rounds. ``--device cuda`` takes all of it in one call.

- steps: K models in turn, by ``torch.func.stack_module_state`` with ``vmap``, by ``gs.fuse``, and compiled;
  beside them what ``gs.fuse(auto=True)`` measures and chooses, the peak of memory, and the share of the FLOPs
  that a product of two large matrices reaches here.
- submodels: the full model, one of K sub-models, K in turn, and K fused.
- scaling: over K, width and batch, as a plot.
- written: modules that graphsplit emits against the same written by hand.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn import functional

import graphsplit as gs
from graphsplit.costs import graph_flops

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
import paper_cifar10  # noqa: E402
import paper_mnist  # noqa: E402
import small_gpt  # noqa: E402
from by_hand import GPTs, cifar10s, lenets, resnet18  # noqa: E402
from memory import peak_bytes  # noqa: E402

mpl.use("svg")
from matplotlib import pyplot  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TEXT = """# Fused models

Written by `python benchmarks/fuse.py`. A training step is a forward and backward pass and a step of SGD with
momentum. Ratios are medians over rounds in which the ways take turns; above 1 they say that the fused module
is faster. On a GPU: {cuda}.

{sections}
"""
TITLES = {
    "steps": "Steps of K models",
    "submodels": "Steps of K sub-models",
    "scaling": "Over K, width and batch",
    "written": "Against modules written by hand",
}
HEADS = {
    "steps": ("model", "batch", "K", "in turn", "vmap / fused", "in turn / fused", "as `auto` measures",
              "`auto`",
               "in turn / compiled", "seconds to compile", "peak: in turn, fused",
              "of the FLOP limit: in turn, fused", "looped"),
    "submodels": ("model", "batch", "K", "full model", "full / one sub-model", "full / K in turn",
                  "full / K fused"),
    "scaling": ("model", "what", "value", "in turn / fused"),
    "written": ("module", "nodes", "nodes of the original", "time by that of the one written by hand"),
}  # fmt: skip

Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """A model with a batch, and several such models by hand."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    hand: Callable[[int], nn.Module]


def _images(batch: int, channels: int, size: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randn(batch, channels, size, size), torch.randint(0, 10, (batch,)))


def _text(batch: int, length: int) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (torch.randint(0, 64, (batch, length)), torch.randint(0, 64, (batch, length)))


def cases(device: str) -> tuple[Case, ...]:
    """What is measured; a GPU gets a language model of a size that is of use there."""
    name, batch, sizes = "GPT of two layers", _text(16, 64), (64, 64, 64, 4, 2)
    if device == "cuda":
        name, batch, sizes = "GPT of 10 M parameters", _text(8, 256), (64, 256, 384, 6, 6)
    return (
        Case("LeNet", paper_mnist.lenet, _images(32, 1, 28), lenets),
        Case("CIFAR-10 network of the paper", paper_cifar10.network, _images(16, 3, 24), cifar10s),
        Case("ResNet-18, a quarter of its width", resnet18, _images(16, 3, 32), partial(resnet18, 1)),
        Case(name, lambda: small_gpt.GPT(*sizes), batch, lambda k: GPTs(k, *sizes)),
    )


def loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of classes ``[N, C]`` or characters ``[N, C, L]``."""
    return functional.cross_entropy(scores, targets)


def sgd(parameters: object) -> torch.optim.Optimizer:
    """The same for all ways."""
    return torch.optim.SGD(parameters, 0.01, momentum=0.9)


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
    parameters, buffers = torch.func.stack_module_state(models)
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


# -- what is measured ----------------------------------------------------------------------------------------


def in_rounds(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of every way in every round; ways that fail are left out."""
    times: dict[str, list[float]] = {}
    for name, step in steps.items():
        try:
            for _ in range(2):
                step()
            times[name] = []
        except RuntimeError as error:
            print(f"{name} fails: {str(error).splitlines()[0]}", flush=True)
    for _ in range(rounds):
        for name, found in times.items():
            found.append(seconds(steps[name], device))
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> str:
    """The median over the rounds of the ratio of two ways."""
    if above not in times or below not in times:
        return "-"
    return f"{statistics.median(a / b for a, b in zip(times[above], times[below], strict=True)):.2f}"


def milliseconds(found: list[float]) -> str:
    """The median."""
    return f"{1e3 * statistics.median(found):.1f} ms"


def limit(device: str) -> float:
    """FLOPs a second of a product of two large matrices."""
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device)
    torch.mm(a, b)
    best = min(seconds(lambda: torch.mm(a, b), device) for _ in range(5))
    return 2 * size**3 / best


@dataclass(frozen=True)
class Options:
    """How to measure."""

    k: list[int]
    rounds: int
    device: str
    compile: bool
    only: tuple[str, ...]

    def cases(self) -> Iterator[Case]:
        """The ones that are asked for."""
        return (case for case in cases(self.device) if case.name.startswith(self.only or ("",)))


def peak(step: Step, device: str) -> str:
    """Largest memory during a step, beyond what was there before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return f"{(torch.cuda.max_memory_allocated() - before) / 1e6:.0f} MB"
    return f"{peak_bytes(step) / 1e6:.0f} MB"


def steps(options: Options) -> Iterator[list[Any]]:
    """Rows of K models of full size."""
    top = limit(options.device)
    for case in options.cases():
        x, y = (tensor.to(options.device) for tensor in case.batch())
        for k in options.k:
            torch.manual_seed(0)
            models = [case.build().to(options.device) for _ in range(k)]
            module, chosen = gs.fuse(models, x), gs.fuse(models, x, auto=True)
            assert chosen.cost is not None
            ways = {
                "in turn": in_turn(models, x, y),
                "fused": fused(module, list(module.parameters()), x, y),
                "vmap": by_vmap(copy.deepcopy(models), x, y),
            }
            taken = "-"
            if options.compile and k == max(options.k):
                torch.compiler.reset()
                inductor.force_disable_caches = True  # seconds to compile are those of the first time
                own = copy.deepcopy(module)
                compiled: Any = torch.compile(own)
                ways["compiled"] = fused(compiled, list(own.parameters()), x, y)
                taken = f"{seconds(ways['compiled'], options.device):.0f}"
            times = in_rounds(ways, options.rounds, options.device)
            work = 3 * k * graph_flops(gs.trace(models[0], x).graph()) / top
            share = [f"{100 * work / statistics.median(times[way]):.0f} %" for way in ("in turn", "fused")]
            yield [
                case.name, len(x), k, milliseconds(times["in turn"]), ratio(times, "vmap", "fused"),
                ratio(times, "in turn", "fused"), f"{chosen.cost.speedup:.2f}",
                "in turn" if chosen.in_turn else "fused", ratio(times, "in turn", "compiled"), taken,
                ", ".join(peak(ways[way], options.device) for way in ("in turn", "fused")), ", ".join(share),
                ", ".join(module.looped) or "none",
            ]  # fmt: skip


def submodels(options: Options) -> Iterator[list[Any]]:
    """Rows of the sub-models of a partition."""
    for case in options.cases():
        x, y = (tensor.to(options.device) for tensor in case.batch())
        for k in options.k:
            torch.manual_seed(0)
            model = case.build().to(options.device)
            part = gs.partition(model, x, k=k)
            if len({sum(p.numel() for p in own.parameters()) for own in part.submodels}) > 1:
                continue  # K does not divide a width
            module = part.fuse()
            ways = {
                "full": in_turn([model], x, y),
                "one": in_turn(part.submodels[:1], x, y),
                "in turn": in_turn(part.submodels, x, y),
                "fused": fused(module, list(module.parameters()), x, y),
            }
            times = in_rounds(ways, options.rounds, options.device)
            ratios = [ratio(times, "full", way) for way in ("one", "in turn", "fused")]
            yield [case.name, len(x), k, milliseconds(times["full"]), *ratios]


def scaling(options: Options) -> Iterator[list[Any]]:
    """Rows over K, over width and over batch; the other two stay at 4, 1 and 16."""
    images = partial(_images, channels=3, size=32)

    def gpt(width: float) -> nn.Module:
        return small_gpt.GPT(64, 64, round(64 * width))

    builds: dict[str, tuple[Callable[[float], nn.Module], Callable[[int], Any]]] = {
        "ResNet-18": (lambda width: resnet18(width), lambda batch: images(batch)()),
        "GPT": (gpt, lambda batch: _text(batch, 64)()),
    }
    varied: dict[str, list[float]] = {
        "K": [1, 2, 4, 8, 16],
        "width": [0.25, 0.5, 1, 2],
        "batch": [2, 4, 16, 64],
    }
    for name, (build, batch) in builds.items():
        for what, values in varied.items():
            for value in values:
                at = {"K": 4, "width": 1.0, "batch": 16, what: value}
                torch.manual_seed(0)
                models = [build(at["width"]).to(options.device) for _ in range(int(at["K"]))]
                x, y = (tensor.to(options.device) for tensor in batch(int(at["batch"])))
                module = gs.fuse(models, x)
                ways = {
                    "in turn": in_turn(models, x, y),
                    "fused": fused(module, list(module.parameters()), x, y),
                }
                times = in_rounds(ways, options.rounds, options.device)
                yield [name, what, value, ratio(times, "in turn", "fused")]


def written(options: Options) -> Iterator[list[Any]]:
    """Rows of modules that graphsplit emits, against the same by hand, with the same values."""
    x, y = (tensor.to(options.device) for tensor in _images(32, 1, 28)())
    part = gs.partition(paper_mnist.lenet().to(options.device), x, k=2)
    z, c = (tensor.to(options.device) for tensor in _images(16, 3, 32)())
    resnet = resnet18().to(options.device)
    pairs: list[tuple[str, gs.ProgramModule, nn.Module, int, Tensor, Tensor]] = []
    original = len(part.program.graph().nodes)
    pairs.append(("LeNet, one of two sub-models", part.submodels[0], lenets(1, 2), original, x, y))
    pairs.append(("LeNet, merged", part.merge(), paper_mnist.lenet(), original, x, y))
    pairs.append(("LeNet, two sub-models fused", part.fuse(), lenets(2, 2), original, x, y))
    whole = gs.trace(resnet, z)
    pairs.append(("ResNet-18", gs.emit(whole), resnet, len(whole.graph().nodes), z, c))
    k = max(options.k)
    for case in options.cases():
        inputs, targets = (tensor.to(options.device) for tensor in case.batch())
        models = [case.build().to(options.device) for _ in range(k)]
        count = len(gs.trace(models[0], inputs).graph().nodes)
        pairs.append(
            (f"{case.name}, {k} fused", gs.fuse(models, inputs), case.hand(k), count, inputs, targets)
        )
    for name, module, hand, nodes, inputs, targets in pairs:
        hand = hand.to(options.device)
        with torch.no_grad():
            for own, theirs in zip(hand.parameters(), module.parameters(), strict=True):
                own.copy_(theirs.reshape(own.shape))
        torch.testing.assert_close(module(inputs), hand(inputs), rtol=1e-3, atol=1e-3)
        many = isinstance(module, gs.FusedModule)
        make = partial(fused, x=inputs, y=targets) if many else _one
        ways = {
            "emitted": make(module, list(module.parameters()), x=inputs, y=targets),
            "by hand": make(hand, list(hand.parameters()), x=inputs, y=targets),
        }
        times = in_rounds(ways, 2 * options.rounds, options.device)
        yield [name, len(module.graph.nodes), nodes, ratio(times, "emitted", "by hand")]


def _one(module: nn.Module, _: list[nn.Parameter], x: Tensor, y: Tensor) -> Step:
    return in_turn([module], x, y)


# -- the report ----------------------------------------------------------------------------------------------


def plot(rows: list[list[Any]], path: Path) -> None:
    """Three panels: over K, over width and over batch."""
    figure, panels = pyplot.subplots(1, 3, figsize=(9, 3), sharey=True)
    for panel, what in zip(panels, ("K", "width", "batch"), strict=True):
        for name in dict.fromkeys(row[0] for row in rows):
            points = [(row[2], float(row[3])) for row in rows if row[:2] == [name, what]]
            panel.plot(*zip(*points, strict=True), marker="o", label=name)
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xlabel(what)
    panels[0].set_ylabel("in turn / fused")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def report(found: dict[str, Any]) -> str:
    """The tables that there are."""
    parts = []
    for name, entry in found.items():
        section, device = name.split("/")
        head = HEADS[section]
        lines = [" | ".join(map(str, row)) for row in (head, ["---"] * len(head), *entry["rows"])]
        parts.append(
            f"## {TITLES[section]}\n\n{entry['made']}\n\n" + "\n".join(f"| {line} |" for line in lines)
        )
        if section == "scaling":
            parts[-1] += f"\n\n![In turn by fused](fuse_scaling_{device}.svg)"
    cuda = "below" if any(name.endswith("/cuda") for name in found) else "not measured"
    return TEXT.format(cuda=cuda, sections="\n\n".join(parts))


SECTIONS: dict[str, Callable[[Options], Iterator[list[Any]]]] = {
    "steps": steps, "submodels": submodels, "scaling": scaling, "written": written,
}  # fmt: skip


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of the models' names")
    parser.add_argument("-k", nargs="*", type=int, default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    options = Options(given.k, given.rounds, given.device, not given.no_compile, tuple(given.only))
    place = torch.cuda.get_device_name() if given.device == "cuda" else f"a CPU with {given.threads} threads"
    data = given.out / "fuse.json"
    found = json.loads(data.read_text()) if data.exists() else {}
    made = (
        f"{datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{place}, {given.rounds} rounds."
    )
    for section in given.sections:
        rows: list[list[Any]] = []
        for row in SECTIONS[section](options):
            rows.append(row)
            print(*row, sep=" | ", flush=True)
            found[f"{section}/{given.device}"] = {"made": made, "rows": rows}
            data.write_text(json.dumps(found, indent=1) + "\n")
        if section == "scaling":
            plot(rows, given.out / f"fuse_scaling_{given.device}.svg")
    (given.out / "fuse.md").write_text(report(found))


if __name__ == "__main__":
    main()
