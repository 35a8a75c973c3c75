"""A pass of one's own, in a pipeline with those of graphsplit.

    python examples/pipeline.py

The pass takes dropout out of a model that is to be shipped. Between any two passes every program is checked
for well-formedness, so that a mistake in a pass is found where it is made.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx, nn

import graphsplit as gs
from graphsplit.graphs import copy_graph
from graphsplit.passes import PASSES, Pass, PassResult, Pipeline, Programs
from graphsplit.program import op_name


@dataclass(frozen=True)
class RemoveDropout(Pass):
    """``remove-dropout``: whatever reads ``dropout(x, p, training)`` reads ``x``."""

    name: ClassVar[str] = "remove-dropout"

    def run(self, programs: Programs) -> PassResult:
        """The same programs without dropout; their weights are shared, their graphs are new."""
        if not any(is_dropout(node) for program in programs.items for node in program.nodes()):
            return PassResult(programs, modified=False, reason="there is no dropout")
        items = [
            replace(program, graphs=tuple(copy_graph(graph, without_dropout) for graph in program.graphs))
            for program in programs.items
        ]
        return PassResult(programs.with_items(items), modified=True)


def is_dropout(node: fx.Node) -> bool:
    """True for a call of dropout."""
    return node.op == "call_function" and op_name(node) == "dropout.default"


def without_dropout(node: fx.Node) -> fx.Node | None:
    """What takes the place of a node; None keeps it."""
    operand = node.args[0] if is_dropout(node) else None
    return operand if isinstance(operand, fx.Node) else None


def main() -> Pipeline:
    """Run the pipeline; returns it with its timings."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))
    inputs = torch.randn(2, 16)
    text = "remove-dropout | dead-code-elimination | partition(k=2) | merge"
    pipeline = Pipeline.parse(text, registry=[*PASSES, RemoveDropout])
    merged = gs.emit(pipeline(gs.trace(model, inputs)).single())
    assert torch.equal(merged.train()(inputs), merged.eval()(inputs)), "there is still dropout"
    return pipeline


if __name__ == "__main__":
    for timing in main().timings:
        print(f"{timing.name:<24}{'changed' if timing.modified else timing.reason:<28}{timing.seconds:.3f} s")
