"""The five properties of section 2.2 of arXiv 1511.02954, on the unit graph."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from torch import nn

import graphsplit as gs
from graphsplit.analysis import Analysis, analyse
from graphsplit.analysis.assignment import Assignment
from graphsplit.analysis.validity import require_valid, submodel_graph, unit_graph, violations
from graphsplit.errors import PartitionError
from zoo import ZOO


@pytest.fixture(scope="module")
def mlp() -> Analysis:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    return analyse(gs.trace(model, torch.randn(4, 6)), 2)


def test_unit_graph_of_an_mlp(mlp: Analysis) -> None:
    graph = unit_graph(mlp.inference, mlp.assignment)
    units = sorted(vertex for vertex in graph if vertex[0] == "units")
    assert units == [("units", axis, part) for axis in (0, 1) for part in (0, 1)]
    # Cross weights join the shares of different sub-models in the full model.
    assert graph.has_edge(("units", 0, 0), ("units", 1, 1))
    part = submodel_graph(graph, 0)
    assert ("units", 0, 1) not in part
    assert {v[0] for v in part if not part.in_degree(v)} == {"input"}
    assert {v[0] for v in part if not part.out_degree(v)} == {"output"}
    assert nx.is_directed_acyclic_graph(part)


@pytest.mark.parametrize("name", ["resnet_basic", "gpt", "unet", "vit", "densenet", "two_in_two_out", "lstm"])
def test_every_plan_of_the_zoo_is_valid(name: str) -> None:
    entry = ZOO[name]
    found = analyse(gs.trace(entry.build(), entry.inputs()), 2)
    assert violations(found.inference, found.assignment, found.plan) == []


def broken(analysis: Analysis, **changes: object) -> Assignment:
    return replace(analysis.assignment, **changes)  # type: ignore[arg-type]


def test_units_that_are_dealt_out_unevenly_are_named(mlp: Analysis) -> None:
    axes = (replace(mlp.assignment.axes[0], counts=(8, 0)), *mlp.assignment.axes[1:])
    found = violations(mlp.inference, broken(mlp, axes=axes), mlp.plan)
    assert found == ["property 4: the 8 units of 0.weight[0] are dealt out as (8, 0)"]


def test_a_submodel_without_a_layer_is_no_network(mlp: Analysis) -> None:
    all_in_one = np.where(mlp.assignment.axis == 1, 0, mlp.assignment.part).astype(np.int16)
    found = violations(mlp.inference, broken(mlp, part=all_in_one), mlp.plan)
    assert "property 1: units of 0.weight[0] in sub-model 1 are a sink that is no output" in found
    assert "property 3: output 0 is missing in sub-model 1" in found


def test_units_that_no_input_reaches_are_named(mlp: Analysis) -> None:
    all_in_one = np.where(mlp.assignment.axis == 0, 0, mlp.assignment.part).astype(np.int16)
    found = violations(mlp.inference, broken(mlp, part=all_in_one), mlp.plan)
    assert "property 1: units of 2.weight[0] in sub-model 1 are a source that is no input" in found


def test_a_parameter_in_two_submodels_is_named(mlp: Analysis) -> None:
    state = tuple(
        replace(s, cuts=(None,) * len(s.shape)) if s.name == "2.weight" else s for s in mlp.plan.state
    )
    found = violations(mlp.inference, mlp.assignment, replace(mlp.plan, state=state))
    assert found == ["property 5: 2.weight is in several sub-models"]
    with pytest.raises(PartitionError, match=r"not valid: property 5: 2\.weight"):
        require_valid(mlp.inference, mlp.assignment, replace(mlp.plan, state=state))
