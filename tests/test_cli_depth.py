"""``graphsplit critics`` and ``graphsplit sil``: what they print and write, and how they end."""

import json
from pathlib import Path

import pytest
import torch

import graphsplit as gs
from laws import run

GOOD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.body(self.table(x))) @ self.table.weight.T

torch.manual_seed(0)
model, tied = Net(), Tied()
example_inputs = torch.randn(2, 8)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(GOOD)
    return path


def test_critics_write_what_can_be_trained(model: Path, tmp_path: Path) -> None:
    done = run("critics", model, "--at", "body", "--at", "head", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "484 parameters, into 3 layer groups" in done.stdout
    assert "Certificate: all checks hold" in done.stdout and "module body" in done.stdout
    assert "the dearest group has 1,024 FLOPs, no cuts could give less than 1,024" in done.stdout
    local = gs.load(tmp_path / "out")
    assert isinstance(local, gs.LocalCritics) and [item.parameters for item in local.complexity()] == [
        212,
        484,
        484,
    ]
    assert local.step(torch.randn(4, 8), torch.randint(0, 4, (4,))).loss > 0
    again = run("verify", tmp_path / "out")
    assert again.exit_code == 0 and ", 3 layer groups" in again.stdout
    data = json.loads(run("verify", tmp_path / "out", "--json").stdout)
    assert data["certificate"]["ok"] and data["n"] == 3


def test_json_and_nothing_else(model: Path, tmp_path: Path) -> None:
    done = run("critics", model, "-n", 1, "--balance", "params", "--json", "-o", tmp_path / "out")
    report = json.loads(done.stdout)
    assert [group["parameters"] for group in report["groups"]] == [144, 340]
    assert report["bound"] == 272 and report["unit"] == "parameters" and report["certificate"]["ok"]
    assert len(report["submodels"]) == 2 and "manifest.json" in report["written"]["files"]


def test_sil_writes_parts_and_says_what_they_take(model: Path, tmp_path: Path) -> None:
    arguments = ("--at", "body", "--classes", 4, "--noise", 0.3)
    done = run("sil", model, *arguments, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "Training apart" in done.stdout and "memory of a step" in done.stdout
    halves = gs.load(tmp_path / "out")
    assert isinstance(halves, gs.SyntheticHalves) and halves.labels.noise == 0.3
    assert torch.equal(halves.points[0], gs.synthetic_halves(
        torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)), torch.randn(2, 8),
        at="2", labels=gs.train.Labels(4, noise=0.3)).points[0])  # fmt: skip


def test_a_bundle_is_drawn_with_groups_and_critics(model: Path, tmp_path: Path) -> None:
    run("critics", model, "--at", "body", "--at", "head", "--no-verify", "-o", tmp_path / "out")
    done = run("draw", tmp_path / "out", "-o", tmp_path / "net.svg")
    assert done.exit_code == 0, done.stderr
    figure = (tmp_path / "net.svg").read_text()
    assert "divided by depth into 3 layer groups with local critics" in figure
    assert "critic_0" in figure and "critic_1" in figure and "critic_2" not in figure
    wrong = run("draw", tmp_path / "out", "-k", 2, "-o", tmp_path / "other.svg")
    assert wrong.exit_code == 2 and "-k is for partitions" in wrong.stderr


@pytest.mark.slow
def test_a_bundle_is_exported(model: Path, tmp_path: Path) -> None:
    run("critics", model, "--no-verify", "-o", tmp_path / "out")
    done = run("export", tmp_path / "out", "-o", tmp_path / "onnx", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["n"] == 2 and all(row["ok"] for row in report["onnx"])
    assert set(report["written"]["files"]) == {
        "group_0.onnx", "group_1.onnx", "submodel_0.onnx", "submodel_1.onnx", "anytime.onnx"
    }  # fmt: skip


@pytest.mark.slow
def test_onnx_beside_it(model: Path, tmp_path: Path) -> None:
    done = run("critics", model, "--at", "head", "--onnx", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").glob("*.onnx")}
    assert names == {"group_0.onnx", "group_1.onnx", "submodel_0.onnx", "submodel_1.onnx", "anytime.onnx"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("critics", "--at", "heads"), 5, "there is no module 'heads'"),
        (("critics", "-n", 30), 5, "pieces at most"),
        (("critics", "--entry", "tied", "--input", "2x5:int64"), 5, "table.weight must not be in two groups"),
        (("critics", "--critic", "conv"), 5, "a convolutional critic was asked for"),
        (("sil", "--classes", 1), 2, "labels for 1 classes"),
        (("sil",), 2, "classes"),
    ],
)
def test_what_cannot_be_ends_with_a_sentence(
    model: Path, tmp_path: Path, arguments: tuple[object, ...], code: int, message: str
) -> None:
    command, *options = arguments
    done = run(command, model, *options, "-o", tmp_path / "out")
    assert done.exit_code == code
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_copies_of_tied_weights_are_a_choice(model: Path, tmp_path: Path) -> None:
    arguments = ("--entry", "tied", "--input", "2x5:int64", "--copy-tied")
    done = run("critics", model, *arguments, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr


def test_width_commands_name_what_a_folder_holds(model: Path, tmp_path: Path) -> None:
    assert run("critics", model, "-o", tmp_path / "out", "--no-verify").exit_code == 0
    done = run("merge", tmp_path / "out", "-o", tmp_path / "merged")
    assert done.exit_code == 6 and "holds layer groups and no partition" in done.stderr
    taken = run("critics", model, "-o", tmp_path / "out")
    assert taken.exit_code == 6 and "--force" in taken.stderr
