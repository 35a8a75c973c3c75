"""Where to cut a program by depth: places that are allowed, what they cost, and the best of them."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from graphsplit import costs
from graphsplit.depth.balance import Balance, balance
from graphsplit.depth.line import Line, Span
from graphsplit.depth.plan import DepthPlan, Measure, Tied
from graphsplit.errors import PartitionError, PlanError
from graphsplit.memory import STATES
from graphsplit.program import Program, TensorMeta, source_of

Inputs = Callable[[], Sequence[Tensor]]
"""Gives example inputs, in the order of the placeholders."""


@dataclass(frozen=True)
class Cuts:
    """A division of a program into layer groups.

    Attributes:
        program: What is divided.
        lines: One for each of its graphs.
        ends: For each graph the place before which each group ends; the last is the end of the line.
        costs: Of each group, in the measure.
        bound: What the dearest group costs at least, wherever the cuts are.
    """

    program: Program
    lines: tuple[Line, ...]
    ends: tuple[tuple[int, ...], ...]
    costs: tuple[float, ...]
    bound: float

    @property
    def n(self) -> int:
        """Number of groups."""
        return len(self.costs)

    def places(self, line: int, group: int) -> range:
        """The places of a group in one graph."""
        ends = self.ends[line]
        return range(ends[group - 1] if group else 0, ends[group])

    def crossing(self, line: int, group: int) -> list[fx.Node]:
        """What a group hands to the next, as nodes of one graph."""
        return self.lines[line].frontiers[self.ends[line][group]]

    @cached_property
    def holders(self) -> dict[str, tuple[int, ...]]:
        """The groups that hold each state tensor; the first is its home."""
        found: dict[str, set[int]] = {}
        for line, ends in zip(self.lines, self.ends, strict=True):
            for name, groups in _users(line, ends).items():
                found.setdefault(name, set()).update(groups)
        holders: dict[str, tuple[int, ...]] = {}
        home = 0
        for name, entry in self.program.ordered_names():
            if entry.name in found and entry.name not in holders:
                home = min(found[entry.name])
            if name == entry.name:
                # What nothing uses stands with its neighbour.
                holders[name] = tuple(sorted(found.get(name, {home})))
        return holders


def _users(line: Line, ends: Sequence[int]) -> dict[str, set[int]]:
    """Groups whose nodes read or write each state tensor."""
    found: dict[str, set[int]] = {}
    for node, place in [*line.position.items(), *line.writes.items()]:
        if place >= 0:
            for name in line.states(node):
                found.setdefault(name, set()).add(bisect.bisect_right(ends, place))
    (output,) = line.graph.find_nodes(op="output")
    for name in line.states(output):
        found.setdefault(name, set()).add(len(ends) - 1)
    return found


def cut_at(program: Program, paths: Sequence[str], measure: Measure, tied: Tied, inputs: Inputs) -> Cuts:
    """Cut where modules start.

    Raises:
        PartitionError: A path does not exist, a group would be empty or a tied weight would be in two groups.
    """
    lines = _lines(program)
    places: dict[int, str] = {}
    for path in paths:
        place = _start_of(lines[0], path)
        if place in places or place == 0:
            other = f"{places[place]} and {path} start at the same place" if place else f"{path} comes first"
            raise PartitionError(f"{other}, which leaves an empty group", hint="leave it out")
        places[place] = path
    allowed = _Allowed(lines, tied)
    for place, path in places.items():
        reason = allowed.refusal(place)
        if reason is not None:
            raise PartitionError(f"no cut can be made at {path}: {reason}", hint=allowed.hint(place))
    weights = _node_costs(lines[0], measure, inputs)
    found = balance(weights, sorted(places), len(places) + 1)
    assert found is not None
    return _cuts(program, lines, allowed, found)


def cut_evenly(
    program: Program,
    n: int,
    measure: Measure,
    tied: Tied,
    inputs: Inputs,
    *,
    max_crossing: int | None = None,
    tolerance: float = 0.0,
) -> Cuts:
    """Cut into ``n`` groups, the dearest as cheap as it can be.

    Args:
        program: What to cut.
        n: Number of groups.
        measure: What a group costs.
        tied: Whether a tied weight may be copied into several groups.
        inputs: Example inputs, to measure time with.
        max_crossing: Bytes that a cut may let through, with the batch of the example.
        tolerance: By which share the dearest group may be dearer where that saves bytes.

    Raises:
        PartitionError: There are too few places for cuts; the message says what is in the way.
    """
    if n < 1:
        raise PartitionError(f"n = {n} groups were asked for", hint="ask for one or more")
    if not 0 <= tolerance < float("inf"):
        raise PartitionError(f"the tolerance is {tolerance}, expected a share of 0 or more")
    lines = _lines(program)
    line = lines[0]
    allowed = _Allowed(lines, tied)
    places = [place for place in range(1, line.end) if allowed.refusal(place) is None]
    within = places
    if max_crossing is not None:
        within = [place for place in places if line.crossing_bytes(place) <= max_crossing]
    weights = _node_costs(line, measure, inputs)
    layers = line.layers
    # Bytes decide; where they are the same, a group starts at a layer, not between it and its activation.
    prices = [2.0 * line.crossing_bytes(place) + (not layers[place]) for place in within]
    found = balance(weights, within, n, prices, tolerance, layers)
    if found is None:
        raise _too_few(program, n, allowed, places, within, max_crossing)
    return _cuts(program, lines, allowed, found)


def cut_by_plan(program: Program, plan: DepthPlan) -> Cuts:
    """The cuts that a plan has, on the program for which it was made.

    Raises:
        PlanError: The plan belongs to another program.
    """
    lines = _lines(program)
    ends = []
    for number, line in enumerate(lines):
        places = {node.name: place for place, node in enumerate(line.placed)}
        try:
            starts = [places[group.starts[number]] for group in plan.groups]
        except (KeyError, IndexError):
            raise PlanError("the plan does not belong to this model") from None
        if starts != sorted(set(starts)) or starts[0] != 0:
            raise PlanError("the plan's groups are not in order")
        ends.append((*starts[1:], line.end))
    return Cuts(program, lines, tuple(ends), tuple(group.cost for group in plan.groups), plan.bound)


def _too_few(
    program: Program,
    n: int,
    allowed: _Allowed,
    places: Sequence[int],
    within: Sequence[int],
    max_crossing: int | None,
) -> PartitionError:
    message = f"{program.name} cannot be cut into {n} groups: it has {len(within) + 1} pieces at most"
    if len(places) > len(within):
        line = allowed.lines[0]
        least = min(line.crossing_bytes(place) for place in places)
        return PartitionError(
            f"{message} with no more than {max_crossing:,} bytes across a cut",
            hint=f"allow more bytes; the narrowest place has {least:,}",
        )
    blocking = allowed.blocking()
    if blocking:
        return PartitionError(
            f"{message}, as {_listed(blocking)} must not be in two groups",
            hint="give tied='copy' for a copy in each group, or ask for fewer groups",
        )
    return PartitionError(message, hint="ask for fewer groups")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _lines(program: Program) -> tuple[Line, ...]:
    return tuple(Line(program, graph) for graph in program.graphs)


def _start_of(line: Line, path: str) -> int:
    """The place of the first node that a module runs."""
    for place, node in enumerate(line.placed):
        module = source_of(node).module
        if module == path or module.startswith(path + "."):
            return place
    known = sorted({prefix for node in line.placed for prefix in _prefixes(source_of(node).module)})
    near = difflib.get_close_matches(path, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {_listed(known)}" if known else None
    raise PartitionError(f"there is no module {path!r} that runs in the forward pass", hint=hint)


def _prefixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))] if module else []


class _Allowed:
    """Where the first line may be cut, and where the second is cut then."""

    def __init__(self, lines: tuple[Line, ...], tied: Tied) -> None:
        self.lines = lines
        self.tied = tied
        self._spans = [self._binding(line) for line in lines]
        self._second = self._places_by_key(lines[1]) if len(lines) > 1 else {}

    def refusal(self, place: int) -> str | None:
        """Why the first line must not be cut before a place; None where it may be."""
        line = self.lines[0]
        if not line.is_whole(place):
            return "something other than tensors would cross, or nothing"
        held = self._held(0, place)
        if held:
            return f"{_listed(held)} would be in two groups"
        if len(self.lines) > 1 and self._key(0, place) not in self._second:
            return "training and evaluation take different ways there"
        return None

    def hint(self, place: int) -> str:
        """The way out of a refusal."""
        if self._held(0, place) and self.tied == "refuse":
            return "give tied='copy' for a copy in each group, or cut elsewhere"
        return "cut elsewhere"

    def blocking(self) -> list[str]:
        """Names of what is used in several places."""
        return [span.name for span in self._spans[0] if span.first < span.last]

    def on_second(self, place: int) -> int:
        """Where the second line is cut when the first is cut before a place."""
        first, second = self.lines
        found = self._second[self._key(0, place)]
        wanted = source_of(first.placed[place])
        same = [p for p in found if p < second.end and source_of(second.placed[p]) == wanted]
        return (same or found)[-1]

    def _binding(self, line: Line) -> list[Span]:
        """Spans that no cut may be in."""
        return [
            span
            for span in line.spans.values()
            if self.tied == "refuse" or line.program.state[span.name].kind != "parameter"
        ]

    def _held(self, number: int, place: int) -> list[str]:
        return [span.name for span in self._spans[number] if span.first < place <= span.last]

    def _key(self, number: int, place: int) -> tuple[frozenset[str], tuple[object, ...]]:
        """What must agree for two lines to be cut at places that belong together."""
        line = self.lines[number]
        common = self.lines[0].spans.keys() & self.lines[1].spans.keys()
        used = frozenset(name for name in common if line.spans[name].first < place)
        metas: list[object] = []
        for node in line.frontiers[place]:
            meta = node.meta["value"]
            metas.append((meta.shape, meta.dtype) if isinstance(meta, TensorMeta) else None)
        return used, tuple(metas)

    def _places_by_key(self, line: Line) -> dict[tuple[frozenset[str], tuple[object, ...]], list[int]]:
        found: dict[tuple[frozenset[str], tuple[object, ...]], list[int]] = {}
        for place in range(1, line.end):
            if line.is_whole(place) and not self._held(1, place):
                found.setdefault(self._key(1, place), []).append(place)
        return found


def _node_costs(line: Line, measure: Measure, inputs: Inputs) -> list[float]:
    """What each placed node costs."""
    program = line.program
    held = [0] * line.end  # bytes of the state that is used first at each place
    scalars = [0] * line.end
    for span in line.spans.values():
        entry = program.state[span.name]
        if entry.kind == "parameter" and span.last >= 0:
            scalars[max(span.first, 0)] += entry.tensor.numel()
            copies = 2 + STATES["adam"] if entry.requires_grad else 1
            held[max(span.first, 0)] += entry.tensor.nbytes * copies
    if measure == "params":
        return [float(count) for count in scalars]
    if measure == "flops":
        return [float(costs.flops(node)) for node in line.placed]
    if measure == "memory":
        saved = costs.saved_bytes(program, line.graph)
        return [float(saved[node] + extra) for node, extra in zip(line.placed, held, strict=True)]
    timed = costs.seconds(program, line.graph, inputs())
    return [timed[node] for node in line.placed]


def _cuts(program: Program, lines: tuple[Line, ...], allowed: _Allowed, found: Balance) -> Cuts:
    ends = [(*found.cuts, lines[0].end)]
    if len(lines) > 1:
        ends.append((*(allowed.on_second(place) for place in found.cuts), lines[1].end))
    return Cuts(program, lines, tuple(ends), found.costs, found.bound)
