"""What people see. The only module that knows rich; it shows plain data and computes nothing.

Data goes to stdout; progress, notes and errors go to stderr.
"""

from __future__ import annotations

import contextlib
import json as json_text
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.padding import Padding
from rich.progress import Progress as Bars
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from graphsplit.errors import GraphsplitError
from graphsplit.report import Group, ModelReport, Op, PartitionReport, Submodel, Value, finite

WIDTH = 100
"""Columns where nobody is there to have a terminal."""

MANY = 12
"""Rows beyond this are summed up."""


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDTH
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


def _print(*parts: RenderableType, wrap: bool = True) -> None:
    """Print to stdout, without the spaces with which rich fills up lines."""
    console = _console()
    with console.capture() as capture:
        for part in parts:
            console.print(part, soft_wrap=not wrap)
    text = re.sub(r" +((?:\x1b\[[\d;]*m)*)$", r"\1", capture.get(), flags=re.MULTILINE)
    sys.stdout.write(_writable(text, sys.stdout.encoding))


def _writable(text: str, encoding: str | None) -> str:
    """The text with a question mark for what the stream has no sign for."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, errors="replace").decode(encoding)


# stderr


@dataclass
class Progress:
    """The steps of a command, shown on stderr while they run.

    Attributes:
        timings: Seconds of each step.
    """

    timings: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show what is being done, and measure it. What the user's code prints goes to stderr too."""
        console = _console(stderr=True)
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            if console.is_terminal:
                with _spinner(console, name):
                    yield
            else:
                print(f"{name} ...", file=sys.stderr, flush=True)
                yield
        self.timings[name] = time.perf_counter() - start


def _spinner(console: Console, name: str) -> Bars:
    """What is being done, and for how long; gone when it is done."""
    text = TextColumn("{task.description}", markup=False)
    bars = Bars(SpinnerColumn(), text, TimeElapsedColumn(), console=console, transient=True)
    bars.add_task(name, total=None)
    return bars


def note(text: str) -> None:
    """A line for people on stderr."""
    _console(stderr=True).print(Text(f"note: {text}"), soft_wrap=True)


def error(failure: GraphsplitError, *, verbose: bool) -> None:
    """One sentence, where, and the way out, after the traceback of the user's own code."""
    console = _console(stderr=True)
    users = getattr(failure, "traceback_text", None)
    if users:
        console.print(Text(users.rstrip()), soft_wrap=True)
    if verbose:
        console.print(Text("".join(traceback.format_exception(failure)).rstrip()), soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), failure.message), soft_wrap=True)
    if failure.where:
        console.print(Text.assemble(("   at: ", "bold"), failure.where), soft_wrap=True)
    if failure.hint:
        console.print(Text.assemble((" hint: ", "bold"), failure.hint), soft_wrap=True)


def bug(failure: Exception, *, verbose: bool) -> None:
    """An error that nobody expected."""
    console = _console(stderr=True)
    if verbose:
        console.print(Text("".join(traceback.format_exception(failure)).rstrip()), soft_wrap=True)
    what = f"a bug in graphsplit: {type(failure).__name__}: {failure}"
    console.print(Text.assemble(("error: ", "bold red"), what), soft_wrap=True)
    hint = "please report it" if verbose else "run it again with --verbose, and report it with the traceback"
    console.print(Text.assemble((" hint: ", "bold"), hint), soft_wrap=True)


# stdout


def json(report: Mapping[str, Any]) -> None:
    """A report as JSON; nothing else may be printed to stdout."""
    sys.stdout.write(json_text.dumps(finite(report), indent=2, allow_nan=False) + "\n")


def model(report: ModelReport, origin: str) -> None:
    """All that is known of a model and its division."""
    _heading(report, origin)
    _section(f"Units ({count(len(report['axes']), 'axis', 'axes')})", _units(report["groups"], full=True))
    _shared(report)
    _submodels(report)
    _cannot_split(report)
    if report["duplicated"]:
        _section("An exact merge runs these once for each sub-model", _ops(report["duplicated"]))
    notes(report["notes"])


def partition(report: PartitionReport, origin: str) -> None:
    """A division, its parts and its proof."""
    _heading(report, origin)
    _section(f"Units ({count(len(report['axes']), 'axis', 'axes')})", _units(report["groups"], full=False))
    _submodels(report)
    _duplicated_line(report)
    _cannot_split(report)
    certificate(report["certificate"])
    notes(report["notes"])


