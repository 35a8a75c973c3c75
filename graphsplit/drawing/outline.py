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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from torch import fx

from graphsplit.analysis import Analysis
from graphsplit.analysis.inference import output_nodes
from graphsplit.analysis.kinds import Kind, layouts_of
from graphsplit.analysis.layout import Layout
from graphsplit.plan import StatePlan
from graphsplit.program import TRAINING, Program, TensorMeta, op_name, source_of
from graphsplit.report import batch_symbol, input_values, op_label, output_values

Role = Literal["input", "output", "op", "move", "module", "alike"]
Look = Literal["split", "apart", "own", "mean", "common"]

LOOKS: dict[Look, str] = {
    "split": "each sub-model has a slice",
    "apart": "each sub-model has a slice; a merge computes the op once for each of them",
    "own": "each sub-model has a value of its own",
    "mean": "the mean over the sub-models",
    "common": "the same in all sub-models",
}
"""What a result can be to the sub-models, in the order in which a box shows it."""

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
    """What ``ops`` results are to the sub-models; ``shares`` of each sub-model, of one."""

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
        held: The same for each sub-model.
        bands: What its results are to the sub-models; none without a division.
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
        held: The same for each sub-model; empty without a division.
        root: The model.
        notes: What a reader has to know.
    """

    model: str
    parameters: int
    held: tuple[int, ...]
    root: Box
    notes: tuple[str, ...]

    @property
    def k(self) -> int:
        """Number of sub-models, 0 without a division."""
        return len(self.held)


def outline(program: Program, analysis: Analysis | None = None) -> Outline:
    """The ops of a program nested by module, with what each is to the sub-models of a division."""
    leaves = _Leaves(program, analysis)
    root = _module((), leaves.boxes, _Uses(leaves.uses))
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
        () if analysis is None else analysis.plan.parameter_counts(),
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
    analysis: Analysis | None
    boxes: list[Box] = field(default_factory=list)
    uses: list[list[int]] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._batch = batch_symbol(self.program)
        self._plans: Mapping[str, StatePlan] = (
            {} if self.analysis is None else {plan.name: plan for plan in self.analysis.plan.state}
        )
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
        counts, lines = self._state(state, name, source.module)
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
        """``[batch, 64, 56, 56]``, or the sizes in a sub-model."""
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

    def _look(self, node: fx.Node) -> Look:
        assert self.analysis is not None
        kinds = self.analysis.kinds
        if kinds.kind[node] is Kind.SPLIT and node in kinds.apart:
            return "apart"
        return _LOOK_OF[kinds.kind[node]]

    def _bands(self, node: fx.Node) -> tuple[Band, ...]:
        if self.analysis is None:
            return ()
        k = self.analysis.k
        sizes = [1.0] * k
        active = next((x for x in layouts_of(self.analysis.kinds, node) if x.active), None)
        if active is not None:
            sizes = [float(np.prod(active.local_shape(part))) for part in range(k)]
        total = sum(sizes) or 1.0
        return (Band(self._look(node), 1, tuple(size / total for size in sizes)),)

    def _looks(self, node: fx.Node) -> Iterator[str]:
        if self.analysis is not None:
            look = self._look(node)
            yield f"{look}: {LOOKS[look]}"

    def _results(self, node: fx.Node) -> Iterator[str]:
        layouts: Sequence[Layout | None] = (
            [] if self.analysis is None else layouts_of(self.analysis.kinds, node)
        )
        metas = _tensors(node)
        padded = layouts if len(layouts) == len(metas) else [None] * len(metas)
        for meta, layout in zip(metas, padded, strict=True):
            text = f"{str(meta.dtype).removeprefix('torch.')}{self._shape(meta)}"
            if layout is not None and layout.active and self.analysis is not None:
                shapes = [self._shape(meta, layout.local_shape(part)) for part in range(self.analysis.k)]
                text += f"; {_each(shapes)}"
            yield text

    def _state(self, nodes: Sequence[fx.Node], name: str, module: str) -> tuple[list[int], list[str]]:
        """Scalars in parameters seen for the first time, in all and for each sub-model; and lines."""
        k = 0 if self.analysis is None else self.analysis.k
        counts = [0] * (k + 1)
        lines = []
        for node in nodes:
            entry = self.program.state[str(node.target)]
            shape = list(entry.tensor.shape)
            text = f"{entry.kind} {entry.name} {shape}"
            plan = self._plans.get(entry.name)
            if plan is not None and any(cut is not None for cut in plan.cuts):
                text += f"; {_each([str(list(plan.local_shape(part))) for part in range(k)])}"
            elif plan is not None and plan.merge == "stack":
                text += "; a copy of its own in each sub-model"
            if entry.aliases:
                text += f"; tied to {', '.join(entry.aliases)}"
            if entry.kind == "parameter":
                if entry.name in self.seen:
                    text += f"; counted where it is used first, {self.seen[entry.name]}"
                else:
                    self.seen[entry.name] = f"{name} in {module}" if module else name
                    counts[0] += entry.tensor.numel()
                    for part in range(k):
                        assert plan is not None
                        counts[part + 1] += int(np.prod(plan.local_shape(part), dtype=np.int64))
            lines.append(text)
        return counts, [*_counts(counts[0], counts[1:]), *lines]


_LOOK_OF: dict[Kind, Look] = {
    Kind.SPLIT: "split", Kind.OWN: "own", Kind.MEAN: "mean", Kind.COMMON: "common"
}  # fmt: skip


def _counts(full: int, held: Sequence[int]) -> Iterator[str]:
    if full:
        yield f"{full:,} parameters" + (f"; {_each([f'{n:,}' for n in held])}" if held else "")


def _each(texts: Sequence[str]) -> str:
    """``in sub-models 0 to 2 a, in 3 b`` for a value of each sub-model."""
    if len(texts) > 1 and len(set(texts)) == 1:
        return f"in each sub-model {texts[0]}"
    runs = []
    for text, group in itertools.groupby(range(len(texts)), lambda part: texts[part]):
        parts = list(group)
        span = f"{parts[0]}" if len(parts) == 1 else f"{parts[0]} to {parts[-1]}"
        runs.append(f"in {span} {text}")
    return ", ".join(runs).replace("in ", "in sub-model ", 1)


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


class _Uses:
    """Which values an op uses, and which is the last op to use its own."""

    def __init__(self, uses: Sequence[Sequence[int]]) -> None:
        self.of = uses
        self.last = {value: number for number, values in enumerate(uses) for value in values}


def _module(path: tuple[str, ...], leaves: Sequence[Box], uses: _Uses) -> Box:
    """The box of a module; that of its only child where it has one, unless it is the model."""
    depth = len(path)
    children: list[Box] = []
    parts = [tuple(leaf.path.split(".")) if leaf.path else () for leaf in leaves]
    for inner, group in itertools.groupby(range(len(leaves)), lambda i: parts[i][: depth + 1]):
        inside = [leaves[i] for i in group]
        children += inside if len(inner) == depth else [_module(inner, inside, uses)]
    if path and len(leaves) == 1 and parts[0] == path:
        return replace(leaves[0], role="op", name=path[-1], note=leaves[0].name)
    children = _gathered(".".join(path), children, uses)
    if path and len(children) == 1:
        return children[0]
    return _around("module", ".".join(path), path[-1] if path else "", children, uses)


def _around(role: Role, path: str, name: str, children: Sequence[Box], uses: _Uses, note: str = "") -> Box:
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
        details=(path, note, *lines, *_counts(parameters, held)),
        children=tuple(children),
        nets=_nets(children, uses),
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


def _nets(children: Sequence[Box], uses: _Uses) -> tuple[Net, ...]:
    """The values that come in, go between children, or go out, in the order of the ops that give them."""
    first, last = children[0].first, children[-1].last
    owner = {number: i for i, child in enumerate(children) for number in range(child.first, child.last + 1)}
    ends: dict[int, dict[int, None]] = {}
    for number in range(first, last + 1):
        for value in uses.of[number]:
            if owner.get(value) != owner[number]:
                ends.setdefault(value, {})[owner[number]] = None
    outside = {value for value in owner if uses.last.get(value, last) > last}
    return tuple(
        Net(value, owner.get(value), tuple(sorted(ends.get(value, ()))), value in outside)
        for value in sorted(ends.keys() | outside)
    )


# Modules that are alike


def _gathered(path: str, children: Sequence[Box], uses: _Uses) -> list[Box]:
    """Runs of modules that are alike in one box each."""
    result: list[Box] = []
    keys = [_likeness(child, uses) for child in children]
    for key, group in itertools.groupby(range(len(children)), lambda i: keys[i]):
        run = [children[i] for i in group]
        if key is None or len(run) < ALIKE:
            result += run
        else:
            box = _around("alike", path, "", run, uses, f"{len(run)} alike")
            title = f"{run[0].path} to {run[-1].path}"
            result.append(replace(box, path=run[0].path, details=(title, *box.details[1:])))
    return result


def _likeness(box: Box, uses: _Uses) -> Any:
    """What is equal for modules that do the same with other weights; None for what is no module."""
    if not box.children:
        return None
    start = len(box.path)
    rows = []
    for leaf in box.boxes():
        if not leaf.children:
            inside = tuple(
                leaf.first - value if value >= box.first else None for value in uses.of[leaf.first]
            )
            state = leaf.parameters, leaf.held
            rows.append((leaf.path[start:], leaf.name, leaf.note, leaf.shape, leaf.bands, state, inside))
    # The name of a module of one op is its number in a list, which is not what makes it another.
    return tuple((row[0], row[2] or row[1], *row[2:]) for row in rows)
