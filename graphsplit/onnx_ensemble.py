"""K sub-models as one ONNX file: a function for each, and the mean of what they give.

Before, in K files::

    logits = f_0(x; w_0)
    logits = f_1(x; w_1)

After, in one file, in which weights are initializers of the main graph::

    logits = (submodel_0(x, w_0) + submodel_1(x, w_1)) / 2

The mean is taken before a closing softmax or sigmoid, as the exact merge does, and only of floating-point
outputs: others are those of the first sub-model. The property ``graphsplit.part`` of every node says which
sub-model it belongs to, or ``ensemble``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor, fx

from graphsplit.analysis.inference import MOVES
from graphsplit.analysis.kinds import CLOSING, closing_nodes
from graphsplit.errors import InputError, UnsupportedError
from graphsplit.graphs import node_arg
from graphsplit.onnx_export import (
    Case,
    Exportable,
    OnnxReport,
    check_opset,
    check_path,
    random_notes,
    to_onnx,
    write_verified,
)
from graphsplit.program import Program, meta_of, op_name, source_of
from graphsplit.signature import Outputs

aten = torch.ops.aten

DOMAIN = "graphsplit"
PART = "graphsplit.part"
WHOLE = "ensemble"
"""Value of ``PART`` for nodes that belong to no sub-model."""

IR_VERSION = 10
"""The first version of ONNX in which nodes have properties."""

SMALL_BYTES = 1024
"""Whole numbers up to this size stand in the function; what is larger is an initializer, as weights are."""


def export_ensemble(
    programs: Sequence[Program],
    path: str | os.PathLike[str],
    *,
    example: Any = None,
    opset: int | None = None,
) -> OnnxReport:
    """Write sub-models to one ONNX file that gives the mean of their outputs, and compare it with torch.

    Args:
        programs: The sub-models of one model, with the same inputs and outputs; they are not changed.
        path: The file to write, as for `graphsplit.onnx_export.export_onnx`.
        example: Inputs to compare with, as there.
        opset: Version of the ONNX operator set, as there.

    Returns:
        Names, shapes, files, and the largest error of every output.

    Raises:
        InputError: There are no programs, or they differ in inputs or outputs.
        UnsupportedError: ONNX has no such op.
        VerificationError: The file does not compute the mean that torch computes.
        UserError: The file cannot be written.
    """
    path = Path(path)
    check_path(path)
    check_opset(opset)
    _check_alike(programs)
    heads = [_open(program) for program in programs]
    models = [Exportable(head.program) for head in heads]
    cases, notes = models[0].cases(example)
    files = [inlined(model, cases[0], opset) for model in models]
    closing = heads[0].closing
    tail = None if closing is None else Exportable(closing)
    means = [_means(models, case) for case in cases]
    tail_file = None
    if tail is not None:
        tail_file = inlined(tail, Case(_taken(means[0], heads[0].closed), {}, ()), opset)
    file = _assemble(files, tail_file, heads[0])
    expected = [
        replace(case, expected=_closed(mean, tail, heads[0])) for case, mean in zip(cases, means, strict=True)
    ]
    own = [replace(cases[0], expected=model.run(cases[0].inputs)) for model in models]
    random = list(
        dict.fromkeys(
            name for model, case in zip(models, own, strict=True) for name in model.random_outputs(case)
        )
    )
    changes = dict.fromkeys(note for model in models for note in model.buffer_notes(cases[0]))
    said = (*notes, *random_notes(random), *changes)
    signature = models[0].signature
    names = (signature.input_names, signature.outputs[0].names)
    return write_verified(file, path, names, expected, random=random, notes=said)


def _check_alike(programs: Sequence[Program]) -> None:
    if not programs:
        raise InputError("there are no sub-models to export", hint="give those of a partition")
    first = programs[0].signature
    for number, program in enumerate(programs):
        signature = program.signature
        if signature.inputs != first.inputs or signature.outputs[-1].names != first.outputs[-1].names:
            raise InputError(
                f"sub-model {number} has other inputs or outputs than sub-model 0",
                hint="give the sub-models of one partition",
            )


# Before and after the mean


@dataclass(frozen=True)
class _Head:
    """A sub-model up to the values that are averaged.

    Attributes:
        program: Gives them in place of its outputs.
        closed: Numbers of the outputs that a softmax or sigmoid closes.
        closing: From their means to these outputs; None where there are none.
    """

    program: Program
    closed: tuple[int, ...]
    closing: Program | None


def _open(program: Program) -> _Head:
    graph = program.graph("eval")
    ends: Any = graph.output_node().args[0]
    closing = closing_nodes(graph)
    chains = {place: chain for place, end in enumerate(ends) if (chain := _chain(end, closing))}
    outputs = program.signature.outputs[-1]
    body = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "output":
            values[node] = body.node_copy(node, values.__getitem__)
    scores = [node_arg(chains[place][0]) if place in chains else end for place, end in enumerate(ends)]
    body.output(fx.map_arg(tuple(scores), values.__getitem__))
    opened = replace(program, graphs=(body,), signature=replace(program.signature, outputs=(outputs,)))
    tail = _tail(program, chains, outputs) if chains else None
    return _Head(opened, tuple(chains), tail)


def _chain(end: Any, closing: set[fx.Node]) -> list[fx.Node]:
    """The closing op and the moves from it to an output; nothing where none closes it."""
    chain = []
    while isinstance(end, fx.Node) and end.op == "call_function" and op_name(end) in MOVES | CLOSING:
        chain.append(end)
        if end in closing:
            return chain[::-1]
        end = node_arg(end)
    return []


def _tail(program: Program, chains: dict[int, list[fx.Node]], outputs: Outputs) -> Program:
    """Closing ops and moves as a program of its own, whose inputs are the means."""
    graph = fx.Graph()
    inputs = {place: node_arg(chain[0]) for place, chain in chains.items()}
    means = {}
    for place, score in inputs.items():
        means[place] = graph.placeholder(f"mean_{place}")
        means[place].meta.update(score.meta)
    ends = []
    for place, chain in chains.items():
        values: dict[fx.Node, fx.Node] = {inputs[place]: means[place]}
        for node in chain:
            for operand in node.all_input_nodes:
                if operand not in values:
                    values[operand] = _size(graph, node, operand, means[place])
            values[node] = graph.node_copy(node, values.__getitem__)
        ends.append(values[chain[-1]])
    graph.output(tuple(ends))
    names = tuple(outputs.names[place] for place in chains)
    signature = replace(
        program.signature,
        inputs=tuple(meta_of(node) for node in means.values()),
        input_names=tuple(f"kwargs['mean_{place}']" for place in chains),
        outputs=(replace(outputs, leaves=tuple(range(len(names))), names=names),),
    )
    return Program(program.name, (graph,), {}, signature)


def _size(graph: fx.Graph, node: fx.Node, operand: fx.Node, mean: fx.Node) -> fx.Node:
    """A size that a move needs, read from the mean."""
    value = operand.meta.get("value")
    symbol = getattr(value, "symbol", None)
    for place, dim in enumerate(meta_of(mean).dims):
        if symbol is not None and dim.symbol == symbol:
            size = graph.call_function(aten.sym_size.int, (mean, place))
            size.meta.update(operand.meta)
            return size
    raise UnsupportedError(
        f"{op_name(node)} after the closing softmax or sigmoid needs {operand.name}, which no mean tells",
        where=str(source_of(node)),
        hint="return the scores before it",
    )


def _means(models: Sequence[Exportable], case: Case) -> list[Tensor]:
    """What torch computes for the means; the first sub-model's values where there is no mean."""
    outputs = [model.run(case.inputs) for model in models]
    means = []
    for values in zip(*outputs, strict=True):
        if values[0].dtype.is_floating_point:
            total = values[0]
            for value in values[1:]:
                total = total + value
            means.append(total / len(values))
        else:
            means.append(values[0])
    return means


