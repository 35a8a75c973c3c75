"""One graph for train and eval, where the two traces differ in literals only."""

from __future__ import annotations

import operator
from collections import deque
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
    if not comparison.walk(train_nodes, eval_nodes):
        return None
    if not comparison.same(train.outputs, evaluation.outputs, None):
        return None
    if not _guard_writes(train, evaluation, comparison):
        return None
    graph = train.graph
    for user, operand in comparison.copies:
        with graph.inserting_before(user):
            copy = graph.call_function(aten.contiguous.default, (operand,))
            copy.meta.update(operand.meta)
        user.replace_input_with(operand, copy)
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
    """Which node of the training graph is which of the evaluation graph, and which literals differ.

    ``contiguous()`` leaves no node where the tensor is contiguous already, which may be so in one mode alone
    (attention with dropout lays out its result otherwise than without). As it changes no value, one graph
    serves both modes, with the op wherever either mode needs it.

    Attributes:
        pairs: Nodes of the training graph to those of the evaluation graph.
        switches: Node, place and literal in training of every argument that differs.
        copies: User and operand in the training graph where only evaluation makes the operand contiguous.
    """

    pairs: dict[fx.Node, fx.Node] = field(default_factory=dict)
    switches: list[tuple[fx.Node, Any, Any]] = field(default_factory=list)
    copies: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    _skipped: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def walk(self, train: list[fx.Node], evaluation: list[fx.Node]) -> bool:
        """Bring the nodes of both graphs together, in order; False where that fails."""
        rest = deque(evaluation)
        for ours in train:
            if _is_contiguous(ours):
                if rest and _is_contiguous(rest[0]) and self.match(ours, rest[0]):
                    rest.popleft()
                else:
                    self.pairs[ours] = self.pairs[node_arg(ours)]
                continue
            self._skip(rest)
            if not rest or not self.match(ours, rest.popleft()):
                return False
        self._skip(rest)
        return not rest

    def _skip(self, rest: deque[fx.Node]) -> None:
        while rest and _is_contiguous(rest[0]):
            node = rest.popleft()
            self._skipped[node] = self._skipped.get(node_arg(node), node_arg(node))

    def match(self, ours: fx.Node, theirs: fx.Node) -> bool:
        if ours.op != theirs.op:
            return False
        if ours.op != "placeholder" and ours.target != theirs.target:
            return False
        given, wanted = _arguments(ours), _arguments(theirs)
        if given.keys() != wanted.keys():
            return False
        if not all(self.same(given[place], wanted[place], ours, place) for place in given):
            return False
        self.pairs[ours] = theirs
        return True

    def same(self, ours: Any, theirs: Any, user: fx.Node | None, place: Any = None) -> bool:
        if isinstance(ours, fx.Node) or isinstance(theirs, fx.Node):
            return isinstance(ours, fx.Node) and self._same_node(ours, theirs, user)
        if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
            return len(ours) == len(theirs) and all(
                self.same(a, b, user) for a, b in zip(ours, theirs, strict=True)
            )
        if type(ours) is type(theirs) and (ours == theirs or (ours != ours and theirs != theirs)):
            return True
        if user is None or place is None or not _is_setting(user, place):
            return False
        if ours is True and theirs is False:
            self.switches.append((user, place, True))
            return True
        if isinstance(ours, float) and theirs == 0.0:
            self.switches.append((user, place, ours))
            return True
        return False

    def _same_node(self, ours: fx.Node, theirs: Any, user: fx.Node | None) -> bool:
        found = self.pairs.get(ours)
        if found is theirs:
            return True
        if found is None or self._skipped.get(theirs) is not found:
            return False
        if user is not None:
            self.copies.append((user, ours))
        return True


def _is_contiguous(node: fx.Node) -> bool:
    return node.target is aten.contiguous.default and len(node.args) == 1 and not node.kwargs


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


def _is_setting(node: fx.Node, place: Any) -> bool:
    """Is an argument a flag or a rate, and no operand of arithmetic (``h + 0.5``)?"""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    found = arguments[place] if isinstance(place, int) else next(a for a in arguments if a.name == place)
    return str(found.type) in ("bool", "float")


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
