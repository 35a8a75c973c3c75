"""One ONNX file of K functions: the mean of the sub-models at every batch size, with each node's part named."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn

import graphsplit as gs
from graphsplit import onnx_ensemble, onnx_export
from graphsplit.errors import InputError, UnsupportedError, UserError, VerificationError
from graphsplit.onnx_ensemble import DOMAIN, PART, export_ensemble
from graphsplit.onnx_export import OnnxReport
from graphsplit.signature import as_call
from zoo import ZOO

FILE = "ensemble.onnx"
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers and whatever follows them."""

    def __init__(self, close: Callable[[Tensor], Any], width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.norm, self.fc2 = nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 4)
        self.close = close

    def forward(self, x: Tensor) -> Any:
        return self.close(self.fc2(self.norm(self.fc1(x)).relu()))


def exported(part: gs.Partition, folder: Path, **options: Any) -> OnnxReport:
    """Export, and check all that holds for every file."""
    report = export_ensemble(part.programs, folder / FILE, **options)
    assert len(report.rows) == 2 * len(report.outputs) and all(row.ok for row in report.rows)
    assert len({tuple(row.sizes.items()) for row in report.rows}) == 2
    file = onnx.load(report.path)
    onnx.checker.check_model(str(report.path), full_check=True)
    assert [function.name for function in file.functions] == [f"submodel_{n}" for n in range(part.k)]
    calls = [node for node in file.graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in calls] == [function.name for function in file.functions]
    versions = {entry.domain: entry.version for entry in file.opset_import}
    for number, function in enumerate(file.functions):
        assert {part_of(node) for node in function.node} == {str(number)} and function.node
        assert part_of(calls[number]) == str(number) == part_of(function)
        for entry in function.opset_import:
            assert versions[entry.domain] == entry.version
        assert {node.domain for node in function.node} <= {entry.domain for entry in function.opset_import}
    assert {part_of(node) for node in file.graph.node if node.domain != DOMAIN} == {"ensemble"}
    assert {entry.key: entry.value for entry in file.metadata_props} == {"graphsplit.k": str(part.k)}
    names = [v.name for v in (*file.graph.input, *file.graph.initializer)]
    names += [name for node in file.graph.node for name in node.output]
    assert max(Counter(names).values()) == 1
    return report


def part_of(thing: Any) -> str:
    (value,) = [entry.value for entry in thing.metadata_props if entry.key == PART]
    return str(value)


def run(path: Path, *tensors: Tensor) -> list[Tensor]:
    session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    return [torch.from_numpy(np.asarray(value)) for value in session.run(None, feed)]


@pytest.mark.parametrize(
    "name", ["lenet", "gpt_head_list", "lstm", "two_in_two_out", "hub_bert_eager", "unet"]
)
def test_the_file_gives_the_mean(name: str, tmp_path: Path) -> None:
    if name.startswith("hub"):
        pytest.importorskip("transformers")
    entry = ZOO[name]
    args, kwargs = as_call(entry.inputs())
    part = gs.partition(entry.build(), args, kwargs, k=2)
    report = exported(part, tmp_path)
    leaves = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    with torch.no_grad():
        outputs = [torch.utils._pytree.tree_leaves(s.eval()(*args, **kwargs)) for s in part.submodels]
    for found, *values in zip(run(report.path, *leaves), *outputs, strict=True):
        torch.testing.assert_close(found, sum(values) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_other_numbers_of_sub_models(k: int, tmp_path: Path) -> None:
    part = gs.partition(Net(lambda y: y, width=12), X, k=k)
    report = exported(part, tmp_path)
    with torch.no_grad():
        mean = sum(submodel.eval()(X) for submodel in part.submodels) / k
    torch.testing.assert_close(run(report.path, X)[0], mean)


CLOSINGS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "softmax": (lambda y: y.softmax(-1), 0),
    "log softmax": (lambda y: y.log_softmax(-1), 0),
    "sigmoid and scores": (lambda y: (y.sigmoid(), y), 0),
    "moved": (lambda y: {"p": y.reshape(y.shape[0], 2, 2).softmax(1).transpose(1, 2).reshape(y.shape[0], 4)}, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSINGS)
def test_the_mean_is_taken_before_what_closes_the_outputs(name: str, tmp_path: Path) -> None:
    close, place = CLOSINGS[name]
    model = Net(close)
    with torch.no_grad():
        model.fc2.weight.mul_(20)
    part = gs.partition(model, X, k=2)
    report = exported(part, tmp_path)
    with torch.no_grad():
        scores = [scores_of(part, number) for number in range(2)]
        expected, closed = close((scores[0] + scores[1]) / 2), [close(score) for score in scores]
    first = torch.utils._pytree.tree_leaves(expected)[place]
    naive = sum(torch.utils._pytree.tree_leaves(value)[place] for value in closed) / 2
    found = run(report.path, X)[place]
    torch.testing.assert_close(found, first, rtol=1e-4, atol=1e-5)
    assert (naive - first).abs().max() > 0.01
    merged = torch.utils._pytree.tree_leaves(part.merge().eval()(X))[place]
    torch.testing.assert_close(found, merged, rtol=1e-4, atol=1e-5)


def scores_of(part: gs.Partition, number: int) -> Tensor:
    """What a sub-model gives before it is closed, by its own weights."""
    state = {name: entry.tensor for name, entry in part.programs[number].state.items()}
    hidden = X @ state["fc1.weight"].T + state["fc1.bias"]
    hidden = nn.functional.layer_norm(
        hidden, hidden.shape[-1:], state["norm.weight"], state["norm.bias"]
    ).relu()
    return hidden @ state["fc2.weight"].T + state["fc2.bias"]


def test_outputs_that_have_no_mean_are_those_of_the_first(tmp_path: Path) -> None:
    part = gs.partition(Net(lambda y: (y, torch.arange(y.shape[0]))), X, k=2)
    report = exported(part, tmp_path)
    assert run(report.path, X)[1].tolist() == [0, 1, 2]


def test_two_graphs_give_the_one_of_evaluation(tmp_path: Path) -> None:
    class Branch(Net):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return (y, y * 2) if self.training else y

    part = gs.partition(Branch(lambda y: y), X, k=2)
    assert part.program.branches_on_training
    assert len(exported(part, tmp_path).outputs) == 1


def test_names_that_collide(tmp_path: Path) -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add, self.submodel_0 = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, k: Tensor, sum: Tensor) -> Any:
            y = self.submodel_0(self.add(k + sum).relu())
            return {"k": y, "mean_k": y.softmax(-1), "sum": y * 2}

    part = gs.partition(Clash(), (X, X), k=2)
    report = exported(part, tmp_path)
    assert [value.name for value in report.inputs] == ["k", "sum"]
    assert [value.path for value in report.outputs] == ["output['k']", "output['mean_k']", "output['sum']"]


