"""The public face: save, load and export what `partition` gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graphsplit as gs
from graphsplit.errors import PartitionError, PlanError
from zoo import ZOO


@pytest.fixture
def part() -> gs.Partition:
    entry = ZOO["gpt"]
    return gs.partition(entry.build(), entry.inputs(), k=2)


def test_a_trained_partition_is_saved_and_loaded(part: gs.Partition, tmp_path: Path) -> None:
    inputs = ZOO["gpt"].inputs()
    with torch.no_grad():
        for submodel in part.submodels:
            for parameter in submodel.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    gs.save(part, tmp_path / "bundle")
    loaded = gs.load(tmp_path / "bundle")
    assert isinstance(loaded, gs.Partition)
    assert loaded.plan == part.plan
    for ours, theirs in zip(part.submodels, loaded.submodels, strict=True):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert torch.equal(ours.eval()(*inputs)[0], theirs.eval()(*inputs)[0])
    assert torch.equal(part.merge().eval()(*inputs)[0], loaded.merge().eval()(*inputs)[0])
    assert loaded.verify(loaded.submodels).ok


def test_a_module_is_saved_and_loaded(part: gs.Partition, tmp_path: Path) -> None:
    inputs = ZOO["gpt"].inputs()
    merged = part.merge().eval()
    gs.save(merged, tmp_path / "merged")
    loaded = gs.load(tmp_path / "merged")
    assert isinstance(loaded, gs.ProgramModule)
    assert torch.equal(merged(*inputs)[0], loaded.eval()(*inputs)[0])


def test_onnx_of_every_piece(tmp_path: Path) -> None:
    part = gs.partition(ZOO["lenet"].build(), ZOO["lenet"].inputs(), k=2)
    reports = gs.export_onnx(part, tmp_path)
    assert sorted(reports) == ["ensemble.onnx", "merged.onnx", "submodel_0.onnx", "submodel_1.onnx"]
    assert all((tmp_path / name).is_file() for name in reports)


def test_a_plan_of_another_model_is_refused(part: gs.Partition) -> None:
    with pytest.raises(PlanError, match="does not belong to this model"):
        gs.partition(ZOO["lenet"].build(), ZOO["lenet"].inputs(), plan=part.plan)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "2"])
def test_k_out_of_range(k: object) -> None:
    with pytest.raises(PartitionError, match="K is"):
        gs.partition(nn.Linear(4, 2), torch.randn(2, 4), k=k)  # type: ignore[arg-type]


def test_nan_weights_are_refused_unless_drawn_anew() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(PartitionError, match=r"the parameter 2\.weight holds NaN"):
        gs.partition(model, torch.randn(3, 4), k=2)
    fresh = gs.partition(model, torch.randn(3, 4), k=2, init="fresh")
    assert all(torch.isfinite(p).all() for s in fresh.submodels for p in s.parameters())


def test_a_hidden_state_among_the_outputs_can_be_left_out() -> None:
    entry = ZOO["hub_t5"]
    whole = gs.partition(entry.build(), entry.inputs())
    only = gs.partition(entry.build(), entry.inputs(), outputs=["logits"])
    assert max(only.plan.parameter_counts()) < 0.6 * max(whole.plan.parameter_counts())
    assert only.verify().ok
