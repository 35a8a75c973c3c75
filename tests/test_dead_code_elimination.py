"""The pass `dead-code-elimination`: structure, laws, and what it must not remove."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import graphsplit as gs
from graphsplit.graphs import copy_graph
from graphsplit.passes.dead_code_elimination import eliminate_dead_code
from graphsplit.program import check


def with_dead_code(program: gs.Program) -> gs.Program:
    graph = copy_graph(program.graphs[0])
    output = next(node for node in graph.nodes if node.op == "output")
    live = output.args[0][0]
    with graph.inserting_before(output):
        first = graph.call_function(torch.ops.aten.tanh.default, (live,))
        second = graph.call_function(torch.ops.aten.exp.default, (first,))
    for node in (first, second):
        node.meta["value"] = live.meta["value"]
    return replace(program, graphs=(graph,))


def test_dead_nodes_go_and_the_input_stays() -> None:
    program = with_dead_code(gs.trace(nn.Linear(4, 3), torch.randn(2, 4)))
    before = str(program)
    result, modified = eliminate_dead_code(program)
    assert modified
    assert str(program) == before
    assert "tanh" in before and "tanh" not in str(result) and "exp" not in str(result)
    check(result)
    x = torch.randn(3, 4)
    assert torch.equal(gs.emit(result)(x), gs.emit(program)(x))


def test_second_run_changes_nothing() -> None:
    program, _ = eliminate_dead_code(with_dead_code(gs.trace(nn.Linear(4, 3), torch.randn(2, 4))))
    again, modified = eliminate_dead_code(program)
    assert not modified
    assert again is program


def test_buffer_writes_and_running_statistics_stay() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            self.norm(x)
            return x * 2

    program = gs.trace(Counts(), torch.randn(8, 4))
    _, modified = eliminate_dead_code(program)
    assert not modified
    module = gs.emit(program)
    module(torch.randn(8, 4))
    assert module.get_buffer("calls").item() == 1
    assert module.get_buffer("norm.running_mean").abs().sum() > 0