def _taken(values: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    return [values[place] for place in places]


def _closed(means: Sequence[Tensor], tail: Exportable | None, head: _Head) -> list[Tensor]:
    found = list(means)
    if tail is not None:
        for place, value in zip(head.closed, tail.run(_taken(means, head.closed)), strict=True):
            found[place] = value
    return found


# The file


def inlined(model: Exportable, case: Case, opset: int | None) -> onnx_ir.Model:
    """A model of one graph: functions of the exporter are written out, so that none share a name."""
    file = to_onnx(model, model.export(case.inputs), opset)
    InlinePass()(file)
    return file


def _assemble(files: Sequence[onnx_ir.Model], tail: onnx_ir.Model | None, head: _Head) -> onnx_ir.Model:
    """The main graph: calls of the functions, their mean, and what closes it."""
    first = files[0]
    imports = {**first.opset_imports, DOMAIN: 1}
    inputs = [_like(value, str(value.name)) for value in first.graph.inputs]
    outputs = [str(value.name) for value in first.graph.outputs]
    names = Names({str(value.name) for value in inputs} | set(outputs))
    weights: list[onnx_ir.Value] = []
    nodes: list[onnx_ir.Node] = []
    functions: list[onnx_ir.Function] = []
    results: list[list[onnx_ir.Value]] = []
    for part, file in enumerate(files):
        label = f"submodel_{part}"
        made = [_like(value, names.free(f"{label}.{value.name}")) for value in file.graph.outputs]
        function, given = _function(file, label, str(part), names)
        nodes.append(_node(DOMAIN, label, [*inputs, *given], made, str(part), names))
        functions.append(function)
        weights += given
        results.append(made)
    means = []
    for place, values in enumerate(zip(*results, strict=True)):
        name = names.free(f"mean_{outputs[place]}") if place in head.closed else outputs[place]
        means.append(_mean(list(values), name, nodes, names))
    ends = list(means)
    if tail is not None:
        closed = taken_over(
            tail, [means[place] for place in head.closed], nodes, weights, names, WHOLE, "closing"
        )
        for place, value in zip(head.closed, closed, strict=True):
            value.name = outputs[place]
            ends[place] = value
    graph = onnx_ir.Graph(
        inputs, ends, nodes=nodes, initializers=weights, name=first.graph.name,
        opset_imports=imports,
    )  # fmt: skip
    return onnx_ir.Model(
        graph,
        ir_version=max(first.ir_version, IR_VERSION),
        producer_name=first.producer_name,
        producer_version=first.producer_version,
        functions=functions,
        metadata_props={"graphsplit.k": str(len(files))},
    )


class Names:
    """Names of values and nodes of the main graph, each once."""

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken

    def free(self, name: str) -> str:
        """The name, with a number where it is taken."""
        found, count = name, 1
        while found in self.taken:
            count += 1
            found = f"{name}_{count}"
        self.taken.add(found)
        return found


def _like(value: onnx_ir.Value, name: str) -> onnx_ir.Value:
    return onnx_ir.Value(name=name, type=value.type, shape=value.shape)


def _node(
    domain: str, kind: str, inputs: Sequence[Any], outputs: Sequence[onnx_ir.Value], part: str, names: Names
) -> onnx_ir.Node:
    name = names.free(f"call_{kind}" if domain else f"{part}_{kind.lower()}")
    props = {PART: part}
    return onnx_ir.Node(domain, kind, inputs, outputs=outputs, name=name, metadata_props=props)


def _function(
    file: onnx_ir.Model, label: str, part: str, names: Names
) -> tuple[onnx_ir.Function, list[onnx_ir.Value]]:
    """A graph as a function whose weights are inputs, and these weights for the main graph."""
    graph = file.graph
    given = []
    constants = []
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        assert tensor is not None
        del graph.initializers[str(value.name)]
        if tensor.nbytes <= SMALL_BYTES and not tensor.dtype.is_floating_point():
            attribute = onnx_ir.AttrTensor("value", tensor)
            constant = onnx_ir.Node(
                "", "Constant", [], [attribute], num_outputs=1, name=f"constant_{value.name}"
            )
            constant.outputs[0].name = value.name
            onnx_ir.convenience.replace_all_uses_with(value, constant.outputs[0], replace_graph_outputs=True)
            constants.append(constant)
            continue
        weight = _like(value, names.free(f"{label}.{value.name}"))
        weight.const_value = tensor
        given.append(weight)
        value.const_value = None
        graph.inputs.append(value)
    if constants:
        graph.insert_before(graph[0], constants)
    used = {node.domain for node in graph.all_nodes()}
    for domain in set(graph.opset_imports) - used:
        del graph.opset_imports[domain]
    for node in graph.all_nodes():
        node.metadata_props[PART] = part
    function = onnx_ir.Function(DOMAIN, label, graph=graph, attributes=[])
    function.metadata_props[PART] = part
    return function, given


def _mean(values: list[onnx_ir.Value], name: str, nodes: list[onnx_ir.Node], names: Names) -> onnx_ir.Value:
    """Append the mean of values, or the first of them where it is no floating-point tensor."""
    first = values[0]
    result = _like(first, name)
    if len(values) == 1 or first.dtype is None or not first.dtype.is_floating_point():
        nodes.append(_node("", "Identity", [first], [result], WHOLE, names))
        return result
    total = first
    for value in values[1:]:
        both = _like(first, names.free("sum"))
        nodes.append(_node("", "Add", [total, value], [both], WHOLE, names))
        total = both
    count = onnx_ir.Value(name=names.free("k"), type=first.type, shape=onnx_ir.Shape([]))
    tensor = onnx_ir.tensor(np.array(len(values), dtype=first.dtype.numpy()))
    constant = _node("", "Constant", [], [count], WHOLE, names)
    constant.attributes.add(onnx_ir.AttrTensor("value", tensor))
    nodes += [constant, _node("", "Div", [total, count], [result], WHOLE, names)]
    return result


def taken_over(
    tail: onnx_ir.Model,
    means: Sequence[onnx_ir.Value],
    nodes: list[onnx_ir.Node],
    weights: list[onnx_ir.Value],
    names: Names,
    part: str,
    prefix: str,
) -> list[onnx_ir.Value]:
    """Append the nodes of another graph, which then start from values that are there; gives its outputs."""
    graph = tail.graph
    given = dict(zip(graph.inputs, means, strict=True))
    ends = [given.get(value, value) for value in graph.outputs]
    graph.outputs.clear()
    for value, mean in given.items():
        onnx_ir.convenience.replace_all_uses_with(value, mean)
    for value in list(graph.initializers.values()):
        del graph.initializers[str(value.name)]
        value.name = names.free(f"{prefix}.{value.name}")
        weights.append(value)
    moved = list(graph)
    graph.remove(moved)
    for node in moved:
        node.name = names.free(f"{prefix}_{node.op_type.lower()}")
        node.metadata_props[PART] = part
        for value in node.outputs:
            value.name = names.free(f"{prefix}.{value.name}")
    nodes += moved
    return ends
