"""Weights of sub-models: slices, rescaled slices, or fresh ones."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, fx

from graphsplit.analysis import Analysis
from graphsplit.errors import PartitionError
from graphsplit.program import Program, op_name

Init = Literal["slice", "rescale", "fresh"]


def refuse_nan(program: Program) -> None:
    """Raise where a parameter is not a number: its slices would not be either."""
    for name, entry in program.state.items():
        if entry.kind == "parameter" and _holds_nan(entry.tensor.detach()):
            raise PartitionError(
                f"the parameter {name} holds NaN",
                hint="load other weights, or draw new ones with init='fresh'",
            )


def _holds_nan(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or not tensor.dtype.is_floating_point:
        return False
    # The sum is one pass over the memory and catches every NaN (some infinities are looked at twice).
    return bool(torch.isnan(tensor.sum())) and bool(torch.isnan(tensor).any())


def initialise(submodel: Program, analysis: Analysis, part: int, how: Init, seed: int) -> Program:
    """A sub-model with the weights that the user asked for.

    Args:
        submodel: With slices of the full model's weights.
        analysis: How the model was divided.
        part: Number of the sub-model; with ``seed`` it seeds fresh weights.
        how: ``slice``, ``rescale`` or ``fresh``.
        seed: Of the partition.
    """
    if how == "slice":
        return submodel
    if how == "fresh":
        return freshly_drawn(submodel, seed * 1_000_003 + part)
    fans = {name: fan_in_dims(node, user) for name, node, user in _weights(submodel)}
    plans = {plan.name: plan for plan in analysis.plan.state}
    values: dict[str, Tensor] = {}
    for name, entry in submodel.state.items():
        if entry.kind != "parameter":
            continue
        full = [plans[name].shape[dim] for dim in fans.get(name, ())]
        local = [entry.tensor.shape[dim] for dim in fans.get(name, ())]
        ratio = math.prod(full) / max(math.prod(local), 1)
        if ratio != 1:
            values[name] = (entry.tensor.detach() * math.sqrt(ratio)).requires_grad_(entry.requires_grad)
    return submodel.with_state(values)


def freshly_drawn(program: Program, seed: int) -> Program:
    """The program with parameters as at the start of training; buffers stay as they are.

    Weights and biases of layers are uniform within 1/sqrt(fan-in), others like the given ones.
    """
    fans = {name: fan_in_dims(node, user) for name, node, user in _weights(program)}
    biases = _biases(program, fans)
    values: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for name, entry in program.state.items():
        if entry.kind != "parameter":
            continue
        fan_in = biases.get(name)
        if not fan_in and (name in fans or name in biases):
            fan_in = math.prod(entry.tensor.shape[dim] for dim in fans.get(name, ()))
        drawn = _fresh(entry.tensor, fan_in, generator)
        values[name] = drawn.requires_grad_(entry.requires_grad)
    return program.with_state(values)


def _fresh(given: Tensor, fan_in: int | None, generator: torch.Generator) -> Tensor:
    """Uniform within 1/sqrt(fan-in) for weights and biases of layers, which is PyTorch's default.

    For others a constant where the given values are one, else normal with their mean and deviation.
    """
    shape, dtype = given.shape, given.dtype
    if given.device.type == "meta":
        return torch.empty_like(given)
    if fan_in:
        bound = 1 / math.sqrt(fan_in)
        values = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound
    else:
        given = given.detach()[torch.isfinite(given.detach())]
        if not given.numel():
            given = torch.zeros(1)
        mean = given.detach().double().mean()
        spread = given.detach().double().std(correction=0) if given.numel() > 1 else torch.zeros(())
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * spread.cpu() + mean.cpu()
    return values.to(dtype=dtype, device=given.device)


def _weights(program: Program) -> list[tuple[str, fx.Node, fx.Node]]:
    """State tensors that are the weight of a layer: (name, its node, the layer)."""
    found = []
    for node in program.nodes():
        if node.op == "get_attr":
            for user in node.users:
                if fan_in_dims(node, user):
                    found.append((str(node.target), node, user))
    return found


def fan_in_dims(node: fx.Node, user: fx.Node) -> tuple[int, ...]:
    """Dimensions of a weight that its layer sums over."""
    name = op_name(user).partition(".")[0]
    shape = node.meta["value"].shape if node.meta.get("value") is not None else ()
    if name == "linear" and user.args[1] is node:
        return (1,)
    if name.startswith("conv") and user.args[1] is node:
        kernel = tuple(range(2, len(shape)))
        return (0, *kernel) if "transpose" in name else (1, *kernel)
    if name in ("addmm", "baddbmm") and user.args[2] is node:
        return (len(shape) - 2,)
    if name in ("matmul", "bmm", "mm") and user.args[1] is node and len(shape) > 1:
        return (len(shape) - 2,)
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu") and len(shape) == 2:
        return (1,)
    return ()


def _biases(program: Program, fans: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Biases of layers, with the fan-in of the layer."""
    found = {}
    for node in program.nodes():
        place = {"linear": 2, "addmm": 0, "baddbmm": 0}.get(op_name(node).partition(".")[0])
        if op_name(node).startswith("conv"):
            place = 2
        if place is None or len(node.args) <= place:
            continue
        bias = node.args[place]
        weights = [arg for arg in node.all_input_nodes if arg.op == "get_attr" and str(arg.target) in fans]
        if isinstance(bias, fx.Node) and bias.op == "get_attr" and weights and bias not in weights:
            weight = program.state[str(weights[0].target)].tensor
            found[str(bias.target)] = math.prod(weight.shape[dim] for dim in fans[str(weights[0].target)])
    return found
