"""Divide a program by width into K complete sub-networks.

Before::

    h = linear(x, w[8, 3]); y = linear(h, v[2, 8])

After, for K = 2, in each of two programs::

    h = linear(x, w[4, 3]); y = linear(h, v[2, 4])

Inputs and outputs are shared; every weight between units of two sub-models is gone (Miranda & Von Zuben,
arXiv 1511.02954, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from graphsplit.analysis import Analysis, Lowered, analyse
from graphsplit.analysis.analysis import check_k
from graphsplit.analysis.dealing import Strategy, check_shares, dealer_of
from graphsplit.analysis.localize import local_value
from graphsplit.analysis.lower import lower
from graphsplit.builder import GraphBuilder
from graphsplit.graphs import drop_dead
from graphsplit.passes.base import Pass, PassResult, Programs
from graphsplit.program import TRAINING, Program, StateEntry, source_of


def extract(analysis: Analysis, part: int) -> Program:
    """Sub-model ``part`` as a program; its weights are slices (views where possible) of the full model's.

    Sub-models of the same sizes share their graphs, unless these hold indices of one of them.
    """
    program = analysis.program
    lowered = _lowered(analysis, part)
    state = dict(lowered.constants)
    for plan in analysis.plan.state:
        entry = program.state[plan.name]
        state[plan.name] = replace(entry, tensor=_sliced(entry, plan.slice(entry.tensor.detach(), part)))
    return replace(program, graphs=lowered.graphs, state=state)


def _lowered(analysis: Analysis, part: int) -> Lowered:
    for first, known in analysis.lowered.items():
        if first == part or (not known.for_one_part and analysis.layouts.alike(first, part)):
            return known
    constants: dict[str, StateEntry] = {}
    program = analysis.program
    builds = [
        extract_graph(analysis, graph, part, GraphBuilder(constants, program.state))
        for graph in program.graphs
    ]
    found = Lowered(
        tuple(build.graph for build in builds), constants, any(build.for_one_part for build in builds)
    )
    analysis.lowered[part] = found
    return found


def _sliced(entry: StateEntry, tensor: Any) -> Any:
    return tensor.requires_grad_(entry.tensor.requires_grad) if entry.kind == "parameter" else tensor


def extract_graph(
    analysis: Analysis,
    graph: fx.Graph,
    part: int,
    build: GraphBuilder,
    values: dict[fx.Node, fx.Node] | None = None,
) -> GraphBuilder:
    """Build the graph of sub-model ``part``; ``values`` is filled with what each node has become."""
    values = {} if values is None else values
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = build.placeholder(node)
        elif node.op == "get_attr":
            meta = None if node.target == TRAINING else local_value(analysis.kinds, node, part)
            values[node] = build.state(str(node.target), meta)
        elif node.op == "call_function":
            build.source = source_of(node)
            values[node] = lower(analysis, build, node, part, values.__getitem__)
        else:
            build.output(fx.map_arg(node.args[0], values.__getitem__))
    drop_dead(build.graph)
    return build


@dataclass(frozen=True)
class Partition(Pass):
    """``partition(k=2)``: one program to K; the options are those of `graphsplit.partition`."""

    name: ClassVar[str] = "partition"
    k: int = 2
    shares: tuple[float, ...] = ()
    strategy: Strategy = "contiguous"
    seed: int = 0

    def run(self, programs: Programs) -> PassResult:
        """Divide the one program there is."""
        check_k(self.k)
        shares = check_shares(self.shares or (1,) * self.k)
        analysis = analyse(programs.single(), self.k, shares, dealer_of(self.strategy, self.seed))
        items = tuple(extract(analysis, part) for part in range(self.k))
        return PassResult(Programs(items, analysis), modified=self.k > 1)
