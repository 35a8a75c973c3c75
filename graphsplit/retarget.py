"""A graph for another dtype or device, or without noise: literals among its arguments are replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

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
        promoted = _promotes(node)
        node.kwargs = kwargs
        node.meta["value"] = tuple(map(swap, value)) if isinstance(value, tuple) else swap(value)
        if promoted and dtype_of(value.dtype) != value.dtype:
            _cast(copied, node, value, dtype_of(value.dtype))
    return copied


def _creates(node: fx.Node) -> bool:
    """Does an op make a tensor of no other, of the default dtype where none is given?"""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    takes_dtype = any(argument.name == "dtype" for argument in node.target._schema.arguments)
    return takes_dtype and not any(isinstance(x.meta.get("value"), TensorMeta) for x in node.all_input_nodes)


def _promotes(node: fx.Node) -> bool:
    """Does an op make numbers of the default dtype from whole ones, such as ``arange(n) * 0.5``?"""
    value = node.meta.get("value")
    if node.op != "call_function" or not isinstance(value, TensorMeta) or not value.dtype.is_floating_point:
        return False
    operands = [x.meta["value"] for x in node.all_input_nodes if isinstance(x.meta.get("value"), TensorMeta)]
    whole = all(not (x.dtype.is_floating_point or x.dtype.is_complex) for x in operands)
    given = any(isinstance(x, torch.dtype) for x in pytree.tree_leaves((node.args, node.kwargs)))
    cast = bool(node.users) and all(op_name(user) == "to.dtype" for user in node.users)
    return bool(operands) and whole and not given and not cast


def _cast(graph: fx.Graph, node: fx.Node, value: TensorMeta, dtype: torch.dtype) -> None:
    """Let a node that makes numbers of whole ones give another dtype, of more digits from the start."""

    def add(operand: fx.Node, meta: TensorMeta) -> fx.Node:
        cast = graph.call_function(aten.to.dtype, (operand, dtype))
        cast.meta |= {**node.meta, "value": replace(meta, dtype=dtype)}
        return cast

    whole = [x for x in node.all_input_nodes if _is_whole(x.meta.get("value"))]
    if whole and dtype.itemsize > value.dtype.itemsize:
        with graph.inserting_before(node):
            for operand in whole:
                node.replace_input_with(operand, add(operand, operand.meta["value"]))
        return
    with graph.inserting_after(node):
        cast = add(node, value)
    node.replace_all_uses_with(cast, lambda user: user is not cast)
    node.meta["value"] = value


def _is_whole(value: Any) -> bool:
    """Is it a tensor of whole numbers?"""
    if not isinstance(value, TensorMeta) or value.dtype is torch.bool:
        return False
    return not (value.dtype.is_floating_point or value.dtype.is_complex)


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
