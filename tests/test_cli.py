"""The command line: what it prints, how it ends, and that it leaves nothing half-written."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import Result

import graphsplit as gs
from graphsplit.bundle import PartitionBundle, load
from graphsplit.bundle import folder as bundles
from graphsplit.cli import app, console, root
from graphsplit.loading import load_model
from graphsplit.program import Program
from laws import EXAMPLES, run, script

ROOT = Path(__file__).resolve().parent.parent

HEADER = """
import torch
from torch import nn
"""

# A LayerNorm, so that an exact merge differs from a plain one.
GOOD = (
    HEADER
    + """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.down = nn.Linear(16, 4)

    def forward(self, x):
        return self.down(torch.relu(self.norm(self.up(x))))

print("a line that the user's file prints")
torch.manual_seed(0)
model = Net()
example_inputs = torch.randn(2, 8)
"""
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a model file and gives its path."""

    def write(source: str) -> Path:
        path = tmp_path / "model.py"
        path.write_text(HEADER + source)
        return path

    return write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with a bundle of its partition with everything in it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "model.py").write_text(GOOD)
    done = run("partition", folder / "model.py", "-o", folder / "bundle", "--merged", "--onnx")
    assert done.exit_code == 0, done.stderr
    (folder / "partition.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the bundle, to damage."""
    import shutil

    return Path(shutil.copytree(folder / "bundle", tmp_path / "bundle"))


def trained(folder: Path, place: Path, names: Callable[[str], str] = str) -> list[Path]:
    """State dicts of the sub-models with other values, as files."""
    bundle = load(folder / "bundle")
    assert isinstance(bundle, PartitionBundle)
    paths = []
    for part, program in enumerate(bundle.submodels):
        state = {names(k): v + 1 + part for k, v in gs.emit(program).state_dict().items()}
        paths.append(place / f"weights_{part}.safetensors")
        save_file(state, paths[-1])
    return paths


def listing(folder: Path) -> list[str]:
    """Everything in a folder but Python's caches."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return sorted(path for path in found if "__pycache__" not in path)


# Each command, when all goes well


def test_partition_prints_what_was_done(folder: Path) -> None:
    text = (folder / "partition.txt").read_text()
    plain = re.sub(r" +", " ", text)
    assert "Net from " in text and "244 parameters, into 2 sub-models" in text
    assert "x: float32[batch, 8]" in text
    assert "1 16 8 4 up.weight[0]" in plain
    assert "full model 244 100.0 %" in plain
    assert "sub-model 0 124 50.8 %" in plain and "sub-model 1 124 50.8 %" in plain
    assert "1 layer_norm" in text
    assert "Certificate: all checks hold" in text
    assert re.search(r"✓ exact merge = mean of the sub-models [\d.e-]+ 1\.0e-09 float64", plain)
    assert re.search(r"plain merge against the mean \S+ no bound", plain)
    assert "submodel_0.onnx output batch 3" in plain
    assert "trace and analyse" in text
    assert "submodel_1.safetensors" in text
    assert f"graphsplit merge {folder / 'bundle'} weights_0.safetensors weights_1.safetensors" in text
    assert not [line for line in text.splitlines() if line != line.rstrip()], "spaces at the end of lines"
    assert max(map(len, text.split("Written to")[0].splitlines()[1:])) <= 100


def test_partition_writes_a_bundle_that_loads(folder: Path) -> None:
    bundle = load(folder / "bundle")
    assert isinstance(bundle, PartitionBundle)
    assert bundle.plan.k == 2 and len(bundle.submodels) == 2 and bundle.merged is not None
    assert sorted(bundle.files) == ["merged.onnx", "submodel_0.onnx", "submodel_1.onnx"]
    assert bundle.certificate is not None and bundle.certificate["ok"] is True


def test_partition_json_is_alone_on_stdout(folder: Path, tmp_path: Path) -> None:
    done = run("partition", folder / "model.py", "-o", tmp_path / "out", "--json", "--no-verify", "-k", 4)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"] == "Net" and report["k"] == 4 and len(report["submodels"]) == 4
    assert report["certificate"] is None
    assert "submodel_3.safetensors" in report["written"]["files"]
    assert "a line that the user's file prints" in done.stderr


def test_partition_with_options(folder: Path, tmp_path: Path) -> None:
    arguments = ("partition", folder / "model.py", "--no-verify", "--init", "fresh")
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        assert run(*arguments, "--seed", seed, "-o", tmp_path / name).exit_code == 0
    first, same, other = (load_file(tmp_path / n / "submodel_0.safetensors")["up.weight"] for n in "abc")
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_partition_takes_entry_and_inputs(write: Callable[[str], Path], tmp_path: Path) -> None:
    path = write("def build():\n    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))\n")
    out = tmp_path / "out"
    done = run("partition", path, "-o", out, "--entry", "build", "--input", "3x6", "--no-verify")
    assert done.exit_code == 0, done.stderr
    assert "float32[batch, 6]" in done.stdout


def test_partition_keeps_one_output(write: Callable[[str], Path], tmp_path: Path) -> None:
    path = write("""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)
    def forward(self, x):
        hidden = torch.relu(self.up(x))
        return {"hidden": hidden, "logits": self.down(hidden)}
