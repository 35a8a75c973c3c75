"""Is a division into sub-networks valid? Asked of the unit graph by networkx.

The unit graph has a vertex for each share of an axis (the units of one axis that one sub-model holds), one
for each value that a sub-model has without units of its own, one for each input and each output, and an edge
where one is computed from another. A sub-model is the sub-graph that its vertices induce together with inputs
and outputs. Section 2.2 of Miranda & Von Zuben (arXiv 1511.02954) asks five properties of it, checked by
`violations`.
"""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np
from torch import fx

from graphsplit.analysis.assignment import SHARED_PART, Assignment
from graphsplit.analysis.inference import Inference, output_nodes
from graphsplit.analysis.units import Factors, Ids, factor_key
from graphsplit.errors import PartitionError
from graphsplit.plan import PartitionPlan, is_disjoint

Vertex = tuple[Any, ...]
INPUT, OUTPUT, UNITS, VALUE, COMMON = "input", "output", "units", "value", "common"


def unit_graph(inference: Inference, assignment: Assignment) -> nx.DiGraph[Vertex]:
    """The unit graph of a program.

    Vertices are ``("input", name)``, ``("output", position)``, ``("units", axis, part)``,
    ``("value", node, part)`` (a value without units, which each sub-model has for itself) and
    ``("common", node)``. Edges between shares of two sub-models stand for cross weights: they are in the full
    model and in no sub-model.
    """
    graph: nx.DiGraph[Vertex] = nx.DiGraph()
    # An axis' shares are connected all to all; one pair of axes gives these edges once.
    seen: set[tuple[Any, Any]] = set()
    shares = _Shares(assignment, inference.k)
    bundles: dict[fx.Node, tuple[Vertex, ...]] = {}
    for number, program_graph in enumerate(inference.program.graphs):
        for node in program_graph.nodes:
            if node.op == "output":
                _add_outputs(graph, inference, program_graph, number, bundles)
                continue
            here = _vertices(inference, shares, node, number)
            bundles[node] = here
            graph.add_nodes_from(here)
            for operand in node.all_input_nodes:
                if operand.op == "get_attr":
                    continue
                there = bundles[operand]
                if (there, here) not in seen:
                    seen.add((there, here))
                    _connect(graph, there, here)
    return graph


class _Shares:
    """Which shares of which axes a factor holds; views of the same ids are looked at once."""

    def __init__(self, assignment: Assignment, k: int) -> None:
        self.assignment, self.k = assignment, k
        self._known: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def of(self, ids: Ids) -> list[tuple[int, int]]:
        """Pairs of axis and part, sorted."""
        key = factor_key(ids)
        if key not in self._known:
            flat = ids.ravel()
            part = self.assignment.part[flat].astype(np.int64)
            numbers = self.assignment.axis[flat] * self.k + part
            held = np.flatnonzero(np.bincount(numbers[part != SHARED_PART]))
            self._known[key] = [divmod(int(number), self.k) for number in held]
        return self._known[key]


def _vertices(inference: Inference, shares: _Shares, node: fx.Node, number: int) -> tuple[Vertex, ...]:
    if node.op == "placeholder":
        return ((INPUT, node.name),)
    if node.op == "get_attr":
        return ()
    if node in inference.common:
        return ((COMMON, number, node.name),)
    outputs = inference.facts[node].outputs
    lists: list[Factors] = outputs if isinstance(outputs, list) else [outputs]
    held = {pair for factors in lists for ids in factors for pair in shares.of(ids)}
    if not held:
        return tuple((VALUE, number, node.name, part) for part in range(inference.k))
    return tuple((UNITS, axis, part) for axis, part in sorted(held))


def _connect(graph: nx.DiGraph[Vertex], there: tuple[Vertex, ...], here: tuple[Vertex, ...]) -> None:
    """Edges to what is new on this side; what stands on both sides passes through."""
    known = set(there)
    for b in here:
        if b not in known:
            graph.add_edges_from((a, b) for a in there if _feeds(a, b))


def _feeds(a: Vertex, b: Vertex) -> bool:
    inside = a[0] in (VALUE, UNITS) and b[0] in (VALUE, UNITS)
    if inside and VALUE in (a[0], b[0]):
        return bool(a[-1] == b[-1])
    return not (inside and a[1] == b[1])


def _add_outputs(
    graph: nx.DiGraph[Vertex], inference: Inference, program_graph: fx.Graph, number: int,
    bundles: dict[fx.Node, tuple[Vertex, ...]],
) -> None:  # fmt: skip
    for position, value in enumerate(output_nodes(program_graph)):
        graph.add_node((OUTPUT, number, position))
        if isinstance(value, fx.Node) and value.op != "get_attr":
            _connect(graph, bundles[value], ((OUTPUT, number, position),))


