"""Cut a program by depth into layer groups, and put groups together again.

Before::

    h = relu(linear(x, w)); y = linear(h, v)

After, as two programs, and back::

    (x) -> h = relu(linear(x, w))
    (h) -> y = linear(h, v)

Each group takes everything that crosses the cut before it and gives everything that crosses the cut behind
it; what skips a group passes through it. Nodes keep their order, so that random numbers are drawn as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphsplit.builder import aten
from graphsplit.depth.cuts import Cuts, cut_at, cut_evenly
from graphsplit.depth.line import Line
from graphsplit.depth.plan import MEASURES, TIED, Measure, Tied
from graphsplit.errors import InternalError, PartitionError, PlanError
from graphsplit.graphs import copy_graph, drop_dead, int_arg, node_arg
from graphsplit.passes.base import Pass, PassResult, Programs
from graphsplit.passes.unstack import unstack
from graphsplit.program import Dim, Program, StateEntry, meta_of, source_of
from graphsplit.signature import Outputs, Signature


def extract_group(cuts: Cuts, group: int) -> Program:
    """A layer group as a program; its state is the full program's, not a copy."""
    program = cuts.program
    graphs = tuple(_Group(cuts, line, group).build() for line in range(len(cuts.lines)))
    held = {name for name, groups in cuts.holders.items() if group in groups}
    state = {name: _own(cuts, entry, group) for name, entry in program.state.items() if name in held}
    known = {name for entry in state.values() for name in (entry.name, *entry.aliases)}
    return replace(
        program,
        name=f"{program.name}.group{group}",
        graphs=graphs,
        state=state,
        signature=_signature(cuts, group),
        names=tuple(name for name in program.names if name in known),
    )


def _own(cuts: Cuts, entry: StateEntry, group: int) -> StateEntry:
    """A parameter that several groups hold is copied for all but the first."""
    if entry.kind == "parameter" and group != cuts.holders[entry.name][0]:
        copied = entry.tensor.detach().clone().requires_grad_(entry.tensor.requires_grad)
        return replace(entry, tensor=copied, aliases=())
    return entry


def _signature(cuts: Cuts, group: int) -> Signature:
    full = cuts.program.signature
    changed: dict[str, Any] = {}
    if group > 0:
        crossing = cuts.crossing(0, group - 1)
        count = len(crossing)
        changed["inputs"] = tuple(meta_of(node) for node in crossing)
        changed["input_names"] = tuple(node.name for node in crossing)
        changed["in_spec"] = pytree.tree_structure((tuple(range(count)), {}))
        changed["in_leaves"] = tuple(range(count))
        changed |= {"parameter_names": (), "defaults": ()}
    if group < cuts.n - 1:
        changed["outputs"] = tuple(
            _crossing_outputs(cuts.crossing(line, group)) for line in range(len(cuts.lines))
        )
    return replace(full, **changed)


def _crossing_outputs(crossing: Sequence[fx.Node]) -> Outputs:
    count = len(crossing)
    spec = pytree.tree_structure(0 if count == 1 else tuple(range(count)))
    return Outputs(spec, tuple(range(count)), tuple(node.name for node in crossing))


