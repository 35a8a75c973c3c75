"""The cost model of training against measured peaks, and the choice of K."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphsplit as gs
from graphsplit.memory import parse_bytes, training_memory
from zoo import ZOO


def measured_peak(model: nn.Module, inputs: tuple[Tensor, ...], folder: Path) -> int:
    """Bytes that torch's allocator holds at most in two steps with Adam, weights included."""
    state = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    learner = torch.optim.Adam(model.parameters(), foreach=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        inputs = tuple(tensor.clone() for tensor in inputs)
        for _ in range(2):
            learner.zero_grad()
            scores = model(*inputs)
            scores = scores[0] if isinstance(scores, tuple) else scores
            targets = torch.zeros(len(scores.flatten(0, -2)), dtype=torch.long)
            functional.cross_entropy(scores.flatten(0, -2), targets).backward()
            learner.step()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory = sorted((each["ts"], each["args"]["Bytes"]) for each in events if each["name"] == "[memory]")
    return state + max(accumulate(size for _, size in memory))


def enlarged(inputs: object, times: int) -> tuple[Tensor, ...]:
    """The example inputs with each example several times, so that activations weigh more than weights."""
    assert isinstance(inputs, tuple)
    return tuple(tensor.repeat_interleave(times, 0) for tensor in inputs)


KERNELS = 0.3
"""How far oneDNN's workspaces are from those of the CPU that the model of them was made on.

They depend on the width of its vectors and on the number of threads; ``benchmarks/memory.py`` has exact ratios.
"""


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("lenet", KERNELS), ("resnet_basic", KERNELS), ("gpt", 0.06), ("densenet", KERNELS)],
)
def test_the_peak_is_what_is_measured(name: str, tolerance: float, tmp_path: Path) -> None:
    model, inputs = ZOO[name].build().train(), enlarged(ZOO[name].inputs(), 16)
    predicted = training_memory(gs.trace(model, inputs))
    assert predicted.passes > predicted.update
    assert predicted.total == pytest.approx(measured_peak(model, inputs, tmp_path), rel=tolerance)


def test_the_peak_of_many_weights_is_in_the_step_of_the_optimizer(tmp_path: Path) -> None:
    model, inputs = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 8)), (torch.zeros(4, 256),)
    predicted = training_memory(gs.trace(model, inputs))
    assert predicted.update > predicted.passes
    assert predicted.total == pytest.approx(measured_peak(model, inputs, tmp_path), rel=0.01)


class Recurrent(nn.Module):
    """One LSTM, and scores of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 64, batch_first=True)
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.lstm(x)[0][:, -1])
        return scores


def test_workspaces_of_an_lstm_are_seen(tmp_path: Path) -> None:
    model, inputs = Recurrent(), (torch.randn(16, 64, 64),)
    measured = measured_peak(model, inputs, tmp_path)
    assert training_memory(gs.trace(model, inputs)).total == pytest.approx(measured, rel=KERNELS)
    assert measured > 3 * 16 * 64 * 64 * 4  # inputs, outputs and one tensor like them are the smaller part


def test_states_of_optimizers() -> None:
    program = gs.trace(ZOO["lenet"].build(), ZOO["lenet"].inputs())
    weights = sum(entry.tensor.nbytes for entry in program.state.values())
    found = [training_memory(program, optimizer) for optimizer in ("sgd", "momentum", "adam")]
    assert [each.optimizer for each in found] == [0, weights, 2 * weights]
    assert len({(each.state, each.passes, each.update) for each in found}) == 1


def test_frozen_parameters_have_no_gradients() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 10))
    all_of_it = training_memory(gs.trace(model, torch.zeros(2, 64)))
    model[0].requires_grad_(False)
    head = sum(parameter.nbytes for parameter in model[1].parameters())
    found = training_memory(gs.trace(model, torch.zeros(2, 64)))
    assert found.state == all_of_it.state
    assert found.optimizer == 2 * head
    assert found.update < all_of_it.update


def test_sparse_gradients_are_counted_by_their_values() -> None:
    def passes(sparse: bool) -> int:
        model = nn.Sequential(nn.Embedding(1000, 16, sparse=sparse), nn.Linear(16, 32), nn.Linear(32, 5))
        return training_memory(gs.trace(model, torch.zeros(2, 4, dtype=torch.long))).passes

    table = 4 * 1000 * 16
    assert passes(True) < table < passes(False)


def test_a_model_without_parameters_to_train_costs_its_inference() -> None:
    model = nn.Linear(64, 8).requires_grad_(False)
    found = training_memory(gs.trace(model, torch.zeros(2, 64)))
    assert found.optimizer == 0
    assert found.total == found.state + 4 * 2 * (64 + 8)


def test_a_model_on_the_meta_device_costs_as_much() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10))

    with torch.device("meta"):
        far = gs.trace(build(), torch.zeros(8, 64))
    assert training_memory(far) == training_memory(gs.trace(build(), torch.zeros(8, 64)))


def test_fit_takes_the_smallest_k_that_fits() -> None:
    program = gs.trace(ZOO["gpt"].build(), ZOO["gpt"].inputs())
    costs = {
        k: max(training_memory(item).total for item in gs.partition(program, k=k).programs)
        for k in (1, 2, 3, 4)
    }
    for k, cost in costs.items():
        assert gs.partition(program, fit=cost).k == min(j for j, other in costs.items() if other <= cost)
        assert k == 4 or gs.partition(program, fit=cost - 1).k != k


def test_what_fits_by_prediction_fits_by_measurement(tmp_path: Path) -> None:
    model, inputs = ZOO["gpt"].build().train(), enlarged(ZOO["gpt"].inputs(), 16)
    measured = measured_peak(model, inputs, tmp_path)
    part = gs.partition(model, inputs, fit=int(0.8 * measured))
    assert part.k > 1
    assert measured_peak(part.submodels[0], inputs, tmp_path) <= 0.8 * measured


@pytest.mark.parametrize(
    ("text", "count"), [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), (123, 123)]
)
def test_sizes_are_read_as_people_write_them(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count
