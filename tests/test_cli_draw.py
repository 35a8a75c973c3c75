"""``graphsplit draw``: what it writes, how it ends, and that it leaves nothing half-written."""

import json
from pathlib import Path

import pytest

from laws import run

GOOD = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU()), nn.Linear(16, 4))
other = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
example_inputs = torch.randn(2, 8)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(GOOD)
    return path


def test_the_suffix_decides(model: Path, tmp_path: Path) -> None:
    done = run("draw", model, "-o", tmp_path / "new" / "a.html")
    assert done.exit_code == 0, done.stderr
    assert "Sequential from " in done.stdout and "2 sub-models" in done.stdout and "a.html" in done.stdout
    assert (tmp_path / "new" / "a.html").read_text().startswith("<!DOCTYPE html>")
    assert run("draw", model, "-k", 4, "-o", tmp_path / "a.svg").exit_code == 0
    text = (tmp_path / "a.svg").read_text()
    assert text.startswith("<svg") and "divided by width into 4 sub-models" in text


def test_two_runs_write_equal_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        assert run("draw", model, "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_depth_entry_and_input(model: Path, tmp_path: Path) -> None:
    for depth in (0, 1):
        assert run("draw", model, "--depth", depth, "-o", tmp_path / f"{depth}.svg").exit_code == 0
    closed, opened = ((tmp_path / f"{depth}.svg").read_text() for depth in (0, 1))
    assert "layer_norm" in opened and ">layer_norm<" not in closed
    done = run("draw", model, "--entry", "other", "--input", "3x8", "-o", tmp_path / "c.svg")
    assert done.exit_code == 0, done.stderr
    assert "56 parameters" in (tmp_path / "c.svg").read_text()


def test_json_and_nothing_else(model: Path, tmp_path: Path) -> None:
    done = run("draw", model, "-o", tmp_path / "a.svg", "--json")
    report = json.loads(done.stdout)
    assert (report["model"], report["k"]) == ("Sequential", 2)
    assert report["written"]["bytes"] == (tmp_path / "a.svg").stat().st_size


def test_a_bundle_gives_the_figure_of_its_model(model: Path, tmp_path: Path) -> None:
    assert run("partition", model, "-o", tmp_path / "bundle", "--no-verify").exit_code == 0
    assert run("draw", tmp_path / "bundle", "-o", tmp_path / "a.svg").exit_code == 0
    assert run("draw", model, "-o", tmp_path / "b.svg").exit_code == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_what_stands_there_is_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("mine")
    done = run("draw", model, "-o", tmp_path / "a.svg")
    assert done.exit_code == 6 and "exists already" in done.stderr
    assert (tmp_path / "a.svg").read_text() == "mine"
    assert run("draw", model, "-o", tmp_path / "a.svg", "--force").exit_code == 0
    assert (tmp_path / "a.svg").read_text() != "mine"


def test_another_suffix_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    done = run("draw", tmp_path / "none.py", "-o", tmp_path / "a.png")
    assert done.exit_code == 2 and "ends in neither .svg nor .html" in done.stderr
    assert "load" not in done.stderr


@pytest.mark.parametrize("arguments", [("--depth", -1), ("-k", "two"), ()])
def test_usage_errors(model: Path, tmp_path: Path, arguments: tuple[object, ...]) -> None:
    out = ("-o", tmp_path / "a.svg") if arguments else ()
    done = run("draw", model, *out, *arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert not (tmp_path / "a.svg").exists()


def test_an_interrupt_leaves_nothing_half_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupt)
    done = run("draw", model, "-o", tmp_path / "a.svg")
    assert done.exit_code == 130
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["model.py"]
