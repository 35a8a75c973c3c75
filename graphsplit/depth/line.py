"""A graph as a line of nodes in the order in which they run, and what crosses a cut at each place.

Nodes are *placed* one after another, but for those that are *free*: sizes, what is made of sizes, buffers and
constants alone, and views of weights. These are computed again wherever they are needed, and cross no cut.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from graphsplit.builder import aten
from graphsplit.graphs import is_kept, node_arg
from graphsplit.program import Dim, Program, TensorMeta


@dataclass(frozen=True)
class Span:
    """Where a state tensor that must not be in two groups is used: from the first to the last place."""

    name: str
    first: int
    last: int


class Line:
    """The placed nodes of one graph of a program.

    Attributes:
        placed: In the order in which they run; parts of a tuple stand right behind the op that gives it.
        position: Place of each of them; inputs of the model are at -1.
        last_use: For what may cross a cut, the place of its last user; outputs are used at the end.
    """

    def __init__(self, program: Program, graph: fx.Graph) -> None:
        self.program = program
        self.graph = graph
        # What one mode writes and the other reads is in the same group in both.
        self.written = set().union(*map(_written, program.graphs))
        self._free = self._free_nodes()
        self.placed = tuple(self._ordered())
        self.position = dict.fromkeys(graph.find_nodes(op="placeholder"), -1)
        self.position |= {node: place for place, node in enumerate(self.placed)}
        self.end = len(self.placed)
        self.last_use: dict[fx.Node, int] = {}
        self._sizes: dict[str, tuple[int, fx.Node]] = {}
        for node in graph.nodes:
            place = self.end if node.op == "output" else self.position.get(node)
            if place is not None:
                self._use(node, place)
        self._carry_sizes()

    def is_free(self, node: fx.Node) -> bool:
        """True for a node that every group computes for itself."""
        return node in self._free

    def states(self, node: fx.Node) -> set[str]:
        """Names of the state that a node reads, by way of free nodes too."""
        found = {str(used.target) for used in self.reached(node) if used.op == "get_attr"}
        return found & self.program.state.keys()

    @cached_property
    def writes(self) -> dict[fx.Node, int]:
        """Writes of buffers, with the place of the value that is written."""
        found = {}
        before = 0
        for node in self.graph.nodes:
            before = self.position.get(node, before)
            if _is_write(node):
                value = node.args[1]
                place = self.position.get(value, before) if isinstance(value, fx.Node) else before
                found[node] = max(place, 0)
        return found

    @cached_property
    def spans(self) -> dict[str, Span]:
        """Use of every parameter, and of every buffer that is written."""
        places: dict[str, list[int]] = {}
        for node, place in [*self.position.items(), *self.writes.items()]:
            for used in self.reached(node):
                if used.op == "get_attr" and used not in self._free:
                    places.setdefault(str(used.target), []).append(place)
        return {name: Span(name, min(found), max(found)) for name, found in places.items()}

    @cached_property
    def layers(self) -> list[bool]:
        """For each place whether its node reads parameters: a layer starts there."""
        state = self.program.state
        return [
            any(
                used.op == "get_attr" and used.target in state and state[str(used.target)].kind == "parameter"
                for used in self.reached(node)
            )
            for node in self.placed
        ]

    @cached_property
    def frontiers(self) -> list[list[fx.Node]]:
        """What crosses a cut before each place: tensors computed before it and needed behind it, in order."""
        found = []
        live = [node for node in self.last_use if self.position[node] < 0]
        for place in range(self.end + 1):
            live = [node for node in live if self.last_use[node] >= place]
            found.append(live.copy())
            if place < self.end and self.placed[place] in self.last_use:
                live.append(self.placed[place])
        return found

    def _carry_sizes(self) -> None:
        """Let a tensor live on where a size is needed that nothing else which crosses has."""
        for symbol, (last, tensor) in self._sizes.items():
            alive = [False] * (self.end + 1)
            for node, end in self.last_use.items():
                if any(dim.symbol == symbol for dim in _dims(node)):
                    start = self.position[node] + 1
                    alive[start : end + 1] = [True] * (end + 1 - start)
            if not all(alive[self.position[tensor] + 1 : last + 1]):
                self.last_use[tensor] = max(self.last_use.get(tensor, last), last)

    def is_whole(self, place: int) -> bool:
        """True where only tensors would cross, and one at least."""
        crossing = self.frontiers[place]
        return bool(crossing) and all(isinstance(node.meta["value"], TensorMeta) for node in crossing)

    def crossing_bytes(self, place: int) -> int:
        """Bytes that cross a cut before ``place``, with the batch of the example."""
        return sum(bytes_of(node.meta["value"]) for node in self.frontiers[place])

    def _use(self, node: fx.Node, place: int) -> None:
        for used in self.reached(node):
            if used.op == "call_function" and used.target is aten.sym_size.int:
                tensor = node_arg(used)
                dim = used.meta["value"]
                if isinstance(dim, Dim) and dim.symbol is not None:
                    last, first = self._sizes.get(dim.symbol, (place, tensor))
                    self._sizes[dim.symbol] = (max(last, place), first)
            elif used in self.position:
                self.last_use[used] = max(self.last_use.get(used, place), place)

    def reached(self, node: fx.Node) -> Iterator[fx.Node]:
        """What a node uses, and what the free ones among it are made of; sizes stand for themselves."""
        stack, seen = node.all_input_nodes[::-1], set[fx.Node]()
        while stack:
            used = stack.pop()
            if used not in seen:
                seen.add(used)
                yield used
                if used in self._free and used.target is not aten.sym_size.int:
                    stack.extend(used.all_input_nodes[::-1])

    def _free_nodes(self) -> set[fx.Node]:
        free: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "get_attr":
                entry = self.program.state.get(str(node.target))
                if entry is None or (entry.kind != "parameter" and node.target not in self.written):
                    free.add(node)
            elif (
                _is_view_of_state(node, free)
                or node.target is aten.sym_size.int
                or (
                    node.op == "call_function"
                    and not is_kept(node)
                    and all(used in free for used in node.all_input_nodes)
                )
            ):
                free.add(node)
        return free

    def _ordered(self) -> Iterator[fx.Node]:
        for node in self.graph.nodes:
            if node.op != "call_function" or node in self._free or _is_write(node) or _is_item(node):
                continue
            yield node
            if isinstance(node.meta.get("value"), tuple):
                yield from _items(node)


def bytes_of(meta: TensorMeta) -> int:
    """Bytes of a tensor, with the sizes of the example."""
    return math.prod(meta.shape) * meta.dtype.itemsize


def _items(node: fx.Node) -> list[fx.Node]:
    """Parts of a tuple, and parts of those, in the order of the graph."""
    found = [user for user in node.users if _is_item(user)]
    return [item for part in found for item in (part, *_items(part))]


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node_arg(node).meta.get("value"), tuple)


def _is_view_of_state(node: fx.Node, free: set[fx.Node]) -> bool:
    """True for another view of a state tensor, such as a transposed weight: it belongs to who uses it."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or is_kept(node):
        return False
    result = node.target._schema.returns[:1]
    if not result or result[0].alias_info is None:
        return False
    if not node.all_input_nodes:
        return False
    first, *others = node.all_input_nodes
    return (first.op == "get_attr" or first in free) and all(used in free for used in others)


def _is_write(node: fx.Node) -> bool:
    return node.target is aten.copy_.default


def _written(graph: fx.Graph) -> set[str]:
    """Names of the buffers that a graph changes."""
    names = set()
    for node in graph.nodes:
        if _is_write(node):
            names.add(str(node_arg(node).target))
        elif node.target in (aten.batch_norm.default, aten.instance_norm.default):
            names |= {str(arg.target) for arg in node.args[3:5] if isinstance(arg, fx.Node)}
    return names


def _dims(node: fx.Node) -> tuple[Dim, ...]:
    value = node.meta.get("value")
    return value.dims if isinstance(value, TensorMeta) else ()
