"""Facts of a division, as plain data."""

import json

import pytest
import torch
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.report import finite, model_report, partition_report, pattern, patterns


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.act = nn.PReLU()
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.stem(x) * scale
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x)}


@pytest.fixture(scope="module")
def part() -> gs.Partition:
    torch.manual_seed(0)
    return gs.partition(Net(), torch.randn(2, 6), k=2)


def test_axes_are_named_by_the_first_dimension_in_the_order_of_the_model(part: gs.Partition) -> None:
    axes = model_report(part.analysis)["axes"]
    assert [(axis["name"], axis["units"], axis["per_submodel"]) for axis in axes] == [
        ("stem.weight[0]", 8, [4, 4]),
        ("blocks.0.up.weight[0]", 16, [8, 8]),
        ("blocks.1.up.weight[0]", 16, [8, 8]),
    ]
    assert axes[1]["places"] == [
        {"tensor": "blocks.0.up.weight", "dim": 0, "size": 16},
        {"tensor": "blocks.0.up.bias", "dim": 0, "size": 16},
        {"tensor": "blocks.0.down.weight", "dim": 1, "size": 16},
    ]


def test_axes_that_differ_in_a_number_are_one_group(part: gs.Partition) -> None:
    stream, hidden = model_report(part.analysis)["groups"]
    assert (stream["name"], stream["axes"]) == ("stem.weight[0]", 1)
    assert "blocks.*.norm.weight[0]" in stream["coupled"] and "head.weight[1]" in stream["coupled"]
    assert hidden["name"] == "blocks.*.up.weight[0]" and hidden["axes"] == 2 and hidden["size"] == 16
    assert hidden["coupled"] == ["blocks.*.up.bias[0]", "blocks.*.down.weight[1]"]


def test_inputs_and_outputs_have_the_users_names(part: gs.Partition) -> None:
    shared = model_report(part.analysis)["shared"]
    assert shared["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 6]}]
    assert shared["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", 3]}]
    dims = {(row["name"], row["size"]) for row in shared["dims"]}
    assert dims == {("stem.weight[1]", 6), ("head.weight[0]", 3), ("head.bias[0]", 3)}


def test_replicated_parameters_have_a_reason(part: gs.Partition) -> None:
    (slope,) = model_report(part.analysis)["shared"]["replicated"]
    assert slope["name"] == "blocks.*.act.weight" and slope["tensors"] == 2
    assert slope["reason"] == "applied over a dimension without units"


def test_replicated_parameters_on_values_that_differ() -> None:
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.down(torch.relu(self.up(x))) * self.temperature)

    report = model_report(gs.partition(Temperature(), torch.randn(2, 6)).analysis)
    reason = "used on values that differ between sub-models"
    rows = {row["name"]: row["reason"] for row in report["shared"]["replicated"]}
    assert rows == {"temperature": reason, "down.bias": reason}


def test_duplicated_ops_are_counted_by_line(part: gs.Partition) -> None:
    ops = model_report(part.analysis)["duplicated"]
    norm = next(op for op in ops if op["op"] == "layer_norm")
    assert norm["count"] == 2 and norm["module"] == "blocks.*.norm"
    assert norm["file"] == __file__ and "self.norm(x)" in norm["code"]


def test_a_model_that_branches_on_training_is_counted_once() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.up(x))
            return self.down(x + 1 if self.training else x)

    report = model_report(gs.partition(Branching(), torch.randn(2, 6)).analysis)
    assert [op["count"] for op in report["duplicated"]] == [1]
    assert any("training and evaluation" in note for note in report["notes"])


def test_what_cannot_be_split_is_named_with_its_line() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.mid, self.down = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.renorm(self.up(x), 2, 0, 1.0)
            return self.down(torch.relu(self.mid(x)))

    report = model_report(gs.partition(Sorted(), torch.randn(2, 6)).analysis)
    op = report["cannot_split"][0]
    assert "renorm" in op["reason"] and op["file"] == __file__ and "torch.renorm" in op["code"]


def test_an_axis_of_too_few_units_is_kept_whole() -> None:
    model = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    report = model_report(gs.partition(model, torch.randn(2, 6), k=4).analysis)
    narrow = next(axis for axis in report["axes"] if axis["units"] == 2)
    assert narrow["per_submodel"] == [] and narrow["kept_whole"] == "fewer units than K = 4"


def test_a_partition_report_is_json_with_the_proof(part: gs.Partition) -> None:
    report = partition_report(part, part.verify(), {"verify": 0.5})
    assert json.loads(json.dumps(finite(report), allow_nan=False)) == finite(report)
    assert report["model"] == "Net" and report["k"] == 2 and report["timings"] == {"verify": 0.5}
    assert report["certificate"] is not None and report["certificate"]["ok"] is True
    full = sum(parameter.numel() for parameter in Net().parameters())
    assert report["parameters"] == full
    for row, submodel in zip(report["submodels"], part.submodels, strict=True):
        assert row["parameters"] == sum(parameter.numel() for parameter in submodel.parameters())
        assert row["fraction"] == row["parameters"] / full


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0.weight"], ["0.weight"]),
        (["a.0.w", "a.1.w", "b.w"], ["a.*.w", "b.w"]),
        (["a.0.1.w", "a.0.2.w", "a.1.0.w"], ["a.0.*.w", "a.1.0.w"]),
        (["conv1.weight", "conv2.weight"], ["conv1.weight", "conv2.weight"]),
        (["slopes.0[1]", "slopes.1[1]"], ["slopes.*[1]"]),
        (["a.0.w", "a.0.w"], ["a.0.w"]),
        ([], []),
    ],
)
def test_patterns_stand_for_the_given_names_only(names: list[str], expected: list[str]) -> None:
    assert patterns(names) == expected


def test_a_pattern_keeps_equal_numbers() -> None:
    assert pattern(["s.1.l.0.w[0]", "s.1.l.1.w[0]"]) == "s.1.l.*.w[0]"


def test_numbers_that_json_lacks_become_text() -> None:
    assert finite({"a": [float("inf"), 1.5, float("nan")]}) == {"a": ["inf", 1.5, "nan"]}
