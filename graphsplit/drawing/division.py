"""How the results and parameters of a program belong to its parts, as a figure shows it."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from torch import fx

from graphsplit.analysis import Analysis
from graphsplit.analysis.kinds import Kind, layouts_of
from graphsplit.program import Program, StateEntry

Look = Literal["split", "apart", "own", "mean", "common", "group", "critic"]

LOOKS: dict[Look, str] = {
    "split": "each sub-model has a slice",
    "apart": "each sub-model has a slice; a merge computes the op once for each of them",
    "own": "each sub-model has a value of its own",
    "mean": "the mean over the sub-models",
    "common": "the same in all sub-models",
    "group": "a layer group computes it",
    "critic": "a local critic computes it, which trains the group of the same number",
}
"""What a result can be to the parts, in the order in which a box shows it."""

Shapes = Sequence[tuple[int, ...]]


class Division(ABC):
    """A model's parts.

    Attributes:
        part: What one of them is called.
        title: What all are called, and how they were made.
        held: Number of scalars in the parameters of each.
    """

    part: str
    title: str
    held: tuple[int, ...]

    @property
    def k(self) -> int:
        """Number of parts."""
        return len(self.held)

    @abstractmethod
    def look(self, node: fx.Node) -> Look:
        """What the result of an op is to the parts."""

    @abstractmethod
    def shares(self, node: fx.Node) -> tuple[float, ...]:
        """How much of the result each part has; one in all."""

    def local_shapes(self, node: fx.Node) -> list[Shapes | None]:
        """For each result its shapes in the parts where they have slices of it."""
        return []

    @abstractmethod
    def state(self, entry: StateEntry, node: fx.Node) -> tuple[tuple[int, ...], str]:
        """How many scalars each part has of a state tensor that ``node`` uses first; and words."""

    def each(self, texts: Sequence[str]) -> str:
        """``in sub-models 0 to 2 a, in 3 b`` for a value of each part."""
        if len(texts) > 1 and len(set(texts)) == 1:
            return f"in each {self.part} {texts[0]}"
        runs = []
        for text, group in itertools.groupby(range(len(texts)), lambda number: texts[number]):
            numbers = list(group)
            span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
            runs.append(f"in {span} {text}")
        return ", ".join(runs).replace("in ", f"in {self.part} ", 1)

    def counts(self, held: Sequence[int]) -> str:
        """Words for the number of parameters in each part."""
        return self.each([f"{count:,}" for count in held])


class ByWidth(Division):
    """Sub-models that have slices."""

    part = "sub-model"

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._plans = {plan.name: plan for plan in analysis.plan.state}
        self.held = analysis.plan.parameter_counts()
        self.title = f"divided by width into {analysis.k} sub-models"

    def look(self, node: fx.Node) -> Look:
        """By its kind."""
        kinds = self._analysis.kinds
        if kinds.kind[node] is Kind.SPLIT and node in kinds.apart:
            return "apart"
        return _LOOK_OF[kinds.kind[node]]

    def shares(self, node: fx.Node) -> tuple[float, ...]:
        """By the sizes of the slices."""
        sizes = [1.0] * self.k
        active = next((x for x in layouts_of(self._analysis.kinds, node) if x.active), None)
        if active is not None:
            sizes = [float(np.prod(active.local_shape(part))) for part in range(self.k)]
        total = sum(sizes) or 1.0
        return tuple(size / total for size in sizes)

    def local_shapes(self, node: fx.Node) -> list[Shapes | None]:
        """By the layouts."""
        return [
            [layout.local_shape(part) for part in range(self.k)] if layout.active else None
            for layout in layouts_of(self._analysis.kinds, node)
        ]

    def state(self, entry: StateEntry, node: fx.Node) -> tuple[tuple[int, ...], str]:
        """By the plan."""
        plan = self._plans[entry.name]
        shapes = [plan.local_shape(part) for part in range(self.k)]
        words = ""
        if any(cut is not None for cut in plan.cuts):
            words = self.each([str(list(shape)) for shape in shapes])
        elif plan.merge == "stack":
            words = "a copy of its own in each sub-model"
        return tuple(int(np.prod(shape, dtype=np.int64)) for shape in shapes), words


_LOOK_OF: dict[Kind, Look] = {
    Kind.SPLIT: "split", Kind.OWN: "own", Kind.MEAN: "mean", Kind.COMMON: "common"
}  # fmt: skip


class ByDepth(Division):
    """Layer groups with their critics; each op is in one of them."""

    part = "group"

    def __init__(self, program: Program, owners: Mapping[fx.Node, tuple[int, bool]], n: int) -> None:
        self._owners = owners
        held: list[dict[str, int]] = [{} for _ in range(n)]
        for node, (group, _) in owners.items():
            for operand in node.all_input_nodes:
                entry = program.state.get(str(operand.target)) if operand.op == "get_attr" else None
                if entry is not None and entry.kind == "parameter":
                    held[group][entry.name] = entry.tensor.numel()
        self.held = tuple(sum(counts.values()) for counts in held)
        critics = any(of_critic for _, of_critic in owners.values())
        self.title = f"divided by depth into {n} layer groups" + (" with local critics" if critics else "")

    def look(self, node: fx.Node) -> Look:
        """By who computes it."""
        return "critic" if self._owners[node][1] else "group"

    def shares(self, node: fx.Node) -> tuple[float, ...]:
        """All of it is one group's."""
        return tuple(float(number == self._owners[node][0]) for number in range(self.k))

    def counts(self, held: Sequence[int]) -> str:
        """Only those that there are."""
        return ", ".join(f"{count:,} in group {number}" for number, count in enumerate(held) if count)

    def state(self, entry: StateEntry, node: fx.Node) -> tuple[tuple[int, ...], str]:
        """All of it is the group's that uses it first."""
        owner = self._owners[node][0]
        return tuple(entry.tensor.numel() * (number == owner) for number in range(self.k)), ""