model, example_inputs = Net(), torch.randn(2, 8)
""")
    refused = run("partition", path, "-o", tmp_path / "out", "--no-verify")
    assert refused.exit_code == 5 and "nothing to split" in refused.stderr
    done = run("partition", path, "-o", tmp_path / "out", "--no-verify", "--keep-output", "logits")
    assert done.exit_code == 0, done.stderr


def test_partition_replaces_a_bundle_only_when_told(folder: Path, copied: Path) -> None:
    before = (copied / "manifest.json").read_bytes()
    arguments = ("partition", folder / "model.py", "-o", copied, "--no-verify")
    refused = run(*arguments)
    assert refused.exit_code == 6 and "is a bundle already" in refused.stderr and "--force" in refused.stderr
    assert (copied / "manifest.json").read_bytes() == before
    done = run(*arguments, "--force")
    assert done.exit_code == 0, done.stderr
    assert not (copied / "merged.onnx").exists()


def test_inspect_shows_units_and_reasons(folder: Path) -> None:
    done = run("inspect", folder / "model.py")
    assert done.exit_code == 0, done.stderr
    plain = re.sub(r" +", " ", done.stdout)
    assert "1 16 8 up.weight[0]" in plain
    assert "norm: weight[0], bias[0]" in plain and "down: weight[1]" in plain
    assert "In every sub-model, because of inputs and outputs" in plain and "8 up.weight[1]" in plain
    assert "1 layer_norm norm" in plain and re.search(r"model\.py:\d+", plain)
    assert run("inspect", folder / "bundle").stdout.split("\n", 1)[1] == done.stdout.split("\n", 1)[1]


def test_inspect_json(folder: Path) -> None:
    report = json.loads(run("inspect", folder / "model.py", "-k", 2, "--json").stdout)
    assert [axis["name"] for axis in report["axes"]] == ["up.weight[0]"]
    assert report["duplicated"][0]["op"] == "layer_norm"


def test_inspect_divides_as_partition_does(folder: Path) -> None:
    def axis(*arguments: object) -> list[int]:
        done = run("inspect", folder / "model.py", "--json", *arguments)
        assert done.exit_code == 0, done.stderr
        per_submodel: list[int] = json.loads(done.stdout)["axes"][0]["per_submodel"]
        return per_submodel

    assert axis("--shares", "3,1") == [12, 4]
    assert axis("--fit", "1GB") == [16]
    for strategy in ("interleaved", "random", "cluster"):
        assert axis("--strategy", strategy, "--seed", 1, "-k", 4) == [4, 4, 4, 4]


@pytest.mark.parametrize(
    "arguments", [("--shares", "3,1"), ("--strategy", "random"), ("--fit", "1GB"), ("--seed", "1")]
)
def test_a_bundle_is_not_divided_again(folder: Path, arguments: tuple[str, ...]) -> None:
    done = run("inspect", folder / "bundle", *arguments)
    assert done.exit_code == 2 and "a bundle is divided already" in done.stderr


def test_inspect_names_what_cannot_be_split(write: Callable[[str], Path]) -> None:
    path = write("""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
    def forward(self, x):
        return self.c(torch.relu(self.b(torch.renorm(self.a(x), 2, 0, 1.0))))