def test_same_weights_and_graphs_are_still_two_functions(tmp_path: Path) -> None:
    model = Net(lambda y: y)
    with torch.no_grad():
        for parameter in (model.fc1.weight, model.fc1.bias, model.fc2.weight):
            parameter.fill_(0.5)
    exported(gs.partition(model, X, k=2), tmp_path)


def test_weights_beyond_the_limit_go_to_a_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "SINGLE_FILE_BYTES", 100)
    part = gs.partition(Net(lambda y: y, width=64), X, k=2)
    report = exported(part, tmp_path)
    assert report.files == (tmp_path / FILE, tmp_path / f"{FILE}.data")
    with torch.no_grad():
        mean = sum(submodel.eval()(X) for submodel in part.submodels) / 2
    torch.testing.assert_close(run(report.path, X)[0], mean)


def test_random_and_changing_things_are_noted(tmp_path: Path) -> None:
    part = gs.partition(Net(lambda y: (y, y + torch.rand_like(y))), X, k=2)
    report = export_ensemble(part.programs, tmp_path / FILE)
    assert {row.output for row in report.rows} == {"output_0"}
    assert any("output_1 is random" in note for note in report.notes)


def test_reproducible_and_of_a_given_opset(tmp_path: Path) -> None:
    part = gs.partition(Net(lambda y: y), X, k=2)
    report = exported(part, tmp_path, opset=21, example=X)
    other = export_ensemble(part.programs, tmp_path / "other.onnx", opset=21)
    assert report.opset == 21 and report.path.read_bytes() == other.path.read_bytes()


# Refusals


def test_what_is_no_ensemble(tmp_path: Path) -> None:
    one, other = (gs.trace(Net(close), X) for close in (lambda y: y, lambda y: (y, y * 2)))
    with pytest.raises(InputError, match="sub-model 1 has other inputs or outputs"):
        export_ensemble([one, other], tmp_path / FILE)
    with pytest.raises(InputError, match="there are no sub-models"):
        export_ensemble([], tmp_path / FILE)
    with pytest.raises(UserError, match="is a folder"):
        export_ensemble([one], tmp_path)
    with pytest.raises(UnsupportedError, match="meta device"):
        part = gs.partition(Net(lambda y: y).to("meta"), X.to("meta"), k=2)
        export_ensemble(part.programs, tmp_path / FILE)
    assert not list(tmp_path.iterdir())


def test_a_wrong_mean_is_found_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = gs.partition(Net(lambda y: y), X, k=2)
    mean = onnx_ensemble._mean
    monkeypatch.setattr(onnx_ensemble, "_mean", lambda values, *rest: mean(values[:1], *rest))
    with pytest.raises(VerificationError, match="output output of the ONNX file differs"):
        export_ensemble(part.programs, tmp_path / FILE)
    assert not list(tmp_path.iterdir())
