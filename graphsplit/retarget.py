"""A graph for another dtype or device, or without noise: literals among its arguments are replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphsplit.graphs import copy_graph
from graphsplit.program import TensorMeta, op_name

aten = torch.ops.aten

# Draw random numbers of a tensor's shape, or of a given one.
NOISE_LIKE = {"rand_like.default", "randn_like.default", "bernoulli.p", "bernoulli.default",
              "normal_functional.default", "uniform.default", "exponential.default"}  # fmt: skip
NOISE = {"rand.default", "randn.default"}
UNWRITTEN = {"empty.memory_format": aten.zeros.default, "new_empty.default": aten.new_zeros.default,
             "empty_like.default": aten.zeros_like.default}  # fmt: skip
"""Ops that give memory as it is found, and what gives zeros in its place."""
DROPOUTS = {
    "dropout.default",
    "feature_dropout.default",
    "alpha_dropout.default",
    "feature_alpha_dropout.default",
}


def retarget_graph(
    graph: fx.Graph, dtype_of: Callable[[torch.dtype], torch.dtype], device: torch.device | None = None
) -> fx.Graph:
    """A copy of a graph for other dtypes and another device.

    Args:
        graph: What to copy.
        dtype_of: The dtype that takes the place of one among the arguments, or of a created tensor.
        device: Takes the place of devices among the arguments; None leaves them.
    """

    def swap(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return dtype_of(value)
        if isinstance(value, TensorMeta):
            found = replace(value, dtype=dtype_of(value.dtype))
            return found if device is None else replace(found, device=str(device))
        if isinstance(value, torch.device) and device is not None:
            return device
        return value

    copied = copy_graph(graph)
    for node in copied.nodes:
        value = node.meta.get("value")
        node.args = tuple(swap(argument) for argument in node.args)
        kwargs = {name: swap(argument) for name, argument in node.kwargs.items()}
        if _creates(node) and isinstance(value, TensorMeta) and dtype_of(value.dtype) != value.dtype:
            kwargs["dtype"] = dtype_of(value.dtype)
        node.kwargs = kwargs
        node.meta["value"] = tuple(map(swap, value)) if isinstance(value, tuple) else swap(value)
    return copied


def _creates(node: fx.Node) -> bool:
    """Does an op make a tensor of no other, of the default dtype where none is given?"""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    takes_dtype = any(argument.name == "dtype" for argument in node.target._schema.arguments)
    return takes_dtype and not any(isinstance(x.meta.get("value"), TensorMeta) for x in node.all_input_nodes)


def without_noise(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph in which random numbers are one half, unwritten memory is zero and all is kept.

    Two rewrites of one model draw other numbers, so that their values can only be compared without.
    """
    copied = copy_graph(graph)
    for node in copied.nodes:
        name = op_name(node)
        if name in NOISE_LIKE:
            node.target, node.args, node.kwargs = aten.full_like.default, (node.args[0], 0.5), {}
        elif name in NOISE:
            node.target, node.args = aten.full.default, (node.args[0], 0.5)
        elif name in UNWRITTEN:
            node.target = UNWRITTEN[name]
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
        elif name in DROPOUTS:
            node.args = (node.args[0], 0.0, node.args[2])
        elif name == "scaled_dot_product_attention.default" and len(node.args) > 4:
            node.args = (*node.args[:4], 0.0, *node.args[5:])
    return copied


Place = tuple[torch.dtype, torch.device]


def moved_graphs(
    graphs: tuple[fx.Graph, ...], before: Place | None, after: Place | None
) -> tuple[fx.Graph, ...]:
    """Graphs of a state that was moved: dtypes and devices that stand in them go along; else the same."""
    if before is None or after is None or before == after:
        return graphs
    (old_dtype, old_device), (dtype, device) = before, after

    def dtype_of(given: torch.dtype) -> torch.dtype:
        return dtype if given == old_dtype else given

    moved = device if device != old_device else None
    return tuple(retarget_graph(graph, dtype_of, moved) for graph in graphs)


def place_of(tensors: Iterable[torch.Tensor]) -> Place | None:
    """Dtype and device of the first floating-point tensor."""
    return next(((t.dtype, t.device) for t in tensors if t.dtype.is_floating_point), None)
