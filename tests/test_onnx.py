"""ONNX files: equal to the user's own model at another batch size, whatever it takes and gives; refusals."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import graphsplit as gs
from graphsplit import onnx_export
from graphsplit.analysis import analyse
from graphsplit.emission import emit
from graphsplit.errors import InputError, UnsupportedError, UserError, VerificationError
from graphsplit.onnx_export import OnnxReport, export_onnx, value_names
from graphsplit.passes.merge import merge
from graphsplit.passes.partition import extract
from graphsplit.program import Program
from graphsplit.signature import as_call
from zoo import ZOO

FILE = "model.onnx"
BATCH = 5
MODELS = [
    "lenet", "resnet_basic", "mobilenet_v3", "shufflenet_v2", "unet", "vit", "gpt_head_list", "gpt_loss",
    "lstm", "two_in_two_out", "nested_input", "auxiliary_head", "hub_gpt2", "hub_bert_eager",
]  # fmt: skip
PARTITIONED = ["lenet", "gpt_head_list"]

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Small(nn.Module):
    """A linear layer in whatever forward a test writes."""

    def __init__(self, run: Callable[..., Any], **buffers: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 4)
        self.run = run
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def program_of(name: str) -> tuple[Program, nn.Module, Any]:
    """Return a model of the zoo as a program, itself, and its inputs."""
    if name.startswith("hub"):
        pytest.importorskip("transformers")
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    return gs.trace(model, *as_call(inputs)), model, inputs


def at_batch(inputs: Any, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the inputs with other values in the same range, for another number of examples."""

    def larger(value: Any) -> Any:
        return torch.cat([value.flip(-1)] * size)[:size] if isinstance(value, Tensor) else value

    return pytree.tree_map(larger, as_call(inputs))


def run_file(path: Path, tensors: list[Tensor]) -> list[np.ndarray[Any, Any]]:
    """Return the outputs of ONNX Runtime, inputs by position."""
    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return list(session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)}))


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def assert_close(expected: list[Tensor], found: list[Any]) -> None:
    assert len(expected) == len(found)
    for wanted, got in zip(expected, found, strict=True):
        torch.testing.assert_close(torch.from_numpy(np.asarray(got)), wanted, rtol=1e-4, atol=1e-5)


def assert_proved(report: OnnxReport) -> None:
    """Every output was compared at two sets of sizes, and the file is the only thing there."""
    assert all(row.ok for row in report.rows) and report.max_relative < 1e-4
    assert len({tuple(row.sizes.items()) for row in report.rows}) == 2
    assert len(report.rows) == 2 * len(report.outputs) and report.notes == ()
    assert report.bytes == report.path.stat().st_size
    assert list(report.path.parent.iterdir()) == [report.path]
    onnx.checker.check_model(str(report.path), full_check=True)


# Models


@pytest.mark.parametrize("name", MODELS)
def test_file_computes_what_the_users_model_computes(name: str, tmp_path: Path) -> None:
    program, model, inputs = program_of(name)
    report = export_onnx(program, tmp_path / FILE)
    assert_proved(report)
    args, kwargs = at_batch(inputs, BATCH)
    with torch.no_grad():
        expected = tensors_in(model.eval()(*args, **kwargs))
    assert_close(expected, run_file(report.path, tensors_in((args, kwargs))))


@pytest.mark.parametrize("name", PARTITIONED)
def test_sub_models_and_their_merge(name: str, tmp_path: Path) -> None:
    program, _, inputs = program_of(name)
    analysis = analyse(program, 2)
    parts = [extract(analysis, part) for part in range(2)]
    states = [{key: entry.tensor for key, entry in part.state.items()} for part in parts]
    tensors = tensors_in(at_batch(inputs, BATCH))
    outputs = []
    for position, each in enumerate([*parts, merge(analysis, states)]):
        report = export_onnx(each, tmp_path / str(position) / FILE)
        assert_proved(report)
        outputs.append([torch.from_numpy(value) for value in run_file(report.path, tensors)])
    mean = [(first + second) / 2 for first, second in zip(outputs[0], outputs[1], strict=True)]
    torch.testing.assert_close(outputs[2], mean, rtol=1e-4, atol=1e-5)


