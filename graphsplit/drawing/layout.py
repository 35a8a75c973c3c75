"""Where everything stands: layers from top to bottom inside of every box (Sugiyama, Tagawa & Toda, 1981).

A child stands below all that it uses. A value that is used further down than in the next row has a lane in
every row between. A row moves as one piece to where its boxes are below what they use, and lanes at its ends
keep straight. ``page.js`` does what `place` does, for boxes that are opened and closed in the browser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import networkx as nx

from graphsplit.drawing.outline import Box

CARD = (210, 50)
PILL = (210, 26)
GAP = 18
"""Between neighbours in a row, and between rows."""
LANE = 8
"""Width of a lane."""
PAD = 14
"""Between a box and what it holds."""
HEAD = 26
"""Height of the line with the name of an open box."""
LETTER = 6.6
"""Width of a letter in that line, about."""

Row = tuple[int, ...]
"""Children by their number; ``-1 - n`` for a lane of net ``n``, or its port in the first and the last row."""


def card_size(box: Box) -> tuple[int, int]:
    """Width and height of a closed box, in pixels."""
    return PILL if box.role == "move" else CARD


def head_width(box: Box) -> int:
    """Least width of an open box, in pixels."""
    return 2 * PAD + int(LETTER * (len(box.name) + len(box.note) + 4))


class Tie(NamedTuple):
    """A piece of a net, from an item to one in the next row."""

    upper: int
    lower: int
    net: int


@dataclass(frozen=True)
class Grid:
    """The children of a box in rows, between a row of what comes in and one of what goes out.

    Attributes:
        rows: From top to bottom.
        ties: Between every row and the next one.
    """

    rows: tuple[Row, ...]
    ties: tuple[tuple[Tie, ...], ...]


def grid(box: Box) -> Grid:
    """Rows of a box, each in an order that keeps nets from crossing, as far as four sweeps can."""
    ranks = _ranks(box)
    last = max(ranks) + 1
    rows: list[list[int]] = [[] for _ in range(last + 1)]
    ties: list[list[Tie]] = [[] for _ in range(last)]
    for child, rank in enumerate(ranks):
        rows[rank].append(child)
    for number, net in enumerate(box.nets):
        lane = -1 - number
        start = 0 if net.start is None else ranks[net.start]
        end = last if net.leaves else max(ranks[child] for child in net.ends)
        upper = lane if net.start is None else net.start
        if net.start is None:
            rows[0].append(lane)
        for rank in range(start + 1, end + net.leaves):
            rows[rank].append(lane)
            ties[rank - 1].append(Tie(upper, lane, number))
            upper = lane
        for child in net.ends:
            above = net.start if net.start is not None and ranks[child] == start + 1 else lane
            ties[ranks[child] - 1].append(Tie(above, child, number))
    _order(rows, ties)
    return Grid(tuple(map(tuple, rows)), tuple(map(tuple, ties)))


def _ranks(box: Box) -> list[int]:
    """Row of every child: as high as possible, but what uses nothing stands right above its first use."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(box.children)))
    fed = {end for net in box.nets if net.start is None for end in net.ends}
    fed |= {number for number, child in enumerate(box.children) if child.role == "input"}
    for net in box.nets:
        if net.start is not None:
            graph.add_edges_from((net.start, end) for end in net.ends)
    ranks = [0] * len(box.children)
    for number, layer in enumerate(nx.topological_generations(graph)):
        for child in layer:
            ranks[child] = number + 1
            if any(before in fed for before in graph.predecessors(child)):
                fed.add(child)
    for child in reversed(range(len(ranks))):
        if child not in fed and graph.out_degree(child):
            ranks[child] = min(ranks[after] for after in graph.successors(child)) - 1
    outputs = {number for number, child in enumerate(box.children) if child.role == "output"}
    bottom = max((rank for child, rank in enumerate(ranks) if child not in outputs), default=0) + 1
    return [bottom if child in outputs else rank for child, rank in enumerate(ranks)]


def _order(rows: list[list[int]], ties: Sequence[Sequence[Tie]]) -> None:
    """Sort every row by the mean place of what its items are tied to: downwards, upwards, and both again."""
    for downwards in (True, False, True, False):
        for rank in range(1, len(rows)) if downwards else range(len(rows) - 2, -1, -1):
            other = rows[rank - 1 if downwards else rank + 1]
            places = {item: place - (len(other) - 1) / 2 for place, item in enumerate(other)}
            found: dict[int, list[float]] = {}
            for upper, lower, _ in ties[rank - 1 if downwards else rank]:
                here, there = (lower, upper) if downwards else (upper, lower)
                found.setdefault(here, []).append(places[there])
            middle = (len(rows[rank]) - 1) / 2
            keys = {
                item: sum(found[item]) / len(found[item]) if item in found else place - middle
                for place, item in enumerate(rows[rank])
            }
            rows[rank].sort(key=keys.__getitem__)


@dataclass(eq=False)
class Placed:
    """A box with its place and size, in pixels; ``x`` and ``y`` are those inside of the box around it.

    Attributes:
        box: What is drawn.
        is_open: Its children are shown.
        ways: The lines of every net between its children, in SVG's words.
        incoming: Where values come in, by the number of their op; others at the centre.
        outgoing: Where values go out.
    """

    box: Box
    is_open: bool
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0
    children: tuple[Placed, ...] = ()
    ways: tuple[str, ...] = ()
    incoming: dict[int, float] = field(default_factory=dict)
    outgoing: dict[int, float] = field(default_factory=dict)


def place(box: Box, is_open: Callable[[Box], bool]) -> Placed:
    """Places of a box and of all that is shown in it."""
    if not (box.children and is_open(box)):
        return Placed(box, False, *card_size(box))
    children = tuple(place(child, is_open) for child in box.children)
    return _Assembly(box, children).placed()