class _Group:
    """The graph of one group under construction."""

    def __init__(self, cuts: Cuts, number: int, group: int) -> None:
        self.line: Line = cuts.lines[number]
        self.places = cuts.places(number, group)
        self.first, self.last = group == 0, group == cuts.n - 1
        self.given = cuts.crossing(number, group - 1) if group else []
        self.wanted = [] if self.last else cuts.crossing(number, group)
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[str, tuple[fx.Node, int]] = {}

    def build(self) -> fx.Graph:
        """Inputs, the placed nodes with the free ones that they need, writes of buffers, outputs."""
        for node in self.line.graph.find_nodes(op="placeholder") if self.first else self.given:
            self._input(node)
        for place in self.places:
            node = self.line.placed[place]
            self.values[node] = self._copy(node)
        for node, place in self.line.writes.items():
            if place in self.places:
                self._copy(node)
        (output,) = self.line.graph.find_nodes(op="output")
        wanted = output.args[0] if self.last else tuple(self.wanted)
        results = fx.map_arg(wanted, self._value)
        self.graph.output(results).meta.update(output.meta)
        drop_dead(self.graph)
        return self.graph

    def _input(self, node: fx.Node) -> None:
        placeholder = self.graph.placeholder(node.name)
        placeholder.target = placeholder.name
        placeholder.meta.update(node.meta)
        self.values[node] = placeholder
        for dim, size in enumerate(meta_of(placeholder).dims):
            if size.symbol is not None:
                self._sizes.setdefault(size.symbol, (placeholder, dim))

    def _copy(self, node: fx.Node) -> fx.Node:
        return self.graph.node_copy(node, self._value)

    def _value(self, node: fx.Node) -> Any:
        """What stands for a node here; state and free nodes come when they are needed."""
        if node not in self.values:
            if node.op == "call_function" and node.target is aten.sym_size.int:
                return self._size(node)
            if node.op != "get_attr" and not self.line.is_free(node):
                raise InternalError(f"{node.name} is used in a group that it does not reach")
            self.values[node] = self._copy(node)
        return self.values[node]

    def _size(self, node: fx.Node) -> Any:
        """The size of a tensor that may be in another group, read from one that is here."""
        dim = node.meta["value"]
        assert isinstance(dim, Dim)
        if dim.symbol is None:
            return dim.hint
        if dim.symbol in self._sizes:
            tensor, position = self._sizes[dim.symbol]
        else:
            tensor, position = self.values[node_arg(node)], int_arg(node, 1)
        found = self.graph.call_function(aten.sym_size.int, (tensor, position))
        found.meta.update(node.meta)
        self.values[node] = found
        return found


def join(programs: Sequence[Program], full: Program) -> Program:
    """One program that runs layer groups one after the other.

    Args:
        programs: The groups, in order, with the values that they have now; the first few of them make a
            program that ends with what they hand on.
        full: The program that they were cut from, for its name, signature and order of names.

    Raises:
        PlanError: One does not take what the one before it gives.
    """
    _check_chain(programs, full)
    state, renamed = _joined_state(programs, full)
    graphs = tuple(
        _joined_graph([program.graphs[number] for program in programs], renamed)
        for number in range(len(full.graphs))
    )
    known = {name for entry in state.values() for name in (entry.name, *entry.aliases)}
    names = dict.fromkeys((*full.names, *(name for names in renamed for name in names.values())))
    return replace(
        full,
        graphs=graphs,
        state=state,
        signature=replace(full.signature, outputs=programs[-1].signature.outputs),
        names=tuple(name for name in names if name in known),
    )


def join_head(prefix: Program, head: Program, position: int, name: str) -> Program:
    """A program that runs another one on one of its outputs, and gives what that gives.

    Args:
        prefix: Runs first.
        head: Takes one tensor.
        position: Which output of ``prefix`` it takes.
        name: Stands before the names of the head's state.
    """
    head = _under(head, name)
    graphs = []
    for mode in ("train", "eval") if len(prefix.graphs) + len(head.graphs) > 2 else ("eval",):
        graphs.append(_joined_graph([prefix.graph(mode), head.graph(mode)], [{}, {}], [position]))
    outputs = tuple(
        head.signature.outputs[min(number, len(head.graphs) - 1)] for number in range(len(graphs))
    )
    return replace(
        prefix,
        graphs=tuple(graphs),
        state={**prefix.state, **head.state},
        signature=replace(prefix.signature, outputs=outputs),
        names=(*prefix.names, *head.names),
    )