model, example_inputs = Net(), torch.randn(2, 8)
""")
    done = run("inspect", path)
    assert done.exit_code == 0, done.stderr
    assert "Cannot be split" in done.stdout and "renorm" in done.stdout.split("Cannot be split")[1]


def test_merge_of_a_bundles_own_weights(folder: Path, tmp_path: Path) -> None:
    done = run("merge", folder / "bundle", "-o", tmp_path / "merged")
    assert done.exit_code == 0, done.stderr
    assert "exact: the output is the mean" in done.stdout and "1 op runs once" in done.stdout
    assert _difference_from_mean(folder / "bundle", tmp_path / "merged") < 1e-6


def test_merge_of_given_weights(folder: Path, tmp_path: Path) -> None:
    files = trained(folder, tmp_path)
    done = run("merge", folder / "bundle", *files, "-o", tmp_path / "merged", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["exact"] is True
    assert _difference_from_mean(folder / "bundle", tmp_path / "merged", files) < 1e-5


def test_plain_merge_says_that_it_is_not_exact(folder: Path, tmp_path: Path) -> None:
    done = run("merge", folder / "bundle", "-o", tmp_path / "merged", "--plain")
    assert done.exit_code == 0, done.stderr
    assert "not exact" in done.stdout
    merged = load(tmp_path / "merged")
    assert isinstance(merged, Program)
    loaded = load_model(str(folder / "model.py"))
    loaded.model.load_state_dict(gs.emit(merged).state_dict())


def test_merge_to_weights_only_fits_the_users_model(folder: Path, tmp_path: Path) -> None:
    files = trained(folder, tmp_path)
    by_bundle, by_plan = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    done = run("merge", folder / "bundle", *files, "--weights-only", by_bundle)
    assert done.exit_code == 0, done.stderr
    done = run("merge", "--plan", folder / "bundle" / "plan.json", *files, "-o", by_plan)
    assert done.exit_code == 0, done.stderr
    found, same = load_file(by_bundle), load_file(by_plan)
    load_model(str(folder / "model.py")).model.load_state_dict(found)
    assert found.keys() == same.keys() and all(torch.equal(found[name], same[name]) for name in found)
    parts = [load_file(path) for path in files]
    assert torch.equal(found["up.weight"], torch.cat([part["up.weight"] for part in parts]))


def test_merge_of_tied_weights_under_any_of_their_names(write: Callable[[str], Path], tmp_path: Path) -> None:
    path = write("""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
    def forward(self, ids):
        return self.head(torch.relu(self.embed(ids)))
