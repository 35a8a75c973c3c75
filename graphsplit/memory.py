"""What it takes to train a program, in bytes, and the smallest K whose sub-models fit in a budget.

One step is run on fake tensors, which have shapes but no memory: forward pass, a loss, backward pass. What
ops make is added up until it is freed, and the highest sum is taken: what autograd saves, gradients of
activations while they are alive, and gradients of parameters as they come. Convolutions and LSTMs take more
than fake tensors show, in the kernels of oneDNN (`_kept` and `_scratch`). Workspaces of cuDNN and what an
allocator keeps in reserve are not counted. ``benchmarks/memory.py`` compares with measured peaks.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphsplit.costs import storage_of
from graphsplit.emission import emit
from graphsplit.errors import PartitionError
from graphsplit.program import Program

Optimizer = Literal["sgd", "momentum", "adam"]
STATES: dict[Optimizer, int] = {"sgd": 0, "momentum": 1, "adam": 2}
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
LIMIT = 256
BLOCK = 8
"""Channels that oneDNN puts together in its layout for convolutions (with AVX2)."""

aten = torch.ops.aten


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a step of the usual loop takes: ``zero_grad``, which frees gradients, both passes, ``step``.

    Attributes:
        state: Parameters, buffers and constants.
        optimizer: States of the optimizer.
        passes: The most that forward and backward pass hold at once, beyond the state: inputs, activations,
            outputs, cross-entropy, and gradients.
        update: What is held while the optimizer steps: gradients, inputs, outputs, and one temporary for each
            parameter (``foreach``: Adam's denominators, or gradients with the weight decay of SGD added).
    """

    state: int
    optimizer: int
    passes: int
    update: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.state + self.optimizer + max(self.passes, self.update)


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
    trained = sum(entry.tensor.nbytes for entry in program.state.values() if entry.requires_grad)
    passes, left = _passes(program)
    return TrainingMemory(
        state=sum(entry.tensor.nbytes for entry in program.state.values()),
        optimizer=trained * STATES[optimizer],
        passes=passes,
        update=left + trained,
    )


def _passes(program: Program) -> tuple[int, int]:
    """Bytes that forward and backward pass hold at most, and those that are left when they are done."""
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(entry.tensor) for name, entry in program.state.items()}
        module = emit(program.with_state(fake), copy=False).train()
        with _Watch(own=(*module.parameters(), *module.buffers())) as watch:
            inputs = [meta.zeros() for meta in program.signature.inputs]
            outputs = module.run_flat(inputs)
            torch.autograd.backward([_loss(output) for output in outputs if _is_learned(output)])
        return watch.peak, watch.held


class _Watch(TorchDispatchMode):
    """Adds up the storages that ops make, from when they are made until they are freed.

    Attributes:
        held: Bytes that are held now.
        peak: The most that were held at once.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.peak = 0
        self._own = {storage_of(tensor) for tensor in own}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, and take what it made into account."""
        result = func(*args, **(kwargs or {}))
        if func is aten.mkldnn_rnn_layer.default:
            self._hold(result[3], _kept(args[0], result[0]))
        for tensor in pytree.tree_leaves(result):
            # a sparse tensor consists of others, which have been seen
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._hold(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.held + _scratch(func, args, result))
        return result

    def _hold(self, tensor: Tensor, size: int) -> None:
        """Count the storage of a tensor, if that is not done yet, until it is freed."""
        address = storage_of(tensor)
        if address not in self._sizes and address not in self._own:
            self._sizes[address] = size
            self.held += size
            weakref.finalize(tensor.untyped_storage(), self._release, address)

    def _release(self, address: int) -> None:
        self.held -= self._sizes.pop(address)


def _kept(inputs: Tensor, outputs: Tensor) -> int:
    """What oneDNN's LSTM keeps for the backward pass; fake tensors give it no size.

    Four gates, and 12 states of the larger width, for each example and step: 16 values per unit where both
    widths are equal. Real ones have 15.3 to 16.1 from 64 units upwards.
    """
    units, features = outputs.shape[2], inputs.shape[2]
    return outputs.nbytes // units * (4 * units + 12 * max(units, features))


def _scratch(func: Any, args: Any, result: Any) -> int:
    """What oneDNN takes and gives back within an op.

    Convolutions copy both activations into blocks of channels. LSTMs hold four gates for each example and
    step, and two copies of the weights.
    """
    if func in (aten.convolution.default, aten.convolution_backward.default):
        source, target = (args[0], result) if func is aten.convolution.default else args[:2]
        return _blocked(source) + _blocked(target)
    if func in (aten.mkldnn_rnn_layer.default, aten.mkldnn_rnn_layer_backward.default):
        outputs: Tensor = result[0] if func is aten.mkldnn_rnn_layer.default else args[7]
        weights: tuple[Tensor, ...] = args[1:3]
        return 4 * outputs.nbytes + sum(2 * weight.nbytes for weight in weights)
    return 0


def _blocked(activation: Tensor) -> int:
    """Bytes of ``[N, C, ...]`` with C rounded up to whole blocks."""
    channels = max(activation.shape[1], 1)
    return activation.nbytes // channels * (-(-channels // BLOCK) * BLOCK)


def _is_learned(output: object) -> bool:
    return isinstance(output, Tensor) and output.requires_grad


def _loss(output: Tensor) -> Tensor:
    """As cross-entropy in what it takes: log-probabilities, their gradient and that of the output."""
    if not output.dim():
        return output
    real = torch.view_as_real(output) if output.is_complex() else output
    return functional.log_softmax(real, -1)[..., :1].mean()


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
