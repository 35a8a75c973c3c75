"""One op for each layer of a stacked recurrent network.

Before::

    y, h = gru(x, hx, weights, num_layers=2)

After::

    y1, h1 = gru(x, hx[0:1], weights[:4], num_layers=1)
    y, h2 = gru(dropout(y1), hx[1:2], weights[4:], num_layers=1)
    h = cat([h1, h2])

The same kernels run in the same order and draw the same random numbers, on the CPU. cuDNN draws the dropout
between layers by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import numpy as np
from torch import fx

from graphsplit.builder import GraphBuilder, aten
from graphsplit.graphs import drop_dead, int_arg, node_arg
from graphsplit.passes.base import Pass, PassResult, Programs
from graphsplit.program import Program, TensorMeta, meta_of, source_of

STACKS = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}

Lookup = Callable[[fx.Node], fx.Node]


def is_stacked(node: fx.Node) -> bool:
    """True for a recurrent op of several layers."""
    return node.target in STACKS and int_arg(node, 4) > 1


def unstack(program: Program) -> Program:
    """The program with a recurrent op for each layer; the same program where there is none to take apart."""
    if not any(is_stacked(node) for node in program.nodes()):
        return program
    return replace(program, graphs=tuple(_unstacked(graph) for graph in program.graphs))


def _unstacked(graph: fx.Graph) -> fx.Graph:
    build = GraphBuilder({})
    values: dict[fx.Node, fx.Node] = {}
    results: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in graph.nodes:
        if is_stacked(node):
            results[node] = _layers(build, node, values.__getitem__)
        elif node.target is operator.getitem and node_arg(node) in results:
            values[node] = results[node_arg(node)][int_arg(node, 1)]
        else:
            values[node] = build.graph.node_copy(node, values.__getitem__)
    drop_dead(build.graph)
    return build.graph


def _layers(build: GraphBuilder, node: fx.Node, lookup: Lookup) -> tuple[fx.Node, ...]:
    """The results of a stacked op: outputs of the last layer, and the last states of every layer."""
    arguments = cast("tuple[Any, ...]", node.args)
    x, hidden, weights, biases, count, dropout, train, bidirectional, batch_first = arguments
    train = lookup(train) if isinstance(train, fx.Node) else train
    build.source = source_of(node)
    directions = 2 if bidirectional else 1
    states = hidden if isinstance(hidden, list) else [hidden]
    each = len(weights) // count
    output: TensorMeta = node.meta["value"][0]
    last: list[list[fx.Node]] = [[] for _ in states]
    current = lookup(x)
    for layer in range(count):
        rows = np.arange(layer * directions, (layer + 1) * directions)
        own = [build.take(lookup(state), 0, rows) for state in states]
        metas = [meta_of(state) for state in own]
        args: tuple[Any, ...] = (
            current,
            own if isinstance(hidden, list) else own[0],
            [lookup(weight) for weight in weights[layer * each : (layer + 1) * each]],
            biases, 1, 0.0, train, bidirectional, batch_first,
        )  # fmt: skip
        call = build.call(node.target, args, (output, *metas))
        current = build.call(operator.getitem, (call, 0), output)
        for position, meta in enumerate(metas):
            last[position].append(build.call(operator.getitem, (call, position + 1), meta))
        if layer < count - 1 and dropout:
            current = build.call(aten.dropout.default, (current, dropout, train), output)
    joined = [
        build.call(aten.cat.default, (parts, 0), node.meta["value"][position + 1])
        for position, parts in enumerate(last)
    ]
    return current, *joined


@dataclass(frozen=True)
class Unstack(Pass):
    """``unstack``: every stacked recurrent op becomes one op a layer."""

    name: ClassVar[str] = "unstack"

    def run(self, programs: Programs) -> PassResult:
        """Take every program's stacks apart."""
        items = [unstack(program) for program in programs.items]
        if all(a is b for a, b in zip(items, programs.items, strict=True)):
            return PassResult(programs, False, "there is no recurrent op of several layers")
        return PassResult(programs.with_items(items), True)
