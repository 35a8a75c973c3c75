"""Remove what no output, buffer write or running statistic needs.

Before::

    a = relu(x); b = tanh(x); return a

After::

    a = relu(x); return a
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from graphsplit.graphs import copy_graph, drop_dead
from graphsplit.passes.base import Pass, PassResult, Programs
from graphsplit.program import Program


def eliminate_dead_code(program: Program) -> tuple[Program, bool]:
    """The program without dead nodes, and whether there were any."""
    graphs: list[fx.Graph] = []
    changed = False
    for graph in program.graphs:
        copied = copy_graph(graph)
        changed |= drop_dead(copied)
        graphs.append(copied)
    return (replace(program, graphs=tuple(graphs)), True) if changed else (program, False)


@dataclass(frozen=True)
class DeadCodeElimination(Pass):
    """``dead-code-elimination``: a fixed point after one run."""

    name: ClassVar[str] = "dead-code-elimination"

    def run(self, programs: Programs) -> PassResult:
        """Drop dead nodes of every program."""
        results = [eliminate_dead_code(program) for program in programs.items]
        modified = any(changed for _, changed in results)
        reason = "" if modified else "every node is needed"
        if not modified:
            return PassResult(programs, False, reason)
        return PassResult(programs.with_items([program for program, _ in results]), True)
