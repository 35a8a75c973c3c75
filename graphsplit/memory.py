"""What it takes to train a program, in bytes, and the smallest K whose sub-models fit in a budget.

Activations are counted as autograd keeps them: the forward pass runs on fake tensors, which have shapes but
no memory, and every tensor saved for the backward pass is added up once. What a kernel keeps for itself is
not seen: oneDNN's LSTM holds about 15 values more for each unit and time step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphsplit.emission import emit
from graphsplit.errors import PartitionError
from graphsplit.program import Program, meta_of

Optimizer = Literal["sgd", "momentum", "adam"]
STATES: dict[Optimizer, int] = {"sgd": 0, "momentum": 1, "adam": 2}
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
LIMIT = 256


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one training step of a program holds at its peak.

    Attributes:
        state: Parameters, buffers and constants.
        gradients: One for each parameter that is trained.
        optimizer: States of the optimizer.
        activations: Inputs, outputs, and what autograd saves for the backward pass.
    """

    state: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.gradients + self.optimizer + self.activations


def parse_bytes(text: str | int) -> int:
    """A number of bytes: ``"8GB"`` (10⁹), ``"8GiB"`` (2³⁰), ``"500 MB"`` or a plain number.

    Raises:
        PartitionError: It is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", str(text).lower())
    if found is None or float(found[1]) <= 0:
        raise PartitionError(f"{text!r} is no size of memory", hint="write it as 8GB or 500MiB")
    return int(float(found[1]) * UNITS[found[2]])


def training_memory(program: Program, optimizer: Optimizer = "adam") -> TrainingMemory:
    """The peak of a training step, with the batch of the example inputs.

    Args:
        program: What is trained; its state may be on the meta device.
        optimizer: ``"sgd"`` (no states), ``"momentum"`` (one for each parameter) or ``"adam"`` (two).
    """
    trained = [entry.tensor for entry in program.state.values() if entry.requires_grad]
    gradients = sum(tensor.nbytes for tensor in trained)
    return TrainingMemory(
        state=sum(entry.tensor.nbytes for entry in program.state.values()),
        gradients=gradients,
        optimizer=gradients * STATES[optimizer],
        activations=_activations(program),
    )


def _activations(program: Program) -> int:
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(entry.tensor) for name, entry in program.state.items()}
        module = emit(program.with_state(fake), copy=False).train()
        own = {_address(tensor) for tensor in (*module.parameters(), *module.buffers())}
        saved: dict[int, Tensor] = {}  # kept, so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            if _address(tensor) not in own:
                saved[_address(tensor)] = tensor
            return tensor

        inputs = [_example(node) for node in program.graph("train").nodes if node.op == "placeholder"]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = module.run_flat(inputs)
        for tensor in (*inputs, *(output for output in outputs if isinstance(output, Tensor))):
            pack(tensor)
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _example(node: fx.Node) -> Tensor:
    meta = meta_of(node)
    return torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)


def smallest_k(divide: Callable[[int], Iterable[Program]], budget: int, optimizer: Optimizer = "adam") -> int:
    """The smallest K whose largest sub-model trains within a budget.

    Args:
        divide: Gives the sub-models for a K.
        budget: Bytes for one sub-model.
        optimizer: See `training_memory`.

    Raises:
        PartitionError: No K of up to 256 does; the message says what the last one tried takes.
    """
    needed: dict[int, int] = {}

    def fits(k: int) -> bool:
        needed[k] = max(training_memory(program, optimizer).total for program in divide(k))
        return needed[k] <= budget

    below, k = 0, 1
    try:
        while not fits(k):
            below, k = k, k * 2
            if k > LIMIT:
                break
    except PartitionError:
        if not needed:
            raise
        k = LIMIT + 1
    if k > LIMIT:
        raise PartitionError(
            f"no sub-model fits {_text(budget)}: at K = {below} one takes {_text(needed[below])}",
            hint="give example inputs with a smaller batch, or a larger budget",
        )
    return next((smaller for smaller in range(below + 1, k) if fits(smaller)), k)


def _text(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