def submodel_graph(graph: nx.DiGraph[Vertex], part: int) -> nx.DiGraph[Vertex]:
    """The sub-graph that a sub-model's vertices induce, with inputs, common values and outputs."""
    keep = [v for v in graph if v[0] in (INPUT, OUTPUT, COMMON) or (v[0] in (UNITS, VALUE) and v[-1] == part)]
    induced: nx.DiGraph[Vertex] = graph.subgraph(keep)
    return induced


def violations(inference: Inference, assignment: Assignment, plan: PartitionPlan) -> list[str]:
    """The properties of section 2.2 that a division breaks, each with the units at fault; empty if valid.

    1. The only sources and sinks of a sub-model are inputs and outputs of the model (constants of the graph
       count as inputs, unused inputs are allowed).
    2. Each sub-model is a network: every unit lies on a way from an input to an output.
    3. The original loss applies: every output of the model is one of the sub-model, of the same shape.
    4. Every unit is in exactly one sub-model.
    5. Every parameter is in at most one, but for those of the output layers and those that each has for
       itself.
    """
    graph = unit_graph(inference, assignment)
    broken: list[str] = []
    outputs = [v for v in graph if v[0] == OUTPUT]
    fed = _reach(graph, _starts(graph))
    leads_out = _reach(graph.reverse(copy=False), outputs)
    fed_by_state = _fed_by_state(inference, assignment)
    for part in range(inference.k):
        induced = submodel_graph(graph, part)
        forward = _reach(induced, _starts(induced))
        backward = _reach(induced.reverse(copy=False), outputs)
        names = [axis.name for axis in assignment.axes]
        for vertex in induced:
            if vertex[0] not in (UNITS, VALUE):
                continue
            label = f"units of {names[vertex[1]]}" if vertex[0] == UNITS else f"the value {vertex[2]}"
            from_state = vertex[0] == VALUE or vertex[1] in fed_by_state
            if not induced.in_degree(vertex) and not from_state:
                broken.append(f"property 1: {label} in sub-model {part} are a source that is no input")
            elif vertex not in forward and not from_state:
                broken.append(f"property 2: {label} in sub-model {part} are reached from no input")
            # Units that lead to no output in the full model either are the user's dead code.
            if vertex not in backward and vertex in leads_out:
                broken.append(f"property 1: {label} in sub-model {part} are a sink that is no output")
        for vertex in outputs:
            if vertex in fed and vertex not in forward:
                broken.append(f"property 3: output {vertex[2]} is missing in sub-model {part}")
    broken += _units_once(assignment, inference.k)
    broken += _parameters_once(plan)
    return broken


def _starts(graph: nx.DiGraph[Vertex]) -> list[Vertex]:
    """Inputs, and constants of the graph."""
    return [v for v in graph if v[0] == INPUT or (v[0] == COMMON and not graph.in_degree(v))]


def _reach(graph: nx.DiGraph[Vertex], starts: list[Vertex]) -> set[Vertex]:
    """Every vertex that can be reached from one of ``starts``."""
    return {vertex for layer in nx.bfs_layers(graph, starts) for vertex in layer} if starts else set()


def _fed_by_state(inference: Inference, assignment: Assignment) -> set[int]:
    """Axes of values made of parameters alone (position tables, queries): their source is no input."""
    axes: set[int] = set()
    for node, facts in inference.facts.items():
        if node not in inference.data and not isinstance(facts.outputs, list):
            for ids in facts.outputs:
                axes.update(int(axis) for axis in np.unique(assignment.axis[ids.ravel()]))
    return axes


def _units_once(assignment: Assignment, k: int) -> list[str]:
    broken = []
    for axis in assignment.axes:
        if axis.counts and (sum(axis.counts) != axis.size or len(axis.counts) != k or min(axis.counts) < 1):
            broken.append(f"property 4: the {axis.size} units of {axis.name} are dealt out as {axis.counts}")
    return broken


def _parameters_once(plan: PartitionPlan) -> list[str]:
    broken = []
    for state in plan.state:
        if plan.k == 1 or state.kind != "parameter" or state.merge in ("average", "stack", "common"):
            continue
        if not any(cut is not None and is_disjoint(cut) for cut in state.cuts):
            broken.append(f"property 5: {state.name} is in several sub-models")
    return broken


def require_valid(inference: Inference, assignment: Assignment, plan: PartitionPlan) -> None:
    """Raise where a division breaks a property, naming the units.

    Raises:
        PartitionError: The first violation, and how many there are.
    """
    broken = violations(inference, assignment, plan)
    if broken:
        raise PartitionError(
            f"the division is not valid: {broken[0]}"
            + (f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""),
            hint="choose another K, or keep these units together",
        )