def test_module_is_exported_in_evaluation_and_left_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    module = emit(gs.trace(model, X))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    report = export_onnx(module, tmp_path / FILE)
    assert_proved(report)
    assert module.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with torch.no_grad():
        assert_close([module.eval()(X)], run_file(report.path, [X]))


# Inputs and outputs


def test_names_and_shapes(tmp_path: Path) -> None:
    program, _, _ = program_of("two_in_two_out")
    report = export_onnx(program, tmp_path / FILE)
    assert [(v.name, v.path, v.dtype, v.shape) for v in report.inputs] == [
        ("left", "args[0]", "float32", ("batch", 16)),
        ("right", "args[1]", "float32", ("batch", 24)),
    ]
    assert [(v.name, v.path, v.shape) for v in report.outputs] == [
        ("label", "output['label']", ("batch", 8)),
        ("score", "output['score']", ("batch",)),
    ]
    file = onnx.load(report.path)
    assert [value.name for value in file.graph.input] == ["left", "right"]
    assert [value.name for value in file.graph.output] == ["label", "score"]
    assert file.graph.name == "TwoInTwoOut"


def test_names_of_inputs_win_over_those_of_weights_and_values(tmp_path: Path) -> None:
    class Clash(nn.Linear):
        def forward(self, weight: Tensor, add: Tensor) -> dict[str, Tensor]:
            return {"linear": super().forward(weight) + add, "weight": add}

    report = export_onnx(gs.trace(Clash(4, 4), (X, X + 1)), tmp_path / FILE)
    assert [value.name for value in report.inputs] == ["weight", "add"]
    assert [value.name for value in report.outputs] == ["linear", "weight_2"]
    assert_proved(report)


def test_value_names() -> None:
    wanted = ["args[0]", "x", "x", "['a b']", "0", "", "é"]
    assert value_names(wanted, ["x"]) == ("args_0", "x_2", "x_3", "a_b", "_0", "value", "value_2")


def test_keyword_inputs_and_example(tmp_path: Path) -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x) if mask is None else super().forward(x) * mask

    program = gs.trace(Masked(4, 4), {"x": X, "mask": torch.ones(3, 1)})
    example = {"mask": torch.zeros(1, 1), "x": X[:1]}
    report = export_onnx(program, tmp_path / FILE, example=example)
    assert [value.name for value in report.inputs] == ["x", "mask"]
    assert [dict(row.sizes) for row in report.rows] == [{"batch": 1}, {"batch": 2}]
    assert report.max_absolute == 0


