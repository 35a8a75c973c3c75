"""The cost model of training against what autograd keeps, and the choice of K."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphsplit as gs
from graphsplit.memory import parse_bytes, training_memory
from zoo import ZOO


def kept_by_autograd(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bytes of all storages that autograd saves, the inputs and the output, on real memory.

    A kernel's own workspace (uint8, of oneDNN's LSTM) is left out: nothing but a real run tells its size.
    """
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.dtype != torch.uint8:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    for tensor in (
        *inputs,
        *(t for t in (output if isinstance(output, tuple) else (output,)) if t is not None),
    ):
        pack(tensor)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("name", ["lenet", "resnet_basic", "gpt", "lstm", "densenet"])
def test_activations_are_what_autograd_keeps(name: str) -> None:
    model = ZOO[name].build().train()
    inputs = ZOO[name].inputs()
    assert isinstance(inputs, tuple)
    program = gs.trace(model, inputs)
    found = training_memory(program)
    assert found.activations == pytest.approx(kept_by_autograd(model, inputs), rel=0.02)
    assert found.gradients == sum(p.nbytes for p in model.parameters())
    assert found.optimizer == 2 * found.gradients
    assert training_memory(program, "sgd").optimizer == 0


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


@pytest.mark.parametrize(
    ("text", "count"), [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), (123, 123)]
)
def test_sizes_are_read_as_people_write_them(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count