def certificate(data: Mapping[str, Any] | None) -> None:
    """The comparisons that were made."""
    if data is None:
        _section("Certificate", Text("not verified (--no-verify)"))
        return
    yes, no = ("✓", "✗") if (sys.stdout.encoding or "").lower().startswith("utf") else ("ok", "NO")
    table = _table("", "check", ("error", "right"), ("at most", "right"), "dtype")
    for row in data["rows"]:
        informative = row["bound"] is None
        tick = Text("") if informative else Text(yes, "green") if row["ok"] else Text(no, "bold red")
        bound = "no bound" if informative else _number(row["bound"], row["dtype"])
        table.add_row(
            tick,
            row["check"],
            _number(row["error"], row["dtype"]),
            bound,
            row["dtype"],
            style="dim" if informative else "",
        )
    verdict = "all checks hold" if data["ok"] else "A CHECK FAILED"
    _section(f"Certificate: {verdict}", table)


def masks(report: Mapping[str, Any]) -> None:
    """What is left of every pruned parameter."""
    rows = report["layers"]
    size, kept = (sum(row[name] for row in rows) for name in ("size", "kept"))
    words = f" from {report['origin']}: {kept:,} of {size:,} weights are left, by {report['method']}"
    _print(Text.assemble((report["model"], "bold"), words), wrap=False)
    table = _table("", "shape", ("weights", "right"), ("left", "right"), ("density", "right"))
    for row in rows:
        share = f"{row['kept'] / max(row['size'], 1):.2%}".replace("%", " %")
        table.add_row(row["name"], _shape(row["shape"]), f"{row['size']:,}", f"{row['kept']:,}", share)
    _section("Masks", table)