@pytest.mark.parametrize("example", [torch.ones(3, 5), torch.ones(3, 4, dtype=torch.float64), (X, X)])
def test_example_that_does_not_fit(example: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        export_onnx(gs.trace(nn.Linear(4, 4), X), tmp_path / FILE, example=example)


def test_inputs_that_cannot_be_made_up(tmp_path: Path) -> None:
    class Lookup(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids - 50)

    program = gs.trace(Lookup(4, 4), torch.full((2, 3), 51))
    with pytest.raises(InputError, match=r"of integers 0 and 1.*index out of range.*example=") as caught:
        export_onnx(program, tmp_path / FILE)
    assert "\n" not in str(caught.value)
    assert_proved(export_onnx(program, tmp_path / FILE, example=torch.full((2, 3), 52)))


def test_every_symbol_is_dynamic(tmp_path: Path) -> None:
    program = gs.trace(
        Small(lambda m, x: m.fc(x).cumsum(1)), torch.ones(2, 5, 4), dynamic={"args[0]": (0, 1)}
    )
    report = export_onnx(program, tmp_path / FILE)
    assert report.inputs[0].shape == report.outputs[0].shape == ("batch", "x_dim_1", 4)
    assert [dict(row.sizes) for row in report.rows] == [
        {"batch": 2, "x_dim_1": 5},
        {"batch": 3, "x_dim_1": 6},
    ]


def test_sizes_that_torch_refuses_are_not_tried(tmp_path: Path) -> None:
    halves = Small(lambda m, x: torch.cat(m.fc(x).reshape(2, -1, 4).unbind(0), -1))
    report = export_onnx(gs.trace(halves, torch.ones(4, 4)), tmp_path / FILE)
    assert [dict(row.sizes) for row in report.rows] == [{"batch": 4}, {"batch": 8}]


def test_fixed_sizes_are_noted(tmp_path: Path) -> None:
    program = gs.trace(Small(lambda m, x: m.fc(x)), X, dynamic={"args[0]": ()})
    report = export_onnx(program, tmp_path / FILE)
    assert report.inputs[0].shape == (3, 4) and len(report.rows) == 1
    assert report.notes == ("no size may change: compared at the traced sizes only",)


def test_outputs_of_every_kind(tmp_path: Path) -> None:
    def run(model: Small, x: Tensor) -> Any:
        y = model.fc(x)
        return {
            "y": y,
            "again": y,
            "x": x,
            "w": model.fc.weight,
            "batch": x.shape[0],
            "top": y.argmax(-1),
            "p": y > 0,
        }

    report = export_onnx(gs.trace(Small(run), X), tmp_path / FILE)
    assert_proved(report)
    names = [value.name for value in report.outputs]
    assert names == ["y", "again", "x_2", "w", "batch", "top", "p"]  # x is the input
    assert [value.dtype for value in report.outputs][-3:] == ["int64", "int64", "bool"]
    assert run_file(report.path, [torch.ones(BATCH, 4)])[4] == BATCH


def test_infinite_and_undefined_values_are_compared(tmp_path: Path) -> None:
    report = export_onnx(gs.trace(Small(lambda m, x: (m.fc(x) * 0).log() / 0 * x), X), tmp_path / FILE)
    assert report.max_absolute == 0 and len(report.rows) == 2


def test_random_output_and_changing_buffer_are_noted(tmp_path: Path) -> None:
    def run(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        model.steps.add_(1)
        return model.fc(x), model.fc(x) + torch.rand_like(x)

    report = export_onnx(gs.trace(Small(run, steps=torch.tensor(0)), X), tmp_path / FILE)
    assert {row.output for row in report.rows} == {"output_0"}
    random, buffer = report.notes
    assert "output_1 is random" in random and "buffer steps" in buffer


# The file


def test_file_is_quiet_reproducible_and_names_no_machine(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = gs.trace(Small(lambda m, x: F.gelu(m.fc(x))), X)
    first = export_onnx(program, tmp_path / "a.onnx").path.read_bytes()
    assert first == export_onnx(program, tmp_path / "b.onnx").path.read_bytes()
    assert b"fc.weight" in first and b".py" not in first and b"stack_trace" not in first
    assert capfd.readouterr() == ("", "")


def test_weights_go_to_a_second_file_only_where_one_cannot_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "SINGLE_FILE_BYTES", 1000)
    model = nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 4))
    report = export_onnx(gs.trace(model, X), tmp_path / FILE)
    assert report.files == (tmp_path / FILE, tmp_path / f"{FILE}.data")
    assert sorted(tmp_path.iterdir()) == sorted(report.files)
    assert report.bytes == sum(file.stat().st_size for file in report.files) and report.bytes > 3200
    with torch.no_grad():
        assert_close([model(X)], run_file(report.path, [X]))