def join_exits(
    programs: Sequence[Program], heads: Sequence[Program], mains: Sequence[int], full: Program
) -> tuple[Program, dict[fx.Node, tuple[int, bool]]]:
    """The model in eval mode with every head on what its group hands on, as one program with all outputs.

    Args:
        programs: The groups, in order.
        heads: One for each group but the last, or none.
        mains: Which of a group's outputs its head takes.
        full: See `join`.

    Returns:
        The program, which gives the model's outputs and then those of the heads, and for each of its nodes
        the group that it belongs to, and whether it is the head's.
    """
    whole = join(programs, full)
    _, renamed = _joined_state(programs, full)
    heads = [_under(head, f"critic_{number}") for number, head in enumerate(heads)]
    joined = _Joined()
    handed: list[Any] = []
    scores: list[Any] = []
    owners: dict[fx.Node, tuple[int, bool]] = {}
    for number, program in enumerate(programs):
        handed = joined.add(program.graph(), handed if number else None, renamed[number])
        owners |= {node: (number, False) for node in joined.added.values() if node not in owners}
        if number < len(heads):
            scores += joined.add(heads[number].graph(), [handed[mains[number]]], {})
            owners |= {node: (number, True) for node in joined.added.values() if node not in owners}
    outputs = full.signature.outputs[-1]
    names = (*outputs.names, *(f"scores of critic {number}" for number in range(len(heads))))
    leaves = tuple(range(len(handed) + len(scores)))
    found = replace(
        whole,
        graphs=(joined.close([*handed, *scores]),),
        state={**whole.state, **{name: entry for head in heads for name, entry in head.state.items()}},
        signature=replace(whole.signature, outputs=(Outputs(pytree.tree_structure(leaves), leaves, names),)),
        names=(*whole.names, *(name for head in heads for name in head.names)),
    )
    return found, owners


def _under(program: Program, name: str) -> Program:
    """The program with a name before those of its state and of its modules."""
    state = {
        f"{name}.{entry.name}": replace(
            entry, name=f"{name}.{entry.name}", aliases=tuple(f"{name}.{alias}" for alias in entry.aliases)
        )
        for entry in program.state.values()
    }
    graphs = []
    for graph in program.graphs:
        copied = copy_graph(graph)
        for node in copied.nodes:
            if node.op == "get_attr":
                node.target = f"{name}.{node.target}"
            source = source_of(node)
            node.meta["source"] = replace(source, module=f"{name}.{source.module}".rstrip("."))
        graphs.append(copied)
    names = tuple(f"{name}.{old}" for old in program.names)
    return replace(program, graphs=tuple(graphs), state=state, names=names)


def _check_chain(programs: Sequence[Program], full: Program) -> None:
    for number, program in enumerate(programs):
        if len(program.graphs) != len(full.graphs):
            raise PlanError(f"group {number} is of another model")
        given = programs[number - 1].signature.outputs[0].names if number else full.signature.input_names
        if program.signature.input_names != tuple(given):
            raise PlanError(
                f"group {number} does not take what stands before it gives", hint="give the groups in order"
            )


def _joined_state(
    programs: Sequence[Program], full: Program
) -> tuple[dict[str, StateEntry], list[dict[str, str]]]:
    """The state of all groups, and for each group the names that its state has there."""
    state: dict[str, StateEntry] = {}
    renamed: list[dict[str, str]] = []
    for number, program in enumerate(programs):
        names = {}
        for name, entry in program.state.items():
            names[name] = name
            known = state.get(name)
            if known is None:
                state[name] = entry
            elif entry.kind == "parameter" and not _same(known.tensor, entry.tensor):
                names[name] = _free_name(state, full.state[name], number)
                aliases = tuple(alias for alias in known.aliases if alias != names[name])
                state[name] = replace(known, aliases=aliases)
                state[names[name]] = replace(entry, name=names[name], aliases=())
        renamed.append(names)
    return state, renamed


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (not a.is_meta and a.data_ptr() == b.data_ptr() and a.shape == b.shape)


def _free_name(state: dict[str, StateEntry], entry: StateEntry, group: int) -> str:
    """For a copy of a tied weight: another of its names, or one made of the number of the group."""
    taken = set(state)
    return next((alias for alias in entry.aliases if alias not in taken), f"{entry.name}_group{group}")


def _joined_graph(
    graphs: Sequence[fx.Graph], renamed: Sequence[dict[str, str]], taken: Sequence[int] | None = None
) -> fx.Graph:
    """Graphs one after the other; ``taken`` are the outputs that the next one takes, by default all."""
    joined = _Joined()
    handed: list[Any] = []
    for number, graph in enumerate(graphs):
        given = handed if taken is None or not number else [handed[position] for position in taken]
        handed = joined.add(graph, given if number else None, renamed[number])
    return joined.close(handed)


