"""Small helpers for fx graphs, used by tracing, passes and verification alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def node_arg(node: fx.Node, position: int = 0) -> fx.Node:
    """A positional argument that is a node."""
    found = node.args[position]
    assert isinstance(found, fx.Node), node
    return found


def node_list_arg(node: fx.Node, position: int = 0) -> list[fx.Node]:
    """A positional argument that is a list of nodes."""
    found: Any = node.args[position]
    items: list[fx.Node] = list(found)
    assert all(isinstance(item, fx.Node) for item in items), node
    return items


def int_arg(node: fx.Node, position: int) -> int:
    """A positional argument that is a whole number."""
    found = node.args[position]
    assert isinstance(found, int), node
    return found


def overload_of(node: fx.Node) -> torch._ops.OpOverload[..., Any]:
    """The ATen overload that a node calls."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload), node
    return target


def base_name(node: fx.Node) -> str:
    """Name of an op without its namespace and overload."""
    name: str = overload_of(node)._schema.name
    return name.split("::")[-1]


def copy_graph(graph: fx.Graph, keep: Callable[[fx.Node], fx.Node | None] | None = None) -> fx.Graph:
    """A copy of a graph with the same node names.

    Args:
        graph: What to copy.
        keep: For a node to leave out, the node that takes its place; None keeps it.
    """
    copied = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        substitute = keep(node) if keep is not None else None
        mapping[node] = (
            copied.node_copy(node, mapping.__getitem__) if substitute is None else mapping[substitute]
        )
    return copied


def is_kept(node: fx.Node) -> bool:
    """True for nodes that act without being used.

    These are inputs, buffer writes, updates of running statistics, and draws of random numbers, without which
    those that follow would be others.
    """
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and (
        node.target._schema.is_mutable or node.target is aten.batch_norm.default or draws(node)
    )


def draws(node: fx.Node) -> bool:
    """True where an op draws random numbers."""
    return torch.Tag.nondeterministic_seeded in overload_of(node).tags


def drop_dead(graph: fx.Graph) -> bool:
    """Remove, in place, nodes that nothing uses and that do not act by themselves; True if there were any."""
    changed = False
    for node in reversed(graph.nodes):
        if not node.users and not is_kept(node):
            graph.erase_node(node)
            changed = True
    return changed


def state_node(graph: fx.Graph, name: str) -> fx.Node | None:
    """The node that reads a state tensor, if there is one."""
    return next((node for node in graph.nodes if node.op == "get_attr" and node.target == name), None)
