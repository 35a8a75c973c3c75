"""Make a model wider without changing what it computes.

Before::

    h = linear(x, w[8, 3]); y = linear(h, v[2, 8])

After, for a factor of 2::

    h = linear(x, w[16, 3]); y = linear(h, v[2, 16])

where every row of ``w`` stands twice, and every column of ``v`` stands twice, divided by 2. This is
Net2WiderNet (Chen, Goodfellow & Shlens, arXiv 1511.05641) on the units that inference finds: in place of
neurons and filters also heads, groups, and channels of residual streams, in every tensor that they are
coupled in.

Widening is `partition` the other way about: the new program is a sub-model that holds some units several
times, so that the same lowering makes its graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from graphsplit.analysis import Analysis
from graphsplit.analysis.assignment import Assignment, assign
from graphsplit.analysis.inference import Inference, infer, state_factors
from graphsplit.analysis.kinds import classify
from graphsplit.analysis.layout import Cut, Indices, Layout, Layouts
from graphsplit.analysis.units import Factors, Ids, varying
from graphsplit.builder import GraphBuilder
from graphsplit.errors import PartitionError, UnsupportedError
from graphsplit.initialization import fan_in_dims
from graphsplit.passes.base import Pass, PassResult, Programs
from graphsplit.passes.partition import extract_graph
from graphsplit.plan import PartitionPlan
from graphsplit.program import Program, StateEntry, op_name, source_of

Copies = NDArray[np.int64]


@dataclass(frozen=True)
class Widened:
    """A wider program.

    Attributes:
        program: It computes what the given one does.
        axes: Widened axes by name: units before and after.
        kept: Axes that keep their width, by name, with the reason.
    """

    program: Program
    axes: Mapping[str, tuple[int, int]]
    kept: Mapping[str, str]


def widen(program: Program, factor: float = 2.0, *, noise: float = 0.0, seed: int = 0) -> Widened:
    """Give every axis of units ``factor`` times as many.

    Each unit is copied as often as the next, up to one; who gets one more is drawn. An axis over which an op
    mixes values otherwise than by a weighted sum (layer norm over it, a softmax, a maximum) would compute
    something else and keeps its width.

    Args:
        program: A traced model; it is left as it is.
        factor: More than 1.
        noise: Standard deviation of normal noise on what belongs to a copy (the first stays as it is), in
            units of that of the tensor: copies then learn different things. The function changes a little.
        seed: Of the draws.

    Raises:
        PartitionError: The factor is out of range, or no axis can be widened; the message says why.
        UnsupportedError: An op has no wider form.
    """
    if not (math.isfinite(factor) and factor > 1):
        raise PartitionError(f"the factor is {factor!r}, expected a number greater than 1")
    if not (math.isfinite(noise) and noise >= 0):
        raise PartitionError(f"the noise is {noise!r}, expected a number of at least 0")
    inference = infer(program, 1)
    assignment = _straight(inference)
    kept = _kept(inference, assignment)
    copies, axes = _copies(assignment, kept, factor, np.random.default_rng(seed))
    names = {assignment.axes[number].name: reason for number, reason in kept.items()}
    if not axes:
        reasons = [f"{name} {reason}" for name, reason in names.items()]
        if len(kept) < len(assignment.axes):
            reasons.append(f"a factor of {factor} adds no unit to any axis")
        raise PartitionError(
            f"there is nothing to widen: {reasons[0] if reasons else 'every unit reaches an output'}",
            hint="widen a model that has a layer whose units meet in weighted sums alone",
        )
    layouts = _WideLayouts(assignment, copies)
    analysis = Analysis(
        program, 1, inference, assignment, layouts, classify(inference, layouts),
        PartitionPlan(1, program.name, (), ()), frozenset(), (),
    )  # fmt: skip
    constants: dict[str, StateEntry] = {}
    graphs = tuple(
        extract_graph(analysis, graph, 0, GraphBuilder(constants, program.state)).graph
        for graph in program.graphs
    )
    scaled = _scaled_dims(inference)
    generator = torch.Generator().manual_seed(seed)
    state = dict(constants)
    for name, entry in program.state.items():
        state[name] = entry
        if name in inference.own:
            tensor = _wide_state(
                inference, layouts, copies, entry, scaled.get(name, frozenset()), noise, generator
            )
            state[name] = replace(entry, tensor=tensor)
    sizes = ", ".join(f"{name} {before} to {after}" for name, (before, after) in axes.items())
    notes = (*program.notes, f"widened: {sizes}")
    return Widened(replace(program, graphs=graphs, state=state, notes=notes), axes, names)


# -- which units, how often ----------------------------------------------------------------------------------


def _straight(inference: Inference) -> Assignment:
    """Units that vary along one dimension of every tensor: copies can then be put beside each other there.

    Where they vary along several (a view that takes channels apart), those of the inner ones are tied.
    """
    while True:
        assignment = assign(inference)
        crooked = [ids for ids in _all_factors(inference) if len(_lines(ids, assignment)) > 1]
        if not crooked:
            return assignment
        for ids in crooked:
            inference.units.tie(ids, _lines(ids, assignment)[1:])


def _all_factors(inference: Inference) -> Iterator[Ids]:
    for facts in inference.facts.values():
        for factors in [facts.outputs] if isinstance(facts.outputs, tuple) else facts.outputs:
            yield from factors
        for factors in facts.expects.values():
            yield from factors
        for ids, _ in (*facts.mixes, *facts.contracts):
            yield ids


def _lines(ids: Ids, assignment: Assignment) -> list[int]:
    """Dimensions along which the unit changes."""
    units = assignment.unit[ids]
    return [dim for dim in varying(ids) if (units != units.take([0], dim)).any()]


def _kept(inference: Inference, assignment: Assignment) -> dict[int, str]:
    """Axes that cannot be widened, with the reason."""
    kept: dict[int, str] = {}

    def keep(ids: NDArray[np.int64], reason: str) -> None:
        for number in np.unique(assignment.axis[ids]).tolist():
            if number >= 0:
                kept.setdefault(number, reason)

    for number, axis in enumerate(assignment.axes):
        if axis.size == 1:
            kept[number] = "is one unit"
    for node, facts in inference.facts.items():
        place = f"{op_name(node)} ({source_of(node)})"
        for ids, dims in facts.mixes:
            if set(dims) & set(_lines(ids, assignment)):
                keep(ids, f"is mixed by {place} otherwise than in a weighted sum")
        covered = np.unique(
            np.concatenate(
                [np.zeros(0, np.int64)]
                + [assignment.unit[_line(inference, name, dim)] for name, dim in _sums(inference, node)]
            )
        )
        for ids, dims in facts.contracts:
            summed = set(dims) & set(_lines(ids, assignment))
            if summed and not np.isin(assignment.unit[ids], covered).all():
                keep(ids, f"is summed over by {place} against a weight that is computed")
    for name, uses in _uses(inference).items():
        for dim in frozenset[int]().union(*uses) - uses[0].intersection(*uses):
            keep(_line(inference, name, dim), f"is both inside and outside of the sums with {name}")
    return kept


def _sums(inference: Inference, node: fx.Node) -> list[tuple[str, int]]:
    """Dimensions of state tensors over which a node sums, and that have units."""
    found = []
    grouped = op_name(node).startswith("conv") and len(node.args) > 6 and node.args[6] != 1
    for operand in node.all_input_nodes:
        if operand.op != "get_attr" or str(operand.target) not in inference.own:
            continue
        for dim in fan_in_dims(operand, node):
            # A transposed convolution in groups lists the groups along the dimension that it sums over.
            inside = not (grouped and dim == 0)
            if inside and _line(inference, str(operand.target), dim).any():
                found.append((str(operand.target), dim))
    return found


def _uses(inference: Inference) -> dict[str, list[frozenset[int]]]:
    """For each state tensor the dimensions that each of its uses sums over."""
    uses: dict[str, list[frozenset[int]]] = {}
    for node in inference.program.nodes():
        if node.op == "get_attr" and str(node.target) in inference.own:
            name = str(node.target)
            for user in node.users:
                dims = frozenset(dim for found, dim in _sums(inference, user) if found == name)
                uses.setdefault(name, []).append(dims)
    return uses


def _scaled_dims(inference: Inference) -> dict[str, frozenset[int]]:
    """Dimensions of state tensors that all uses sum over."""
    return {name: frozenset.intersection(*uses) for name, uses in _uses(inference).items()}


def _line(inference: Inference, name: str, dim: int) -> Ids:
    """The ids along one dimension of a state tensor."""
    ids = inference.state[name][dim]
    assert ids is not None
    return ids


def _copies(
    assignment: Assignment, kept: Mapping[int, str], factor: float, random: np.random.Generator
) -> tuple[Copies, dict[str, tuple[int, int]]]:
    """How often each unit stands in the wider model, and the axes that grow."""
    copies = np.ones(int(assignment.unit.max()) + 1, np.int64)
    axes: dict[str, tuple[int, int]] = {}
    for number, axis in enumerate(assignment.axes):
        wanted = round(axis.size * factor)
        if number in kept or wanted <= axis.size:
            continue
        units = np.unique(assignment.unit[assignment.axis == number])
        copies[units] = wanted // axis.size
        copies[random.choice(units, wanted % axis.size, replace=False)] += 1
        axes[axis.name] = (axis.size, wanted)
    return copies, axes


# -- tensors -------------------------------------------------------------------------------------------------


class _WideLayouts(Layouts):
    """Layouts of a "sub-model" in which units stand several times: indices repeat."""

    def __init__(self, assignment: Assignment, copies: Copies) -> None:
        super().__init__(assignment, 1)
        self.copies = copies

    def _make(self, shape: tuple[int, ...], factors: Factors) -> Layout:
        cuts: list[Cut | None] = [None] * len(shape)
        active = 0
        for ids in factors:
            units = self.assignment.unit[ids]
            if (self.copies[units] == 1).all():
                continue
            (dim,) = _lines(ids, self.assignment)
            if cuts[dim] is not None:
                raise UnsupportedError(
                    f"two kinds of units stand in one dimension of a tensor of shape {shape}",
                    hint="this model cannot be widened yet",
                )
            line = np.moveaxis(units, dim, 0).reshape(ids.shape[dim], -1)[:, 0]
            cuts[dim] = (_repeated(line, self.copies)[0],)
            active += 1
        return Layout(shape, tuple(cuts), True, active)


def _repeated(line: NDArray[np.int32], copies: Copies) -> tuple[Indices, Indices]:
    """Indices of a dimension with every run of one unit as often as the unit is there.

    A run is copied as a whole, so that a view that takes a unit's indices apart (the dimensions of a head)
    finds the copies beside each other.

    Args:
        line: The unit of every index.
        copies: Of every unit.

    Returns:
        The index, and the number of the copy, for every place of the wider dimension.
    """
    starts = np.flatnonzero(np.diff(line, prepend=-1))
    stops = np.append(starts[1:], line.size)
    indices, numbers = [], []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        count = int(copies[line[start]])
        indices.append(np.tile(np.arange(start, stop), count))
        numbers.append(np.repeat(np.arange(count), stop - start))
    return np.concatenate(indices), np.concatenate(numbers)


def _wide_state(
    inference: Inference,
    layouts: _WideLayouts,
    copies: Copies,
    entry: StateEntry,
    scaled: frozenset[int],
    noise: float,
    generator: torch.Generator,
) -> Tensor:
    """A state tensor of the wider model."""
    shape = tuple(entry.tensor.shape)
    layout = layouts.of(shape, state_factors(inference.state[entry.name], shape))
    if not layout.active:
        return entry.tensor
    tensor = entry.tensor.detach()
    is_copy = torch.zeros((1,) * len(shape), dtype=torch.bool)
    for dim, cut in enumerate(layout.cuts):
        if cut is None:
            continue
        line = layouts.assignment.unit[_line(inference, entry.name, dim)]
        index, number = _repeated(line, copies)
        tensor = tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))
        along = [-1 if place == dim else 1 for place in range(len(shape))]
        if dim in scaled:
            often = torch.from_numpy(copies[line[index]]).to(tensor.device)
            tensor = tensor / often.to(tensor.dtype).reshape(along)
        is_copy = is_copy | torch.from_numpy(number > 0).reshape(along)
    if entry.kind != "parameter":
        return tensor
    if noise and tensor.numel() > 1:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        drawn = (drawn * is_copy * noise).to(tensor) * tensor.std()
        tensor = tensor + drawn
    return tensor.requires_grad_(entry.tensor.requires_grad)


@dataclass(frozen=True)
class Widen(Pass):
    """``widen(factor=2, noise=0.0, seed=0)``: one program to a wider one with the same function."""

    name: ClassVar[str] = "widen"
    factor: float = 2.0
    noise: float = 0.0
    seed: int = 0

    def run(self, programs: Programs) -> PassResult:
        """Widen the one program there is."""
        found = widen(programs.single(), self.factor, noise=self.noise, seed=self.seed)
        reason = "; ".join(f"{name} {why}" for name, why in found.kept.items())
        return PassResult(Programs((found.program,)), modified=True, reason=reason)