class _Joined:
    """A graph that is put together of others.

    Attributes:
        added: What stands for the nodes of the graph that was added last.
    """

    def __init__(self) -> None:
        self._graph = fx.Graph()
        self._states: dict[str, fx.Node] = {}
        self._writes: list[tuple[fx.Node, dict[fx.Node, Any]]] = []
        self._closing: dict[str, Any] = {}
        self.added: dict[fx.Node, Any] = {}

    def add(self, graph: fx.Graph, given: Sequence[Any] | None, renamed: Mapping[str, str]) -> list[Any]:
        """Let a graph run next; returns its outputs.

        Args:
            graph: What to add; it is not changed.
            given: What its inputs are; None keeps them as inputs.
            renamed: New names of its state.
        """
        self.added = values = {}
        inputs = None if given is None else iter(given)
        handed: list[Any] = []
        for node in graph.nodes:
            if node.op == "placeholder" and inputs is not None:
                values[node] = next(inputs)
            elif node.op == "get_attr":
                name = renamed.get(str(node.target), str(node.target))
                if name not in self._states:
                    self._states[name] = self._graph.node_copy(node)
                    self._states[name].target = name
                values[node] = self._states[name]
            elif node.target is aten.copy_.default:
                self._writes.append((node, values))
            elif node.op == "output":
                handed = list(fx.map_arg(node.args[0], values.__getitem__))
                self._closing = node.meta
            else:
                values[node] = self._graph.node_copy(node, values.__getitem__)
        return handed

    def close(self, outputs: Sequence[Any]) -> fx.Graph:
        """The graph, with writes of buffers at its end."""
        for write, values in self._writes:
            self._graph.node_copy(write, values.__getitem__)
        self._graph.output(tuple(outputs)).meta.update(self._closing)
        drop_dead(self._graph)
        return self._graph


@dataclass(frozen=True)
class LayerGroups(Pass):
    """``layer-groups(n=4)``: one program to ``n`` that run one after the other."""

    name: ClassVar[str] = "layer-groups"
    n: int = 2
    balance: Measure = "flops"
    at: tuple[str, ...] = ()
    tied: Tied = "refuse"

    def run(self, programs: Programs) -> PassResult:
        """Cut the one program there is."""
        cuts = divide(programs.single(), None if self.at else self.n, self.at, self.balance, self.tied)
        items = tuple(extract_group(cuts, group) for group in range(cuts.n))
        return PassResult(Programs(items, cuts=cuts), modified=cuts.n > 1)


@dataclass(frozen=True)
class Recompose(Pass):
    """``recompose``: the layer groups as one program again."""

    name: ClassVar[str] = "recompose"

    def run(self, programs: Programs) -> PassResult:
        """Join the groups that `LayerGroups` made."""
        if programs.cuts is None:
            raise PartitionError("there are no layer groups", hint="run layer-groups before recompose")
        return PassResult(Programs((join(programs.items, programs.cuts.program),)), modified=True)


def divide(
    program: Program,
    n: int | None,
    at: Sequence[str] = (),
    measure: Measure = "flops",
    tied: Tied = "refuse",
    *,
    inputs: Sequence[Tensor] | None = None,
    max_crossing: int | None = None,
    tolerance: float = 0.0,
) -> Cuts:
    """Choose the cuts of a program: before the modules ``at``, or into ``n`` balanced groups.

    Raises:
        PartitionError: The options do not fit together, or the program cannot be cut so.
    """
    if measure not in MEASURES:
        raise PartitionError(f"balance is {measure!r}", hint=f"give one of {', '.join(MEASURES)}")
    if tied not in TIED:
        raise PartitionError(f"tied is {tied!r}", hint="give 'refuse' or 'copy'")
    if at and n is not None and n != len(at) + 1:
        raise PartitionError(f"{len(at)} places make {len(at) + 1} groups, and n is {n}", hint="leave out n")
    program = unstack(program)

    def example() -> Sequence[Tensor]:
        if inputs is not None:
            return inputs
        return [meta.zeros() for meta in program.signature.inputs]

    if at:
        return cut_at(program, at, measure, tied, example)
    return cut_evenly(
        program, 2 if n is None else n, measure, tied, example, max_crossing=max_crossing, tolerance=tolerance
    )