@dataclass(eq=False)
class _Assembly:
    """An open box that is being put together; places are from the left end of its first row."""

    box: Box
    children: tuple[Placed, ...]

    def placed(self) -> Placed:
        cells = grid(self.box)
        at = self._across(cells)
        tops, bottoms = self._down(cells)
        edges = [
            (x - self._width(item) / 2, x + self._width(item) / 2) for row in at for item, x in row.items()
        ]
        left, right = min(edge[0] for edge in edges), max(edge[1] for edge in edges)
        width = max(right - left + 2 * PAD, head_width(self.box))
        shift = (width - right - left) / 2
        at = [{item: x + shift for item, x in row.items()} for row in at]
        for row, top in zip(at, tops, strict=True):
            for item, x in row.items():
                if item >= 0:
                    child = self.children[item]
                    child.x, child.y = x - child.width / 2, top
        return Placed(
            self.box, True, width, bottoms[-1],
            children=self.children,
            ways=self._ways(cells, at, tops, bottoms),
            incoming={self.box.nets[-1 - item].value: x for item, x in at[0].items()},
            outgoing={self.box.nets[-1 - item].value: x for item, x in at[-1].items()},
        )  # fmt: skip

    def _width(self, item: int) -> float:
        return self.children[item].width if item >= 0 else LANE

    def _out(self, item: int, net: int) -> float:
        """How far from an item's centre a net goes out."""
        if item < 0:
            return 0.0
        child = self.children[item]
        return child.outgoing.get(self.box.nets[net].value, child.width / 2) - child.width / 2

    def _in(self, item: int, net: int) -> float:
        """How far from an item's centre a net comes in."""
        if item < 0:
            return 0.0
        child = self.children[item]
        return child.incoming.get(self.box.nets[net].value, child.width / 2) - child.width / 2

    def _down(self, cells: Grid) -> tuple[list[float], list[float]]:
        """Upper and lower ends of the rows."""
        tops, bottoms, y = [], [], float(HEAD)
        for row in cells.rows:
            tops.append(y)
            bottoms.append(y + max((self.children[item].height for item in row if item >= 0), default=0.0))
            y = bottoms[-1] + GAP
        return tops, bottoms

    def _across(self, cells: Grid) -> list[dict[int, float]]:
        """Centre of every item, row by row."""
        found: list[dict[int, float]] = []
        for rank, row in enumerate(cells.rows):
            packed, x = {}, 0.0
            for item in row:
                packed[item] = x + self._width(item) / 2
                x += self._width(item) + GAP
            if rank > 0:
                wishes = self._wishes(cells.ties[rank - 1], found[-1], rank)
                guides = [item for item in row if item >= 0 and item in wishes] or list(wishes)
                shift = sum(wishes[item] - packed[item] for item in guides) / max(len(guides), 1)
                packed = {item: centre + shift for item, centre in packed.items()}
                self._straighten(row, packed, wishes)
            found.append(packed)
        return found

    def _wishes(self, ties: Sequence[Tie], above: Mapping[int, float], rank: int) -> dict[int, float]:
        """Where items would be right below what they use; where they use boxes, lanes do not count."""
        near: dict[int, list[float]] = {}
        far: dict[int, list[float]] = {}
        for upper, lower, net in ties:
            wish = above[upper] + self._out(upper, net) - self._in(lower, net)
            (near if upper >= 0 or rank == 1 else far).setdefault(lower, []).append(wish)
        return {item: sum(found) / len(found) for item, found in (far | near).items()}

    def _straighten(self, row: Row, packed: dict[int, float], wishes: Mapping[int, float]) -> None:
        """Let lanes at both ends of a row go on where they are, if there is room."""
        boxes = [place for place, item in enumerate(row) if item >= 0]
        if not boxes:
            return
        for place in range(boxes[-1] + 1, len(row)):
            before = row[place - 1]
            limit = packed[before] + self._width(before) / 2 + GAP + LANE / 2
            packed[row[place]] = max(limit, wishes[row[place]])
        for place in reversed(range(boxes[0])):
            after = row[place + 1]
            limit = packed[after] - self._width(after) / 2 - GAP - LANE / 2
            packed[row[place]] = min(limit, wishes[row[place]])

    def _ways(
        self, cells: Grid, at: Sequence[Mapping[int, float]], tops: Sequence[float], bottoms: Sequence[float]
    ) -> tuple[str, ...]:
        """The lines of every net."""
        ways = [""] * len(self.box.nets)
        drawn = set()
        for rank, ties in enumerate(cells.ties):
            for upper, lower, net in ties:
                x = at[rank][upper] + self._out(upper, net)
                if (rank, net) not in drawn:  # past the rest of the row
                    drawn.add((rank, net))
                    y = tops[rank] + (self.children[upper].height if upper >= 0 else 0)
                    if y < bottoms[rank]:
                        ways[net] += f"M{_number(x)} {_number(y)}V{_number(bottoms[rank])}"
                end = at[rank + 1][lower] + self._in(lower, net)
                ways[net] += _curve(x, bottoms[rank], end, tops[rank + 1])
        return tuple(ways)


def _curve(x: float, y: float, end: float, bottom: float) -> str:
    start = f"M{_number(x)} {_number(y)}"
    if abs(end - x) < 0.5:
        return f"{start}V{_number(bottom)}"
    middle = _number((y + bottom) / 2)
    return f"{start}C{_number(x)} {middle} {_number(end)} {middle} {_number(end)} {_number(bottom)}"


def _number(value: float) -> str:
    """At most one decimal, and none where it is zero."""
    return f"{value:.1f}".removesuffix(".0")
