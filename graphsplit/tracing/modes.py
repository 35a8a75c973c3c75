"""One graph for train and eval, where the two traces differ in literals only."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphsplit.graphs import drop_dead, is_kept, node_arg, overload_of, state_node
from graphsplit.program import TRAINING
from graphsplit.tracing.functionalize import FunctionalGraph

aten = torch.ops.aten


def finish(functional: FunctionalGraph) -> fx.Graph:
    """Close a functional graph: write buffers, return outputs, drop what is dead."""
    graph = functional.graph
    for name, value in functional.writes.items():
        _write(graph, name, value)
    graph.output(functional.outputs)
    drop_dead(graph)
    return graph


def _write(graph: fx.Graph, name: str, value: fx.Node) -> None:
    target = state_node(graph, name)
    if target is None:
        target = graph.create_node("get_attr", name)
        target.meta["value"] = value.meta["value"]
    copy = graph.call_function(aten.copy_.default, (target, value))
    copy.meta.update(value.meta)


def merge_modes(train: FunctionalGraph, evaluation: FunctionalGraph) -> fx.Graph | None:
    """The training graph with its ``training`` literals bound to the module's flag.

    Returns None where the graphs differ in more than literals: the model branches on ``self.training``.
    """
    comparison = _Comparison()
    both = [name for name in evaluation.writes if name in train.writes]
    train_nodes = _live(train, (train.outputs, [train.writes[name] for name in both]))
    eval_nodes = _live(evaluation, (evaluation.outputs, [evaluation.writes[name] for name in both]))
    if len(train_nodes) != len(eval_nodes):
        return None
    for ours, theirs in zip(train_nodes, eval_nodes, strict=True):
        if not comparison.match(ours, theirs):
            return None
    if not comparison.same(train.outputs, evaluation.outputs, None):
        return None
    if not _guard_writes(train, evaluation, comparison):
        return None
    graph = train.graph
    if comparison.switches:
        _bind_switches(graph, comparison.switches)
    graph.output(train.outputs)
    drop_dead(graph)
    return graph


def _live(functional: FunctionalGraph, roots: Any) -> list[fx.Node]:
    """Nodes that the outputs need and that act by themselves, in order; buffer writes are compared apart."""
    needed: set[fx.Node] = {node for node in functional.graph.nodes if is_kept(node)}
    fx.map_arg(roots, needed.add)
    for node in reversed(functional.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in functional.graph.nodes if node in needed]


@dataclass
class _Comparison:
    """Which node of the training graph is which of the evaluation graph, and which literals differ."""

    pairs: dict[fx.Node, fx.Node] = field(default_factory=dict)
    switches: list[tuple[fx.Node, Any, Any]] = field(default_factory=list)  # node, place, train literal

    def match(self, ours: fx.Node, theirs: fx.Node) -> bool:
        if ours.op != theirs.op:
            return False
        if ours.op != "placeholder" and ours.target != theirs.target:
            return False
        self.pairs[ours] = theirs
        given, wanted = _arguments(ours), _arguments(theirs)
        return given.keys() == wanted.keys() and all(
            self.same(given[place], wanted[place], (ours, place)) for place in given
        )

    def same(self, ours: Any, theirs: Any, place: tuple[fx.Node, Any] | None) -> bool:
        if isinstance(ours, fx.Node) or isinstance(theirs, fx.Node):
            return isinstance(ours, fx.Node) and self.pairs.get(ours) is theirs
        if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
            return len(ours) == len(theirs) and all(
                self.same(a, b, None) for a, b in zip(ours, theirs, strict=True)
            )
        if type(ours) is type(theirs) and (ours == theirs or (ours != ours and theirs != theirs)):
            return True
        if place is None:
            return False
        if ours is True and theirs is False:
            self.switches.append((*place, True))
            return True
        if isinstance(ours, float) and theirs == 0.0:
            self.switches.append((*place, ours))
            return True
        return False


def _arguments(node: fx.Node) -> dict[Any, Any]:
    """Arguments by position, or by name where only that goes, with the defaults that were left out."""
    places: dict[Any, Any] = dict(enumerate(node.args))
    places |= node.kwargs
    if isinstance(node.target, torch._ops.OpOverload):
        for position, argument in enumerate(node.target._schema.arguments):
            by_name = argument.kwarg_only or argument.name in node.kwargs
            place = argument.name if by_name else position
            if place not in places and argument.has_default_value():
                places[place] = argument.default_value
    return places


def _guard_writes(train: FunctionalGraph, evaluation: FunctionalGraph, comparison: _Comparison) -> bool:
    """Bring buffer writes together: the same in both modes, or a counter that only training increases."""
    if not set(evaluation.writes) <= set(train.writes):
        return False
    for name, value in train.writes.items():
        if name in evaluation.writes:
            if comparison.pairs.get(value) is not evaluation.writes[name]:
                return False
        else:
            # batch_norm's num_batches_tracked: add `training`, which is 1 or 0, once for each call.
            while value.target is aten.add.Tensor and isinstance(value.args[1], (int, float)):
                step = value.args[1]
                comparison.switches.append((value, 1, True if step == 1 else step))
                value = node_arg(value)
            if value.op != "get_attr" or value.target != name:
                return False
    for name, value in train.writes.items():
        _write(train.graph, name, value)
    return True


def _bind_switches(graph: fx.Graph, switches: list[tuple[fx.Node, Any, Any]]) -> None:
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        training = graph.create_node("get_attr", TRAINING)
        training.meta["value"] = None
    scaled: dict[Any, fx.Node] = {}
    for node, place, literal in switches:
        value = training
        if literal is not True:
            if literal not in scaled:
                with graph.inserting_after(training):
                    scaled[literal] = graph.call_function(operator.mul, (literal, training))
                    scaled[literal].meta["value"] = None
            value = scaled[literal]
        if isinstance(place, int):
            missing = overload_of(node)._schema.arguments[len(node.args) : place]
            node.args = (*node.args, *(argument.default_value for argument in missing))
            node.args = (*node.args[:place], value, *node.args[place + 1 :])
        else:
            node.update_kwarg(place, value)