def test_nothing_is_left_behind_or_replaced_by_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = gs.trace(Small(lambda m, x: (x, m.fc(x))), X)
    path = tmp_path / FILE
    before = export_onnx(program, path).path.read_bytes()
    run = onnx_export._run

    def wrong(*args: Any) -> Any:
        first, second = run(*args)
        return [first, second + np.float32(0.01)]

    monkeypatch.setattr(onnx_export, "_run", wrong)
    with pytest.raises(
        VerificationError, match=r"output output_1 .* differs from torch by 0\.01 .* at batch=3"
    ):
        export_onnx(program.with_state({"fc.bias": torch.ones(4)}), path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


@pytest.mark.parametrize(
    "change", [lambda v: v[:1], lambda v: v.astype(np.float64), lambda v: v * np.float32("nan")]
)
def test_other_shape_dtype_or_value_is_found(
    change: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = onnx_export._run
    monkeypatch.setattr(onnx_export, "_run", lambda *args: [change(value) for value in run(*args)])
    with pytest.raises(VerificationError, match="output output of the ONNX file"):
        export_onnx(gs.trace(nn.Linear(4, 4), X), tmp_path / FILE)


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    program = gs.trace(nn.Linear(4, 4), X)
    with pytest.raises(UserError, match="is a folder"):
        export_onnx(program, tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        export_onnx(program, tmp_path / "taken" / FILE)
    assert export_onnx(program, str(tmp_path / "new" / "folder" / FILE)).path.exists()


# Operator sets


@pytest.mark.parametrize("opset", [18, 21])
def test_opset(opset: int, tmp_path: Path) -> None:
    report = export_onnx(gs.trace(Small(lambda m, x: F.gelu(m.fc(x))), X), tmp_path / FILE, opset=opset)
    assert report.opset == opset
    assert {entry.version for entry in onnx.load(report.path).opset_import if not entry.domain} == {opset}


@pytest.mark.parametrize("opset", [0, 1000, True, "18"])
def test_opset_that_does_not_exist(opset: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a whole number from 1 to"):
        export_onnx(gs.trace(nn.Linear(4, 4), X), tmp_path / FILE, opset=opset)


def test_opset_that_is_too_old(tmp_path: Path) -> None:
    program = gs.trace(Small(lambda m, x: F.layer_norm(m.fc(x), (4,))), X)
    with pytest.raises(UnsupportedError, match="cannot be written in ONNX opset 9"):
        export_onnx(program, tmp_path / FILE, opset=9)


# Refusals


class Bessel(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(super().forward(x))


def test_op_without_a_translation_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match="bessel_j0 cannot be written as ONNX: No ONNX function"
    ) as caught:
        export_onnx(gs.trace(Bessel(4, 4), X), tmp_path / FILE)
    where = caught.value.where
    assert where is not None and "test_onnx.py" in where and "torch.special.bessel_j0" in where
    assert not list(tmp_path.iterdir())


def test_dtypes_that_onnx_runtime_does_not_take(tmp_path: Path) -> None:
    cases = [
        (Small(lambda m, x: torch.fft.fft(m.fc(x))), X, "output is complex64.*real and imaginary"),
        (nn.Linear(4, 4).bfloat16(), X.bfloat16(), r"args\[0\] is bfloat16.*\.float\(\)"),
        (
            nn.Conv1d(3, 4, 1).double(),
            torch.ones(2, 3, 4).double(),
            r"ONNX Runtime cannot run.*Conv.*\.float\(\)",
        ),
    ]
    for model, inputs, words in cases:
        with pytest.raises(UnsupportedError, match=words):
            export_onnx(gs.trace(model, inputs), tmp_path / FILE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floating_point_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    report = export_onnx(gs.trace(model, X.to(dtype)), tmp_path / FILE)
    assert report.max_relative < (1e-2 if dtype is torch.float16 else 1e-12)


def test_weights_without_values(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(UnsupportedError, match="is on the meta device"):
        export_onnx(gs.trace(model, X.to("meta")), tmp_path / FILE)


@pytest.mark.parametrize("thing", [nn.Linear(4, 4), io.BytesIO(), None])
def test_what_is_no_program(thing: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot export a"):
        export_onnx(thing, tmp_path / FILE)