model, example_inputs = Net(), torch.randint(10, (2, 5))
""")
    out = tmp_path / "bundle"
    assert run("partition", path, "-o", out, "--no-verify").exit_code == 0
    for part in range(2):
        state = load_file(out / f"submodel_{part}.safetensors")
        save_file({"head.weight": state["embed.weight"]}, tmp_path / f"{part}.safetensors")
    files = [tmp_path / f"{part}.safetensors" for part in range(2)]
    done = run("merge", out, *files, "--weights-only", tmp_path / "full.safetensors")
    assert done.exit_code == 0, done.stderr
    load_model(str(path)).model.load_state_dict(load_file(tmp_path / "full.safetensors"))


def test_verify_a_model_and_a_bundle(folder: Path) -> None:
    for target in ("model.py", "bundle"):
        done = run("verify", folder / target)
        assert done.exit_code == 0, done.stderr
        assert "Certificate: all checks hold" in done.stdout
    assert "exact merge of the given weights" in done.stdout
    assert json.loads(run("verify", folder / "bundle", "--json").stdout)["certificate"]["ok"] is True


def test_a_failed_certificate_has_an_exit_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = gs.Certificate((_row("a check", 1.0), _row("another", 0.0)))
    monkeypatch.setattr(gs.Partition, "verify", lambda *_: certificate)
    done = run("verify", folder / "model.py")
    assert done.exit_code == 7 and "A CHECK FAILED" in done.stdout and "✗" in done.stdout
    done = run("partition", folder / "model.py", "-o", tmp_path / "out")
    assert done.exit_code == 7 and "nothing was written" in done.stderr and not (tmp_path / "out").exists()
    done = run("partition", folder / "model.py", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 7 and json.loads(done.stdout)["certificate"]["ok"] is False


def _row(check: str, error: float) -> Any:
    from graphsplit.verification import Row

    return Row(check, error, 1e-9, "float64")


def test_export_of_a_bundle(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    done = run("export", folder / "bundle", "-o", out)
    assert done.exit_code == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "ensemble.onnx",
        "merged.onnx",
        "submodel_0.onnx",
        "submodel_1.onnx",
    ]
    assert re.search(r"merged\.onnx +output +batch 3", done.stdout)
    assert re.search(r"ensemble\.onnx +output +batch 3", done.stdout)
    refused = run("export", folder / "bundle", "-o", out)
    assert refused.exit_code == 6 and "--force" in refused.stderr
    again = run("export", folder / "bundle", "-o", out, "--force", "--json")
    assert again.exit_code == 0 and all(row["ok"] for row in json.loads(again.stdout)["onnx"])


def test_run_a_pipeline(folder: Path, tmp_path: Path) -> None:
    done = run("run", folder / "model.py", "partition(k=4) | merge", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "partition(k=4) | merge" in done.stdout and "changed the program" in done.stdout
    assert isinstance(load(tmp_path / "out"), Program)
    done = run("run", folder / "model.py", "partition(k=4)", "-o", tmp_path / "parts", "--json")
    assert [row["name"] for row in json.loads(done.stdout)["passes"]] == ["partition"]
    assert isinstance(load(tmp_path / "parts"), PartitionBundle)


# How it ends when something is wrong


BAD_MODELS = {
    "no model": ("net = nn.Linear(2, 2)", 3, "defines no `model`"),
    "not a module": ("model = 3\nexample_inputs = torch.ones(2, 2)", 3, "is an int"),
    "no inputs": ("model = nn.Linear(2, 2)", 3, "defines no `example_inputs`"),
    "syntax": ("model = (", 3, "SyntaxError"),
    "exception": (
        "def weights():\n    raise ValueError('no such weights')\nmodel = weights()",
        3,
        "no such weights",
    ),
    "inputs that do not fit": (
        "model = nn.Sequential(nn.Linear(8, 4))\nexample_inputs = torch.randn(2, 5)",
        3,
        "fails on the example inputs",
    ),
    "control flow": (
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)\n"
        "    def forward(self, x):\n"
        "        x = self.a(x)\n"
        "        if x.sum() > 0:\n"
        "            x = -x\n"
        "        return self.b(x)\n"
        "model, example_inputs = Net(), torch.randn(2, 8)",
        4,
        "if x.sum() > 0",
    ),
    "nothing to split": (
        "model, example_inputs = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), torch.randn(2, 8)",
        5,
        "nothing to split",
    ),
    "no parameters": (
        "model, example_inputs = nn.Sequential(nn.ReLU()), torch.randn(2, 8)",
        5,
        "no parameters",
    ),
    "no tensors": (
        "class Net(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return {'text': 'hello'}\n"
        "model, example_inputs = Net(8, 4), torch.randn(2, 8)",
        4,
        "gives no tensor",
    ),
    "NaN": (
        "model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))\n"
        "example_inputs = torch.randn(2, 8)\n"
        "nn.init.constant_(model[0].weight, float('nan'))",
        5,
        "0.weight holds NaN",
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_is_one_sentence(name: str, write: Callable[[str], Path], tmp_path: Path) -> None:
    source, code, words = BAD_MODELS[name]
    path = write(source)
    before = listing(tmp_path)
    done = run("partition", path, "-o", tmp_path / "out", "--json")
    _assert_refused(done, code, words)
    assert listing(tmp_path) == before


def _assert_refused(done: Result, code: int, words: str) -> None:
    """One sentence with the words, nothing on stdout, no traceback of ours."""
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    assert words in done.stderr
    assert len(re.findall(r"^error: ", done.stderr, re.MULTILINE)) == 1
    assert "graphsplit/" not in done.stderr.partition("error: ")[0], "a traceback of ours"


def test_an_exception_in_the_users_code_shows_the_users_traceback(write: Callable[[str], Path]) -> None:
    path = write(BAD_MODELS["exception"][0])
    done = run("inspect", path)
    assert "Traceback (most recent call last)" in done.stderr
    assert f'File "{path}", line 5, in weights' in done.stderr
    assert "loading.py" not in done.stderr
    assert "error: ValueError: no such weights" in done.stderr


def test_a_wrong_path(tmp_path: Path) -> None:
    done = run("partition", tmp_path / "nowhere.py", "-o", tmp_path / "out")
    _assert_refused(done, 3, f"there is no file {tmp_path / 'nowhere.py'}")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("k", "words"), [(0, "K is 0"), (-1, "K is -1"), (17, "K = 17 is larger than every axis")]
)
def test_a_k_that_does_not_fit(folder: Path, tmp_path: Path, k: int, words: str) -> None:
    done = run("partition", folder / "model.py", "-k", k, "-o", tmp_path / "out")
    _assert_refused(done, 5, words)
    assert listing(tmp_path) == []


def test_brackets_of_names_are_not_taken_for_markup(folder: Path) -> None:
    assert "up.weight[0], has 16 units" in run("inspect", folder / "model.py", "-k", 17).stderr


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(bytes(data))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (
        lambda bundle: _truncate(bundle / "submodel_0.safetensors"),
        "submodel_0.safetensors is truncated",
    ),
    "damaged": (lambda bundle: _flip(bundle / "submodel_1.safetensors"), "submodel_1.safetensors is damaged"),
    "a file less": (lambda bundle: (bundle / "plan.json").unlink(), "plan.json is missing"),
    "no manifest": (lambda bundle: (bundle / "manifest.json").unlink(), "it has no manifest.json"),
    "foreign": (lambda bundle: (bundle / "manifest.json").write_text("{}") and None, "not the manifest"),
}


@pytest.mark.parametrize("command", ["merge", "verify", "export", "inspect"])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_bad_bundle_is_one_sentence(name: str, command: str, copied: Path, tmp_path: Path) -> None:
    damage, words = DAMAGES[name]
    damage(copied)
    before = listing(tmp_path)
    out = ("-o", tmp_path / "out") if command in ("merge", "export") else ()
    _assert_refused(run(command, copied, *out), 6, words)
    assert listing(tmp_path) == before


def test_a_bundle_of_a_merged_model_is_no_partition(folder: Path, tmp_path: Path) -> None:
    assert run("merge", folder / "bundle", "-o", tmp_path / "merged").exit_code == 0
    _assert_refused(run("verify", tmp_path / "merged"), 6, "holds one program and no partition")


def test_a_bundle_knows_its_k(folder: Path) -> None:
    _assert_refused(run("verify", folder / "bundle", "-k", 4), 5, "is for K = 2")
    assert run("verify", folder / "bundle", "-k", 2).exit_code == 0


def _save(path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file(state, path)
    return path


def _foreign(first: Path, second: Path) -> list[Path]:
    return [_save(first, {**load_file(first), "other.weight": torch.ones(2)}), second]


def _lacking(first: Path, second: Path) -> list[Path]:
    state = load_file(first)
    del state["norm.bias"]
    return [_save(first, state), second]


def _full(first: Path, second: Path) -> list[Path]:
    return [_save(first, {**load_file(first), "up.weight": torch.ones(16, 8)}), second]


def _other_shape(first: Path, second: Path) -> list[Path]:
    return [first, _save(second, {**load_file(second), "up.weight": torch.ones(7, 8)})]


def _text(first: Path, second: Path) -> list[Path]:
    second.write_text("these are no weights")
    return [first, second]


def _gone(first: Path, second: Path) -> list[Path]:
    second.unlink()
    return [first, second]


BAD_WEIGHTS: dict[str, tuple[Callable[[Path, Path], list[Path]], str]] = {
    "too few": (lambda first, _: [first], "1 weight file for 2 sub-models"),
    "another model": (_foreign, "holds other.weight, which the plan does not know"),
    "a tensor less": (_lacking, "lacks norm.bias"),
    "full model": (_full, "these are the weights of the full model"),
    "another shape": (_other_shape, "has shape (7, 8), the plan says (8, 8)"),
    "no weights": (_text, "is no safetensors file, or damaged"),
    "no file": (_gone, "there is no file"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
@pytest.mark.parametrize("by_plan", [False, True], ids=["bundle", "plan"])
def test_bad_weights_are_one_sentence(name: str, by_plan: bool, folder: Path, tmp_path: Path) -> None:
    first, second = trained(folder, tmp_path)
    change, words = BAD_WEIGHTS[name]
    files = change(first, second)
    before = listing(tmp_path)
    plan = ("--plan", folder / "bundle" / "plan.json")
    source = plan if by_plan else (folder / "bundle",)
    _assert_refused(run("merge", *source, *files, "-o", tmp_path / "out"), 6, words)
    assert listing(tmp_path) == before


def test_files_in_the_wrong_order(write: Callable[[str], Path], tmp_path: Path) -> None:
    path = write(
        "model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4))\n"
        "example_inputs = torch.randn(2, 8)"
    )
    out = tmp_path / "out"
    assert run("partition", path, "-o", out, "--no-verify").exit_code == 0
    files = [out / "submodel_1.safetensors", out / "submodel_0.safetensors"]
    _assert_refused(
        run("merge", out, *files, "-o", tmp_path / "merged"), 6, "in the order of the sub-models?"
    )


@pytest.mark.parametrize("command", ["partition", "export", "run", "merge"])
def test_a_folder_that_is_not_ours_is_left_alone(command: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "holiday"
    out.mkdir()
    (out / "photo.jpg").write_text("a photo")
    source = folder / ("bundle" if command == "merge" else "model.py")
    more = ("partition(k=2)",) if command == "run" else ()
    done = run(command, source, *more, "-o", out, "--force")
    _assert_refused(done, 6, "is not replaced")
    assert listing(tmp_path) == ["holiday", "holiday/photo.jpg"]


@pytest.mark.parametrize("command", ["partition", "export"])
def test_a_file_where_a_folder_is_to_be(command: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    for out in (tmp_path / "taken", tmp_path / "taken" / "out"):
        done = run(command, folder / "model.py", "-o", out, "--force")
        assert done.exit_code == 6 and "is a file" in done.stderr
    assert (tmp_path / "taken").read_text() == "a file"


def test_a_damaged_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    _assert_refused(
        run("merge", "--plan", tmp_path / "plan.json", "a", "-o", tmp_path / "b"), 6, "the plan is no JSON"
    )
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe")
    _assert_refused(
        run("merge", "--plan", tmp_path / "plan.json", "a", "-o", tmp_path / "b"), 6, "is no plan"
    )
    _assert_refused(
        run("merge", "--plan", tmp_path / "no.json", "a", "-o", tmp_path / "b"), 6, "cannot be read"
    )


def test_an_unknown_pass_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    _assert_refused(run("run", tmp_path / "nowhere.py", "partitoin(k=2)"), 2, "did you mean partition?")


@pytest.mark.parametrize(
    "arguments",
    [
        ("partition", "model.py"),
        ("partition", "model.py", "-o", "out", "--init", "random"),
        ("partition", "model.py", "-o", "out", "-k", "two"),
        ("merge", "bundle"),
        ("merge", "--plan", "plan.json", "a"),
        ("teleport",),
        ("inspect", "model.py", "--colour"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.exit_code == 2 and "Error: " in done.stderr and done.stdout == ""


def test_an_interrupt_leaves_nothing_half_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundles, "_write_tensors", interrupt)
    done = run("partition", folder / "model.py", "-o", tmp_path / "deep" / "out", "--no-verify")
    assert done.exit_code == 130 and "interrupted" in done.stderr and done.stdout == ""
    assert listing(tmp_path) == []
    monkeypatch.setattr("graphsplit.onnx_export._verify_file", interrupt)
    done = run("export", folder / "model.py", "-o", tmp_path / "onnx")
    assert done.exit_code == 130
    assert listing(tmp_path) == []
    monkeypatch.setattr("graphsplit.cli.weights.save_file", interrupt)
    done = run("merge", folder / "bundle", "--weights-only", tmp_path / "full.safetensors")
    assert done.exit_code == 130
    assert listing(tmp_path) == []


def test_a_bug_is_called_a_bug(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the unexpected")

    monkeypatch.setattr("graphsplit.cli.opening.load_model", fail)
    done = run("inspect", folder / "model.py")
    assert done.exit_code == 70 and "a bug in graphsplit: RuntimeError: the unexpected" in done.stderr
    assert "Traceback" not in done.stderr and "--verbose" in done.stderr
    assert "Traceback" in run("inspect", folder / "model.py", "-v").stderr


def test_verbose_shows_the_traceback_of_expected_errors(folder: Path) -> None:
    assert "Traceback" in run("inspect", folder / "model.py", "-k", 0, "--verbose").stderr


def test_every_error_has_a_documented_exit_code() -> None:
    documented = {int(code) for code in re.findall(r"^ +(\d+)  ", root.EPILOG, re.MULTILINE)}

    def kinds(kind: type[gs.errors.GraphsplitError]) -> Iterator[type[gs.errors.GraphsplitError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from kinds(child)

    assert {kind.exit_code for kind in kinds(gs.errors.GraphsplitError)} <= documented
    assert {root.INTERRUPTED, root.CLOSED_PIPE, root.BUG, 0, 2} <= documented
    assert "Exit codes:" in run("--help").stdout


def test_version() -> None:
    assert run("--version").stdout == f"graphsplit {gs.__version__}\n"


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "graphsplit.cli", "inspect", str(folder / "model.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    process.stdout.close()
    _, complaints = process.communicate(timeout=120)
    assert process.returncode == root.CLOSED_PIPE
    assert "Traceback" not in complaints and "BrokenPipe" not in complaints


def test_a_stdout_without_the_signs_gets_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert console._writable("✓ 3 × 4", "ascii") == "? 3 ? 4"


# The options: a new one is a decision, written down here.

OPTIONS = {
    "inspect": [
        *("-k", "--shares", "--strategy", "--fit", "--entry", "--input", "--keep-output", "--seed", "--json"),
        "-v/--verbose",
    ],
    "partition": [
        *(
            "-o/--out",
            "-k",
            "--shares",
            "--strategy",
            "--fit",
            "--entry",
            "--input",
            "--keep-output",
            "--init",
        ),
        *("--seed", "--no-verify"),
        *("--onnx", "--merged", "--force", "--json", "-v/--verbose"),
    ],
    "merge": ["-o/--out", "--plain", "--weights-only", "--plan", "--force", "--json", "-v/--verbose"],
    "fuse": [
        *(
            "-o/--out",
            "-k",
            "--own-inputs",
            "--auto",
            "--entry",
            "--input",
            "--keep-output",
            "--no-verify",
            "--force",
        ),
        *("--json", "-v/--verbose"),
    ],
    "critics": [
        *("-o/--out", "-n", "--at", "--balance", "--copy-tied", "--critic", "--loss", "--loss-output"),
        *("--seed", "--entry", "--input", "--keep-output", "--no-verify", "--onnx", "--force", "--json"),
        "-v/--verbose",
    ],
    "sil": [
        *("-o/--out", "--classes", "-n", "--at", "--copy-tied", "--distribution", "--scale", "--separation"),
        *("--noise", "--seed", "--entry", "--input", "--keep-output", "--no-verify", "--onnx", "--force"),
        *("--json", "-v/--verbose"),
    ],
    "sparsify": [
        *("-o/--out", "--method", "--sparsity", "--scope", "--mode", "--biases", "--norms", "--temperature"),
        *("--iterations", "--per-class", "--seed", "--entry", "--input", "--keep-output", "--force"),
        *("--json", "-v/--verbose"),
    ],
    "prune-units": [
        *("-o/--out", "--method", "--amount", "--scope", "--mode", "--iterations", "--per-class"),
        *("--seed", "--entry", "--input"),
        *("--keep-output", "--no-verify", "--force", "--json", "-v/--verbose"),
    ],
    "ensemble": [
        *(
            "-o/--out",
            "--weights",
            "--average",
            "--answers",
            "--entry",
            "--input",
            "--keep-output",
            "--no-verify",
            "--onnx",
        ),
        *("--force", "--json", "-v/--verbose"),
    ],
    "study": [
        *(
            "-o/--out",
            "--batches",
            "--sparsities",
            "--optimizers",
            "--trials",
            "--goal",
            "--budget",
            "--check",
        ),
        *("--method", "--decay", "--processes", "--seed", "--entry", "--json", "-v/--verbose"),
    ],
    "verify": ["-k", "--entry", "--input", "--keep-output", "--json", "-v/--verbose"],
    "export": ["-o/--out", "-k", "--entry", "--input", "--keep-output", "--force", "--json", "-v/--verbose"],
    "draw": [
        *("-o/--out", "-k", "--entry", "--input", "--keep-output", "--depth", "--force", "--json"),
        "-v/--verbose",
    ],
    "run": ["-o/--out", "--entry", "--input", "--keep-output", "--force", "--json", "-v/--verbose"],
}


def test_options_are_the_ones_that_were_decided_on() -> None:
    commands: Any = typer.main.get_command(app)
    found = {
        name: ["/".join(p.opts) for p in command.params if p.param_type_name == "option"]
        for name, command in commands.commands.items()
    }
    assert found == OPTIONS
    assert ["/".join(p.opts) for p in commands.params] == ["--version"]


@pytest.mark.parametrize("command", OPTIONS)
def test_help_names_every_option(command: str) -> None:
    text = run(command, "--help").stdout
    assert text.startswith(f"Usage: graphsplit {command} ")
    assert not [option for option in OPTIONS[command] if option.split("/")[0] not in text]


# The examples


def test_every_example_says_how_to_run_it_and_has_a_test() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {
        *("char_lstm", "gpt2", "lenet", "paper_cifar10", "paper_mnist", "pipeline", "resnet50", "small_gpt"),
        *(
            "ec_dnn",
            "lightning_ec_dnn",
            "local_critics",
            "sparse_from_the_start",
            "synthetic_labels",
            "train_apart_then_merge",
            "train_fused",
            "trainer_partition",
        ),
    }
    for name in names:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert re.search(rf"^    (graphsplit|python) .*examples/{name}\.py", text, re.MULTILINE), name


@pytest.mark.parametrize(("k", "parameters"), [(1, 431_080), (2, 109_295), (5, 18_224), (10, 4_867)])
def test_lenet_has_the_published_sizes(k: int, parameters: int) -> None:
    done = run("inspect", EXAMPLES / "lenet.py", "-k", k, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["parameters"] == 431_080
    assert [row["parameters"] for row in report["submodels"]] == [parameters] * k


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "submodel"),
    [("gpt2", 124_439_808, 40_986_240), ("resnet50", 25_557_032, 6_917_640)],
)
def test_real_models_divide(name: str, parameters: int, submodel: int) -> None:
    pytest.importorskip("transformers")
    done = run("inspect", EXAMPLES / f"{name}.py", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["parameters"] == parameters
    assert [row["parameters"] for row in report["submodels"]] == [submodel] * 2
    assert report["cannot_split"] == []


@pytest.mark.slow
def test_training_apart_and_merging() -> None:
    found = script("train_apart_then_merge").main()
    apart = max(found["sub-model 0"], found["sub-model 1"])
    assert apart > 0.6
    assert found["merged, as it is"] > apart - 0.03
    assert found["merged, trained on"] > found["merged, as it is"]


def test_a_pipeline_with_a_pass_of_ones_own() -> None:
    timings = script("pipeline").main().timings
    assert [timing.name for timing in timings] == [
        "remove-dropout",
        "dead-code-elimination",
        "partition",
        "merge",
    ]
    assert timings[0].modified


# Helpers


def _difference_from_mean(bundle: Path, merged: Path, files: list[Path] | None = None) -> float:
    """Between the merged model and the mean of the sub-models, on random inputs."""
    held, whole = load(bundle), load(merged)
    assert isinstance(held, PartitionBundle) and isinstance(whole, Program)
    submodels: list[nn.Module] = [gs.emit(program).eval() for program in held.submodels]
    for submodel, path in zip(submodels, files or [], strict=False):
        submodel.load_state_dict(load_file(path))
    inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        mean = torch.stack([submodel(inputs) for submodel in submodels]).mean(0)
        return float((gs.emit(whole).eval()(inputs) - mean).abs().max())