def pruned(report: Mapping[str, Any]) -> None:
    """What is left of every axis of units, and what could lose nothing."""
    (before, after), (flops, fewer) = report["parameters"], report["flops"]
    words = f" from {report['origin']}: {after:,} of {before:,} parameters, {fewer:,} of {flops:,} FLOPs"
    _print(Text.assemble((report["model"], "bold"), words), wrap=False)
    table = _table("", ("units", "right"), ("left", "right"))
    for row in report["axes"]:
        table.add_row(row["name"], f"{row['before']:,}", f"{row['after']:,}")
    _section("Units", table)
    if report["kept"]:
        table = _table("", "")
        for row in report["kept"]:
            table.add_row(row["name"], row["reason"])
        _section("Stay whole", table)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of text."""
    found = _table(*head)
    for row in rows:
        found.add_row(*row)
    _section(title, found)


def depth(report: Mapping[str, Any], origin: str) -> None:
    """Layer groups, what crosses the cuts, and what each prefix takes."""
    full = f"{report['parameters']:,} parameters"
    heading = f" from {origin}, {full}, into {report['n']} layer groups"
    _print(Text.assemble((report["model"], "bold"), heading), wrap=False)
    table = _table("", ("parameters", "right"), ("FLOPs", "right"), "starts at", "hands on")
    for number, group in enumerate(report["groups"]):
        crossing = "\n".join(f"{item['dtype']}{list(item['shape'])}" for item in group["crossing"])
        starts = group["source"].partition(",")[0]
        table.add_row(f"group {number}", f"{group['parameters']:,}", f"{group['flops']:,}", starts, crossing)
    _section("Layer groups", table)
    dearest = max(group["cost"] for group in report["groups"])
    line = f"the dearest group has {_amount(dearest)} {report['unit']}, no cuts could give less than "
    _section("Balance", Text(f"{line}{_amount(report['bound'])}"))
    if "submodels" in report:
        table = _table("", ("parameters", "right"), ("its critic", "right"), ("FLOPs of an example", "right"))
        for number, row in enumerate(report["submodels"]):
            name = f"sub-model {number}" if number < report["n"] - 1 else "the model"
            table.add_row(
                name, f"{row['parameters']:,}", f"{row['critic_parameters']:,}", f"{row['flops']:,.0f}"
            )
        _section("Sub-models, each a prefix with its critic", table)
    if "costs" in report:
        table = _table("", ("memory of a step", "right"), ("of the whole", "right"), ("FLOPs", "right"))
        whole = report["costs"][-1]
        for number, row in enumerate(report["costs"]):
            name = f"part {number}" if number < report["n"] else "the whole"
            share = f"{row['memory'] / whole['memory']:.0%}".replace("%", " %")
            table.add_row(name, size(row["memory"]), share, f"{row['flops']:,}")
        _section("Training apart", table)
    certificate(report["certificate"])
    notes(report["notes"])


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def timings(seconds: Mapping[str, float]) -> None:
    """The time that it took, and the steps that took most of it."""
    steps = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items() if value >= 0.05)
    _section("Time", Text(f"{sum(seconds.values()):.1f} s" + (f": {steps}" if steps else "")))


def files(title: str, paths: Sequence[Path]) -> None:
    """Files with their sizes."""
    table = _table("", ("", "right"), header=False)
    for path in paths:
        table.add_row(path.name, size(path.stat().st_size))
    _section(title, table)


def onnx(rows: Sequence[Mapping[str, Any]]) -> None:
    """ONNX Runtime against torch, a row for each file, output and set of sizes."""
    table = _table("file", "output", "at", ("difference", "right"), ("accepted", "right"))
    for row in rows:
        sizes = ", ".join(f"{name} {value}" for name, value in row["sizes"].items()) or "the traced sizes"
        accepted = _number(row["tolerance"])
        table.add_row(row["file"], row["output"], sizes, _number(row["absolute"]), accepted)
    _section("ONNX Runtime against torch", table)


def passes(rows: Sequence[Mapping[str, Any]]) -> None:
    """What each pass of a pipeline did."""
    table = _table("pass", "", ("seconds", "right"))
    for row in rows:
        what = "changed the program" if row["modified"] else f"nothing to do: {row['reason'] or 'no match'}"
        table.add_row(row["name"], what, f"{row['seconds']:.2f}")
    _section("Passes", table)


def programs(rows: Sequence[Mapping[str, Any]]) -> None:
    """Programs that came out of a pipeline."""
    table = _table("program", ("parameters", "right"), ("nodes", "right"))
    for row in rows:
        table.add_row(row["name"], f"{row['parameters']:,}", f"{row['nodes']:,}")
    _section("Programs", table)


def notes(texts: Sequence[str]) -> None:
    """Things that a reader should know."""
    if texts:
        _section("Notes", Text("\n".join(texts)))


def commands(title: str, lines: Sequence[str]) -> None:
    """Commands to type next."""
    _print("", Text(title, "bold"), *(Text(f"  {line}") for line in lines), wrap=False)


def say(text: str) -> None:
    """A line of the report."""
    _print(Text(text), wrap=False)


# Parts


def _heading(report: ModelReport, origin: str) -> None:
    full = f"{report['parameters']:,} parameters"
    what = f"into {report['k']} sub-models" if report["k"] > 1 else "whole, as one sub-model"
    _print(Text.assemble((report["model"], "bold"), f" from {origin}, {full}, {what}"), wrap=False)
    table = _table("", "", header=False)
    for title, values in (("input", report["shared"]["inputs"]), ("output", report["shared"]["outputs"])):
        for number, value in enumerate(values[:MANY]):
            table.add_row(title if number == 0 else "", _value(value))
        if len(values) > MANY:
            table.add_row("", f"and {len(values) - MANY} more")
    _print(Padding(table, (0, 0, 0, 2)))


def _value(value: Value) -> str:
    return f"{value['name']}: {value['dtype']}[{', '.join(map(str, value['shape']))}]"


def _units(groups: Sequence[Group], *, full: bool) -> Table:
    """A row for each group of axes; with everything that is coupled, or with how much that is."""
    many = [] if full else [("coupled", "right")]
    table = _table(("axes", "right"), ("units", "right"), ("each gets", "right"), *many, "where")
    for group in groups:
        where = Text(group["name"])
        if group["size"] != group["units"]:
            where.append(f" of size {group['size']:,}", "dim")
        share = "kept whole" if group["kept_whole"] else _share(group["per_submodel"])
        numbers = [f"{group['axes']:,}", f"{group['units']:,}", share]
        if full:
            coupled = (Padding(Text(line, "dim"), (0, 0, 0, 2)) for line in _compact(group["coupled"]))
            table.add_row(*numbers, Stack(where, *coupled))
        else:
            table.add_row(*numbers, str(len(group["coupled"])), where)
    return table


def _compact(names: Sequence[str]) -> Iterator[str]:
    """Dimensions of one module on one line: ``h.*.ln_1: weight[0], bias[0]``."""
    for module, members in groupby(names, lambda name: name.rpartition(".")[0]):
        leaves = ", ".join(name.rpartition(".")[2] for name in members)
        yield f"{module}: {leaves}" if module else leaves


def _share(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _submodels(report: ModelReport) -> None:
    table = _table("", ("parameters", "right"), ("of full", "right"))
    table.add_row("full model", f"{report['parameters']:,}", "100.0 %")
    for name, row in _runs(report["submodels"]):
        table.add_row(name, f"{row['parameters']:,}", f"{row['fraction']:.1%}".replace("%", " %"))
    _section("Sub-models", table)


def _runs(rows: Sequence[Submodel]) -> Iterator[tuple[str, Submodel]]:
    """Sub-models one by one; runs of equal ones where there are many."""
    if len(rows) <= MANY:
        yield from ((f"sub-model {number}", row) for number, row in enumerate(rows))
        return
    for _, run in groupby(enumerate(rows), lambda item: item[1]["parameters"]):
        members = list(run)
        first, last = members[0][0], members[-1][0]
        yield (f"sub-models {first} to {last}, each" if last > first else f"sub-model {first}"), members[0][1]


def _shared(report: ModelReport) -> None:
    shared = report["shared"]
    if shared["dims"]:
        table = _table(("size", "right"), "dimension")
        for dim in shared["dims"]:
            table.add_row(f"{dim['size']:,}", dim["name"])
        _section("In every sub-model, because of inputs and outputs", table)
    if shared["replicated"]:
        table = _table(("tensors", "right"), "parameter", "shape", "why")
        for row in shared["replicated"]:
            table.add_row(str(row["tensors"]), row["name"], _shape(row["shape"]), row["reason"])
        _section("Each sub-model has a copy of its own", table)


def _shape(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes)) or "scalar"


def _duplicated_line(report: ModelReport) -> None:
    counts: dict[str, int] = {}
    for op in report["duplicated"]:
        counts[op["op"]] = counts.get(op["op"], 0) + op["count"]
    if counts:
        ops = ", ".join(f"{count} {name}" for name, count in list(counts.items())[:MANY])
        more = f", and {len(counts) - MANY} more kinds" if len(counts) > MANY else ""
        _section("An exact merge runs these once for each sub-model", Text(ops + more))


def _cannot_split(report: ModelReport) -> None:
    if report["cannot_split"]:
        _section("Cannot be split", _ops(report["cannot_split"], reason=True))


def _ops(ops: Sequence[Op], *, reason: bool = False) -> Table:
    table = _table(("ops", "right"), "op", *(["why"] if reason else []), "module", "line")
    for op in ops:
        why = [op["reason"]] if reason else []
        table.add_row(str(op["count"]), op["op"], *why, op["module"] or "-", _place(op))
    return table


def _place(op: Op) -> Text:
    if not op["file"]:
        return Text("-")
    return Text.assemble(
        f"{_short(op['file'])}:{op['line']}", ("\n" + op["code"] if op["code"] else "", "dim")
    )


def _short(file: str) -> str:
    """A path from the working folder, or from the package that it is in."""
    _, found, inside = file.rpartition("site-packages/")
    if found:
        return inside
    with contextlib.suppress(ValueError):
        return str(Path(file).relative_to(Path.cwd()))
    return file


def size(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def _number(value: float | str, dtype: str = "") -> str:
    """An error or its bound: two digits, or a whole number for counts."""
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if dtype == "counts" or value == 0 else f"{value:.1e}"


def count(number: int, one: str, several: str) -> str:
    """A number with its noun."""
    return f"{number:,} {one if number == 1 else several}"


def _table(*columns: str | tuple[str, str], header: bool = True) -> Table:
    table = Table(box=None, show_header=header, header_style="dim", pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        name, justify = (column, "left") if isinstance(column, str) else column
        table.add_column(name, justify="right" if justify == "right" else "left", overflow="fold")
    return table


def _section(title: str, body: Table | Text) -> None:
    _print("", Text(title, "bold"), Padding(body, (0, 0, 0, 2)))
