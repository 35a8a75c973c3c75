"""Which parameters can be pruned: weights, and by choice biases and the affine parameters of norms."""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from graphsplit.costs import is_contraction
from graphsplit.errors import PartitionError
from graphsplit.graphs import base_name
from graphsplit.program import TRAINING, Program

Role = Literal["weight", "bias", "norm"]

NORMS = {
    "batch_norm": (1, 2),
    "instance_norm": (1, 2),
    "layer_norm": (2, 3),
    "group_norm": (2, 3),
    "rms_norm": (2,),
}
"""Normalisations by the names of their ops, with the places of weight and bias among the arguments."""


def roles(program: Program) -> dict[str, Role]:
    """What each parameter that could be pruned is to the ops that use it.

    A *weight* has two or more dimensions and reaches a product (a matrix product, a convolution, attention, a
    recurrent layer) by ops on parameters alone, so that functional, transposed and tied weights are found. A
    *bias* has one dimension and stands beside a weight. Others (tables that are looked up, positions, slopes)
    are left out.
    """
    found: dict[str, Role] = {}
    for graph in program.graphs:
        data = _depends_on_data(graph)
        for node in graph.nodes:
            if node.op != "get_attr" or node.target == TRAINING:
                continue
            entry = program.state[str(node.target)]
            if entry.kind != "parameter" or not entry.tensor.dtype.is_floating_point:
                continue
            role = _role(node, data, entry.tensor.dim())
            if role is not None:
                found[entry.name] = role
    return {name: found[name] for name in program.state if name in found}


def prunable(program: Program, *, biases: bool = False, norms: bool = False) -> tuple[str, ...]:
    """Names of the parameters to be pruned, each once, in the order of the state.

    Raises:
        PartitionError: There are none.
    """
    wanted = {"weight"} | ({"bias"} if biases else set()) | ({"norm"} if norms else set())
    names = tuple(name for name, role in roles(program).items() if role in wanted)
    if not any(program.state[name].tensor.numel() for name in names):
        raise PartitionError(
            "the model has no weight to prune", hint="weights of linear, convolution or recurrent layers are"
        )
    return names


def _role(node: fx.Node, data: set[fx.Node], dims: int) -> Role | None:
    seen = {node}
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if isinstance(user.target, torch._ops.OpOverload) and base_name(user) in NORMS:
                return "norm"
            if is_contraction(user):
                return "weight" if dims > 1 else "bias" if dims == 1 else None
            if user not in data and user not in seen and user.op == "call_function":
                seen.add(user)
                waiting.append(user)
    return None


def _depends_on_data(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(used in found for used in node.all_input_nodes):
            found.add(node)
    return found
