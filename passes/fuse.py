"""K programs of one architecture as one that does the work of all of them.

Before, for K = 2::

    y_0 = conv2d(x, w_0); z_0 = relu(y_0)
    y_1 = conv2d(x, w_1); z_1 = relu(y_1)

After::

    y = conv2d(x, cat([w_0, w_1])); z = relu(y)

Weights stand as the ops read them, outputs on a leading dimension of K. Random numbers are drawn for each
model by itself, running statistics are each model's own (horizontal fusion: HFTA, Wang et al., MLSys 2021).

Models may differ in numbers among the arguments of ops, as sub-models do that take their share of a value all
have: such an op runs once for each model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphsplit.builder import aten
from graphsplit.errors import PartitionError, PlanError, UnsupportedError
from graphsplit.fusion import rules as _rules  # noqa: F401  (registers the rules)
from graphsplit.fusion.cost import FusionCost, fusion_cost
from graphsplit.fusion.fuser import Fuser, Own
from graphsplit.fusion.placement import Placement, as_read
from graphsplit.graphs import node_arg
from graphsplit.passes.base import Pass, PassResult, Programs
from graphsplit.program import TRAINING, Program, StateEntry, TensorMeta, op_name, source_of


@dataclass(frozen=True)
class Fused:
    """A fused program, and how it came about.

    Attributes:
        program: All K models; every output has a leading dimension of K.
        singles: The program of each model. One stands for all where they differ in nothing but the values of
            parameters and buffers of floating point.
        k: Number of models.
        placements: How each state tensor of all models stands in one: buffers that are equal and never
            written once, most others as the ops read them.
        looped: How many ops of each name run once for each model.
        in_turn: Every op does, as fusing does not pay.
        cost: What was measured to find that out.
    """

    program: Program
    singles: tuple[Program, ...]
    k: int
    placements: Mapping[str, Placement]
    looped: Mapping[str, int]
    in_turn: bool = False
    cost: FusionCost | None = None


def fuse(programs: Sequence[Program], *, own_inputs: bool = False, in_turn: bool = False) -> Fused:
    """One program of K.

    Args:
        programs: They have the same ops on the same shapes, and values and numbers of their own.
        own_inputs: Every input has a leading dimension of K, one for each model; else all see the same.
        in_turn: Run every op once for each model: for where fusing does not pay.

    Raises:
        PartitionError: There are no programs.
        UnsupportedError: They are not of one architecture; the first difference is named.
    """
    if not programs:
        raise PartitionError("there are no models to fuse")
    first, k = programs[0], len(programs)
    own = _own_arguments(programs)
    written = {name for graph in first.graphs for name in _written(graph)}
    same = {name: name not in written and _is_same(programs, name) for name in first.state}
    constants: dict[str, StateEntry] = {}
    fusers = [Fuser(k, same, constants, found, in_turn=in_turn) for found in own]
    graphs = tuple(
        fuser.run(graph, own_inputs=own_inputs) for fuser, graph in zip(fusers, first.graphs, strict=True)
    )
    looped = {name: count for fuser in fusers for name, count in fuser.looped.items()}
    placements = {name: Placement("same" if shared else "stack") for name, shared in same.items()}
    placements |= as_read(graphs, [name for name, shared in same.items() if not shared], k)
    state = {
        name: replace(entry, tensor=together(placements[name], [p.state[name] for p in programs]))
        for name, entry in first.state.items()
    }
    signature = first.signature
    if own_inputs:
        inputs = tuple(map(fusers[0].stacked, signature.inputs))
        signature = replace(signature, inputs=inputs)
    fused = replace(
        first,
        name=f"{first.name}.fused{k}",
        graphs=graphs,
        state=state | constants,
        signature=signature,
    )
    values = all(_is_drawn(entry) or _is_same(programs, name) for name, entry in first.state.items())
    singles = (first,) if values and not any(own) else tuple(programs)
    return Fused(fused, singles, k, placements, looped, in_turn)


def fuse_where_it_pays(
    programs: Sequence[Program], *, own_inputs: bool = False, inputs: Sequence[Tensor] | None = None
) -> Fused:
    """One program of K: fused where that is measured to be faster, else with every op once for each model.

    Args:
        programs: See `fuse`.
        own_inputs: See `fuse`.
        inputs: Of one model, in order, to measure with; by default random ones of the traced sizes.

    Raises:
        PartitionError, UnsupportedError: See `fuse`.
        UserError: The models are on the meta device, which computes nothing.
    """
    fused = fuse(programs, own_inputs=own_inputs)
    cost = fusion_cost(programs, fused.program, inputs)
    if not cost.pays:
        fused = fuse(programs, own_inputs=own_inputs, in_turn=True)
    return replace(fused, cost=cost)


def together(placement: Placement, entries: Sequence[StateEntry]) -> Tensor:
    """The values of K models in one tensor."""
    tensor = placement.together([entry.tensor.detach() for entry in entries])
    return tensor.requires_grad_(entries[0].tensor.requires_grad)


def part_of(
    placements: Mapping[str, Placement], state: Mapping[str, Tensor], number: int, k: int
) -> dict[str, Tensor]:
    """State of one of K models, as views of that of all; for ``placements`` see `Fused`.

    Constants that fusing has added are no model's, and are left out.
    """
    return {
        name: placements[name].part(tensor, number, k) for name, tensor in state.items() if name in placements
    }


def _is_same(programs: Sequence[Program], name: str) -> bool:
    """One tensor serves all: of a buffer or constant whose values are equal."""
    first = programs[0].state[name]
    if first.kind == "parameter" or first.tensor.is_meta:
        return False
    return all(torch.equal(first.tensor, program.state[name].tensor) for program in programs[1:])


def _is_drawn(entry: StateEntry) -> bool:
    """Has the tensor values of any size? Indices and other constants have not."""
    return entry.kind != "constant" and entry.tensor.dtype.is_floating_point


def _written(graph: fx.Graph) -> set[str]:
    """State that the graph changes."""
    found = set()
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        found.add(str(node_arg(node).target))
    for norm in (aten.batch_norm.default, aten.instance_norm.default):
        for node in graph.find_nodes(op="call_function", target=norm):
            found |= {str(item.target) for item in node.args[3:5] if isinstance(item, fx.Node)}
    return found


def _own_arguments(programs: Sequence[Program]) -> list[Own]:
    """For each graph the arguments of nodes at which the programs differ in numbers.

    Raises:
        UnsupportedError: They are not of one architecture.
    """
    first = programs[0]
    own: list[dict[fx.Node, list[Any]]] = [{} for _ in first.graphs]
    for number, other in enumerate(programs[1:], start=1):
        _check_alike(first, other, number)
        for found, one, two in zip(own, first.graphs, other.graphs, strict=True):
            for node, given in _compared(one, two, number).items() if one is not two else ():
                found.setdefault(node, [(node.args, node.kwargs)] * len(programs))[number] = given
    return list(own)


_HINT = "fuse models of one class and one size; sub-models of uneven shares differ"


def _check_alike(first: Program, other: Program, number: int) -> None:
    """Raise where the state of two programs is not of one architecture."""
    if first.state.keys() != other.state.keys() or len(first.graphs) != len(other.graphs):
        lost = sorted(first.state.keys() ^ other.state.keys())
        raise UnsupportedError(
            f"model {number} is of another architecture than model 0"
            + (f": only one of them has {lost[0]}" if lost else ""),
            hint=_HINT,
        )
    for name, entry in first.state.items():
        found = other.state[name]
        if found.tensor.requires_grad != entry.tensor.requires_grad and entry.kind == "parameter":
            trained = number if found.tensor.requires_grad else 0
            raise UnsupportedError(
                f"{name} is trained in model {trained} and frozen in model {number - trained}",
                hint="freeze it in all models or in none",
            )
        if found.tensor.shape != entry.tensor.shape or found.tensor.dtype != entry.tensor.dtype:
            raise UnsupportedError(
                f"{name} is {_words(entry.tensor)} in model 0 and {_words(found.tensor)} in model {number}",
                hint=_HINT,
            )


def _words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _compared(one: fx.Graph, two: fx.Graph, number: int) -> dict[fx.Node, Any]:
    """Arguments of the second in nodes of the first, where they differ in numbers.

    Raises:
        UnsupportedError: They differ in more than that.
    """
    names: dict[fx.Node, fx.Node] = {}
    differing: dict[fx.Node, Any] = {}
    nodes = [list(one.nodes), list(two.nodes)]
    for a, b in zip(*nodes, strict=False):
        names[b] = a
        own, given = (a.args, a.kwargs), fx.map_arg((b.args, b.kwargs), names.__getitem__)
        state = a.op != "get_attr" or a.target == b.target or TRAINING in (a.target, b.target)
        if (a.op, op_name(a)) != (b.op, op_name(b)):
            raise UnsupportedError(
                f"model {number} runs {op_name(b)} where model 0 runs {op_name(a)}",
                where=str(source_of(a)),
                hint=_HINT,
            )
        if state and _equal(own, given):
            continue
        if not state or not _alike(own, given) or not _same_tensors(a, b):
            raise UnsupportedError(
                f"model {number} runs {op_name(b)} with other arguments than model 0",
                where=str(source_of(a)),
                hint=_HINT,
            )
        differing[a] = given
    if len(nodes[0]) != len(nodes[1]):
        raise UnsupportedError(
            f"model {number} has {len(nodes[1])} ops, and model 0 {len(nodes[0])}", hint=_HINT
        )
    return differing


def _equal(one: Any, two: Any) -> bool:
    """Equal arguments; no number equals no number."""
    first, spec = pytree.tree_flatten(one)
    second, other = pytree.tree_flatten(two)
    return spec == other and all(map(_is_equal, first, second))


def _is_equal(a: Any, b: Any) -> bool:
    return bool(a == b or (a != a and b != b))


def _alike(one: Any, two: Any) -> bool:
    """Arguments that are equal but for numbers: starts of slices, indices, sizes, factors."""
    first, spec = pytree.tree_flatten(one)
    second, other = pytree.tree_flatten(two)
    numbers = {int, float}  # a flag is none
    return spec == other and all(
        _is_equal(a, b) or {type(a), type(b)} <= numbers for a, b in zip(first, second, strict=True)
    )


def _same_tensors(a: fx.Node, b: fx.Node) -> bool:
    """Do two ops give tensors, of the same shapes and dtypes?"""
    value = a.meta.get("value")
    items = value if isinstance(value, tuple) else (value,)
    return value == b.meta.get("value") and all(isinstance(item, TensorMeta) for item in items)


@dataclass(frozen=True)
class Fuse(Pass):
    """``fuse``: the sub-models as one program, whose outputs have a leading dimension of K.

    With ``auto`` ops are measured, and run once for each sub-model where fusing is no faster.
    """

    name: ClassVar[str] = "fuse"
    own_inputs: bool = False
    auto: bool = False

    def run(self, programs: Programs) -> PassResult:
        """Fuse all there are."""
        if programs.cuts is not None:
            raise PlanError("layer groups run one after the other, and cannot be fused")
        make = fuse_where_it_pays if self.auto else fuse
        fused = make(programs.items, own_inputs=self.own_inputs)
        return PassResult(Programs((fused.program,)), modified=fused.k > 1)
