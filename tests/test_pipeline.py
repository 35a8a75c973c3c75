"""Pipelines: parsing, checks between passes, timings, errors that name the pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import graphsplit as gs
from graphsplit.errors import InternalError, PartitionError, UserError
from graphsplit.graphs import copy_graph
from graphsplit.passes import Merge, Partition, Pass, PassResult, Pipeline, Programs


@pytest.fixture
def program() -> gs.Program:
    torch.manual_seed(0)
    return gs.trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 6))


def test_parse_reads_names_and_options() -> None:
    pipeline = Pipeline.parse("partition(k=4) | merge(duplicate=False) | dead-code-elimination")
    assert pipeline.passes[:2] == [Partition(k=4), Merge(duplicate=False)]
    assert str(pipeline) == "partition(k=4) | merge(duplicate=False) | dead-code-elimination"
    assert Pipeline.parse(str(pipeline)).passes == pipeline.passes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partition(k=2) | ", "empty step"),
        ("partitoin", "did you mean partition"),
        ("partition(n=2)", "its options: k"),
        ("partition(2)", "options are given by name"),
        ("partition(k=x)", "no literal"),
        ("partition(k='2')", "expected a int"),
        ("merge(duplicate=1)", "expected a bool"),
        ("partition(k=", "cannot read the pass"),
        ("__import__('os').system('true')", "cannot read the pass"),
    ],
)
def test_parse_refuses(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Pipeline.parse(text)


def test_partition_and_merge_give_the_mean(program: gs.Program) -> None:
    divided = Pipeline([Partition(k=2)])(program)
    merged = Pipeline([Merge()])(divided).single()
    x = torch.randn(5, 6)
    outputs = [gs.emit(item)(x) for item in divided.items]
    torch.testing.assert_close(gs.emit(merged)(x), sum(outputs) / 2)
    assert program.parameter_count() == merged.parameter_count()


def test_timings_and_callback(program: gs.Program) -> None:
    seen: list[tuple[str, bool]] = []
    pipeline = Pipeline.parse("dead-code-elimination | partition(k=2) | merge")
    pipeline.between = lambda item, result: seen.append((item.name, result.modified))
    pipeline(program)
    assert seen == [("dead-code-elimination", False), ("partition", True), ("merge", True)]
    assert [timing.name for timing in pipeline.timings] == [name for name, _ in seen]
    assert pipeline.timings[0].reason == "every node is needed"


def test_an_error_names_the_pass_and_those_before_it(program: gs.Program) -> None:
    with pytest.raises(PartitionError, match=r"pass partition \(after dead-code-elimination\): K = 99"):
        Pipeline.parse("dead-code-elimination | partition(k=99)")(program)
    with pytest.raises(PartitionError, match="put partition before it"):
        Pipeline.parse("merge")(program)


@dataclass(frozen=True)
class Breaks(Pass):
    """Leaves a program that reads a state it does not hold."""

    name: ClassVar[str] = "breaks"

    def run(self, programs: Programs) -> PassResult:
        program = programs.single()
        graph = copy_graph(program.graphs[0])
        next(node for node in graph.nodes if node.op == "get_attr").target = "nowhere"
        import dataclasses

        return PassResult(programs.with_items([dataclasses.replace(program, graphs=(graph,))]), True)


@dataclass(frozen=True)
class Fails(Pass):
    """Has a bug."""

    name: ClassVar[str] = "fails"

    def run(self, programs: Programs) -> PassResult:
        raise ZeroDivisionError("oops")


def test_a_malformed_program_is_caught_between_passes(program: gs.Program) -> None:
    with pytest.raises(InternalError, match=r"pass breaks \(after nothing\).*nowhere"):
        Pipeline([Breaks()])(program)
    Pipeline([Breaks()], verify=False)(program)


def test_a_bug_in_a_pass_is_an_internal_error_with_its_name(program: gs.Program) -> None:
    with pytest.raises(InternalError, match=r"pass fails .* failed with ZeroDivisionError: oops"):
        Pipeline([Fails()])(program)
