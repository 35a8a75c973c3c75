"""What there is to draw: the ops of a program, nested by the modules that ran them.

Ops stand in the order in which they run. A box for a module holds ops that run one after the other, so that
a closed box can stand for all of them and the figure still has no cycle; a module that is called twice, or
left and entered again, has two boxes. A module of a single op is that op's box. Consecutive modules that are
alike in all but their number (the layers of a Transformer) are held by one more box.

Drawn are the ops on the way to the outputs; sizes, and counters that are kept beside that way, are left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import fx

from graphsplit.analysis.inference import output_nodes
from graphsplit.drawing.division import LOOKS, Division, Look
from graphsplit.program import TRAINING, Program, TensorMeta, op_name, source_of
from graphsplit.report import batch_symbol, input_values, op_label, output_values

Role = Literal["input", "output", "op", "move", "module", "alike"]
MOVES = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "expand",
    "alias", "clone", "contiguous", "to", "slice", "select", "split", "split_with_sizes", "chunk", "unbind",
    "detach", "type_as", "_to_copy", "expand_as", "movedim", "narrow", "numpy_T",
}  # fmt: skip
"""Ops that only move values; they are drawn small."""

ALIKE = 3
"""Modules in a row that are alike get a box of their own from this number on."""


@dataclass(frozen=True)
class Band:
    """What ``ops`` results are to the parts; ``shares`` of each part, of one."""

    look: Look
    ops: int
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Net:
    """A value inside of a box: where it starts and where it is used.

    Attributes:
        value: Number of the op that gives it.
        start: The child that holds this op, or None where the value comes from outside.
        ends: Children that use it.
        leaves: It is used outside, too.
    """

    value: int
    start: int | None
    ends: tuple[int, ...]
    leaves: bool


@dataclass(frozen=True, eq=False)
class Box:
    """An op, a module, or several modules that are alike.

    Attributes:
        role: What it is.
        path: Path of the module, of the first one of several.
        name: What it is called inside of the box around it.
        note: A few more words: the op of a module that has only one, the number of ops of another.
        first: Number of its first op; ops are numbered as they run.
        last: Number of its last op.
        shape: Of its result, where it is an op.
        parameters: Number of scalars in parameters; those that an op before it has used already are left out.
        held: The same for each part.
        bands: What its results are to the parts; none without a division.
        details: Everything that is known of it, line by line.
        children: What it holds.
        nets: How values go between them.
    """

    role: Role
    path: str
    name: str
    note: str
    first: int
    last: int
    shape: str = ""
    parameters: int = 0
    held: tuple[int, ...] = ()
    bands: tuple[Band, ...] = ()
    details: tuple[str, ...] = ()
    children: tuple[Box, ...] = ()
    nets: tuple[Net, ...] = ()

    def boxes(self) -> Iterator[Box]:
        """This one and all that it holds, outer ones first."""
        yield self
        for child in self.children:
            yield from child.boxes()


@dataclass(frozen=True)
class Outline:
    """A figure's content.

    Attributes:
        model: Name of the model.
        parameters: Number of scalars in parameters.
        held: The same for each part; empty without a division.
        title: What the parts are and how they were made.
        part: What a part is called.
        root: The model.
        notes: What a reader has to know.
    """

    model: str
    parameters: int
    held: tuple[int, ...]
    title: str
    part: str
    root: Box
    notes: tuple[str, ...]

    @property
    def k(self) -> int:
        """Number of parts, 0 without a division."""
        return len(self.held)


def outline(program: Program, division: Division | None = None) -> Outline:
    """The ops of a program nested by module, with what each is to the parts of a division."""
    leaves = _Leaves(program, division)
    root = _module((), leaves.boxes, _Model(leaves.uses, division))
    notes = list(program.notes)
    if program.branches_on_training:
        notes.append("training takes another way through the model's Python; drawn is evaluation")
    unused = [
        entry.name
        for entry in program.state.values()
        if entry.kind == "parameter" and entry.name not in leaves.seen
    ]
    if unused:
        notes.append(f"parameters that no op uses, and that are not drawn: {', '.join(unused)}")
    return Outline(
        program.name,
        program.parameter_count(),
        () if division is None else division.held,
        "" if division is None else division.title,
        "" if division is None else division.part,
        replace(root, path="", name=program.name),
        tuple(notes),
    )


# Ops


@dataclass
class _Leaves:
    """Boxes of inputs, ops and outputs, in the order in which they run.

    Attributes:
        uses: For each box the numbers of those whose values it uses.
        seen: State tensors that have been counted.
    """

    program: Program
    division: Division | None
    boxes: list[Box] = field(default_factory=list)
    uses: list[list[int]] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._batch = batch_symbol(self.program)
        self._numbers: dict[fx.Node, int] = {}
        graph = self.program.graph()
        live = _live(graph)
        names = iter(value["name"] for value in input_values(self.program))
        for node in graph.nodes:
            if node.op == "placeholder":
                self._add(node, "input", next(names), "input")
            elif node in live and op_name(node) != "operator.getitem" and _tensors(node):
                label = op_label(node)
                self._add(node, "move" if label in MOVES else "op", label, "")
        names = iter(value["name"] for value in output_values(self.program))
        for value in output_nodes(graph):
            if isinstance(value, fx.Node) and isinstance(value.meta.get("value"), TensorMeta):
                self._add(value, "output", next(names), "output")

    def _add(self, node: fx.Node, role: Role, name: str, note: str) -> None:
        number = len(self.boxes)
        source = source_of(node)
        inner = role in ("op", "move")
        operands = _operands(node) if inner else [_giver(node)] if role == "output" else []
        state = [operand for operand in operands if operand.op == "get_attr"] if inner else []
        numbers = [self._numbers[operand] for operand in operands if operand in self._numbers]
        counts, lines = self._state(node, state)
        path = source.module if inner else ""
        title = f"{name} in {path}" if path else name if inner else f"{note} {name}"
        details = [title, *self._looks(node), *self._results(node)]
        if numbers:
            details += [
                f"uses {', '.join(self._text(operand) for operand in operands if operand in self._numbers)}"
            ]
        details += lines
        if inner and source.file:
            details.append(f"{_short(source.file)}:{source.line}")
            details += [f"    {source.code}"] if source.code else []
        self.uses.append(numbers)
        self.boxes.append(
            Box(
                role, path, name, note, number, number,
                shape=self._shapes(node),
                parameters=counts[0],
                held=tuple(counts[1:]),
                bands=self._bands(node),
                details=tuple(details),
            )
        )  # fmt: skip
        if role != "output":
            self._numbers[node] = number

    def _text(self, node: fx.Node) -> str:
        box = self.boxes[self._numbers[node]]
        return f"{box.name} {box.shape}"

    def _shape(self, meta: TensorMeta, local: tuple[int, ...] | None = None) -> str:
        """``[batch, 64, 56, 56]``, or the sizes in a part."""
        sizes = []
        for dim, given in zip(meta.dims, local or meta.shape, strict=True):
            sizes.append(str(given) if given != dim.hint or dim.symbol is None else self._symbol(dim.symbol))
        return f"[{', '.join(sizes)}]"

    def _shapes(self, node: fx.Node) -> str:
        """The shape of the result, or how many there are."""
        shapes = [self._shape(meta) for meta in _tensors(node)]
        if len(shapes) == 1:
            return shapes[0]
        return f"{len(shapes)} × {shapes[0]}" if len(set(shapes)) == 1 else f"{len(shapes)} tensors"

    def _symbol(self, symbol: str) -> str:
        return symbol if self._batch is None else re.sub(rf"\b{self._batch}\b", "batch", symbol)

    def _bands(self, node: fx.Node) -> tuple[Band, ...]:
        if self.division is None:
            return ()
        return (Band(self.division.look(node), 1, self.division.shares(node)),)

    def _looks(self, node: fx.Node) -> Iterator[str]:
        if self.division is not None:
            look = self.division.look(node)
            yield f"{look}: {LOOKS[look]}"

    def _results(self, node: fx.Node) -> Iterator[str]:
        metas = _tensors(node)
        local = [] if self.division is None else self.division.local_shapes(node)
        padded = local if len(local) == len(metas) else [None] * len(metas)
        for meta, shapes in zip(metas, padded, strict=True):
            text = f"{str(meta.dtype).removeprefix('torch.')}{self._shape(meta)}"
            if shapes is not None and self.division is not None:
                text += f"; {self.division.each([self._shape(meta, shape) for shape in shapes])}"
            yield text

    def _state(self, user: fx.Node, nodes: Sequence[fx.Node]) -> tuple[list[int], list[str]]:
        """Scalars in parameters seen for the first time, in all and for each part; and lines."""
        counts = [0] * (1 + (0 if self.division is None else self.division.k))
        lines = []
        module = source_of(user).module
        for node in nodes:
            entry = self.program.state[str(node.target)]
            held, words = ((), "") if self.division is None else self.division.state(entry, user)
            text = f"{entry.kind} {entry.name} {list(entry.tensor.shape)}"
            text += f"; {words}" if words else ""
            if entry.aliases:
                text += f"; tied to {', '.join(entry.aliases)}"
            if entry.kind == "parameter":
                if entry.name in self.seen:
                    text += f"; counted where it is used first, {self.seen[entry.name]}"
                else:
                    label = op_label(user)
                    self.seen[entry.name] = f"{label} in {module}" if module else label
                    found = (entry.tensor.numel(), *held)
                    counts = [count + more for count, more in zip(counts, found, strict=True)]
            lines.append(text)
        return counts, [*_counts(counts[0], counts[1:], self.division), *lines]


def _counts(full: int, held: Sequence[int], division: Division | None) -> Iterator[str]:
    if full:
        words = "" if division is None else f"; {division.counts(held)}"
        yield f"{full:,} parameters{words}"


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Ops from which a value goes to an output."""
    found: set[fx.Node] = set()
    stack = [value for value in output_nodes(graph) if isinstance(value, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found and node.op == "call_function":
            found.add(node)
            stack += node.all_input_nodes
    return found


def _tensors(node: fx.Node) -> list[TensorMeta]:
    value: Any = node.meta.get("value")
    values = value if isinstance(value, tuple) else (value,)
    return [item for item in values if isinstance(item, TensorMeta)]


def _operands(node: fx.Node) -> list[fx.Node]:
    """What an op uses, the flag for training left out."""
    found = (_giver(operand) for operand in node.all_input_nodes if operand.target != TRAINING)
    return list(dict.fromkeys(found))


def _giver(node: fx.Node) -> fx.Node:
    """The op that gives several results in the place of one of these."""
    while node.op == "call_function" and op_name(node) == "operator.getitem":
        node = node.all_input_nodes[0]
    return node


def _short(file: str) -> str:
    """A file of an installed package by its name inside of it."""
    return re.split(r"[\\/](?:site|dist)-packages[\\/]", file)[-1]


# Modules


class _Model:
    """What is known of the whole model: which values an op uses, which is the last op to use its own."""

    def __init__(self, uses: Sequence[Sequence[int]], division: Division | None) -> None:
        self.uses = uses
        self.last = {value: number for number, values in enumerate(uses) for value in values}
        self.division = division


def _module(path: tuple[str, ...], leaves: Sequence[Box], model: _Model) -> Box:
    """The box of a module; that of its only child where it has one, unless it is the model."""
    depth = len(path)
    children: list[Box] = []
    parts = [tuple(leaf.path.split(".")) if leaf.path else () for leaf in leaves]
    for inner, group in itertools.groupby(range(len(leaves)), lambda i: parts[i][: depth + 1]):
        inside = [leaves[i] for i in group]
        children += inside if len(inner) == depth else [_module(inner, inside, model)]
    if path and len(leaves) == 1 and parts[0] == path:
        return replace(leaves[0], role="op", name=path[-1], note=leaves[0].name)
    children = _gathered(".".join(path), children, model)
    if path and len(children) == 1:
        return children[0]
    return _around("module", ".".join(path), path[-1] if path else "", children, model)


def _around(role: Role, path: str, name: str, children: Sequence[Box], model: _Model, note: str = "") -> Box:
    """A box that holds others."""
    children = [_named(child, path) for child in children]
    children = [_again(child, children[:position]) for position, child in enumerate(children)]
    leaves = [leaf for child in children for leaf in child.boxes() if not leaf.children]
    parameters = sum(child.parameters for child in children)
    held = tuple(map(sum, zip(*(child.held for child in children), strict=True)))
    ops = sum(leaf.role in ("op", "move") for leaf in leaves)
    note = note or (f"{ops} op" if ops == 1 else f"{ops} ops")
    bands = _bands(leaves)
    lines = [f"{band.look}, {band.ops} of them: {LOOKS[band.look]}" for band in bands]
    return Box(
        role, path, name, note, children[0].first, children[-1].last,
        parameters=parameters,
        held=held,
        bands=bands,
        details=(path, note, *lines, *_counts(parameters, held, model.division)),
        children=tuple(children),
        nets=_nets(children, model),
    )  # fmt: skip


def _named(child: Box, path: str) -> Box:
    """The child by its path inside of the box around it; a number gets the name of what it counts."""
    if child.role in ("input", "output") or (not child.children and not child.note):
        return child
    inside = child.path[len(path) + 1 :] if path and child.path.startswith(f"{path}.") else child.path
    if inside[:1].isdigit() and path:
        inside = f"{path.rpartition('.')[2]}.{inside}"
    if child.role == "alike":
        inside = f"{inside}–{child.children[-1].path.rpartition('.')[2]}"
    return replace(child, name=inside or child.name)


def _again(child: Box, before: Sequence[Box]) -> Box:
    """Say so where a module is called, or entered, more than once."""
    if child.role == "op" and not child.note:
        return child
    known = any(other.path == child.path and (other.children or other.note) for other in before)
    return replace(child, note=f"{child.note}, again") if known and child.path else child


def _bands(leaves: Sequence[Box]) -> tuple[Band, ...]:
    """What the ops' results are; moves, inputs and outputs count where there is nothing else."""
    ops = [leaf for leaf in leaves if leaf.role == "op"] or list(leaves)
    bands = [band for leaf in ops for band in leaf.bands]
    found = []
    for look in LOOKS:
        alike = [band for band in bands if band.look == look]
        if alike:
            shares = zip(*(band.shares for band in alike), strict=True)
            found.append(Band(look, len(alike), tuple(sum(share) / len(alike) for share in shares)))
    return tuple(found)


def _nets(children: Sequence[Box], model: _Model) -> tuple[Net, ...]:
    """The values that come in, go between children, or go out, in the order of the ops that give them."""
    first, last = children[0].first, children[-1].last
    owner = {number: i for i, child in enumerate(children) for number in range(child.first, child.last + 1)}
    ends: dict[int, dict[int, None]] = {}
    for number in range(first, last + 1):
        for value in model.uses[number]:
            if owner.get(value) != owner[number]:
                ends.setdefault(value, {})[owner[number]] = None
    outside = {value for value in owner if model.last.get(value, last) > last}
    return tuple(
        Net(value, owner.get(value), tuple(sorted(ends.get(value, ()))), value in outside)
        for value in sorted(ends.keys() | outside)
    )


# Modules that are alike


def _gathered(path: str, children: Sequence[Box], model: _Model) -> list[Box]:
    """Runs of modules that are alike in one box each."""
    result: list[Box] = []
    keys = [_likeness(child, model) for child in children]
    for key, group in itertools.groupby(range(len(children)), lambda i: keys[i]):
        run = [children[i] for i in group]
        if key is None or len(run) < ALIKE:
            result += run
        else:
            box = _around("alike", path, "", run, model, f"{len(run)} alike")
            title = f"{run[0].path} to {run[-1].path}"
            result.append(replace(box, path=run[0].path, details=(title, *box.details[1:])))
    return result


def _likeness(box: Box, model: _Model) -> Any:
    """What is equal for modules that do the same with other weights; None for what is no module."""
    if not box.children:
        return None
    start = len(box.path)
    rows = []
    for leaf in box.boxes():
        if not leaf.children:
            inside = tuple(
                leaf.first - value if value >= box.first else None for value in model.uses[leaf.first]
            )
            state = leaf.parameters, leaf.held
            rows.append((leaf.path[start:], leaf.name, leaf.note, leaf.shape, leaf.bands, state, inside))
    # The name of a module of one op is its number in a list, which is not what makes it another.
    return tuple((row[0], row[2] or row[1], *row[2:]) for row in rows)
