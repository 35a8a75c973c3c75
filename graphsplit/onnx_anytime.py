"""A model with local critics as one ONNX file that leaves early.

Groups and critics stand one inside the other, in the branches of ``If`` nodes::

    features = group_0(x); scores_0 = critic_0(features)
    scores, exit = If(least confidence of scores_0 >= confidence)
        then: scores_0, 0
        else: features = group_1(features); scores_1 = critic_1(features); If ...

``confidence`` is an input of the file, so that it is chosen at run time. The batch leaves as a whole, once
each of its examples is sure; with one example at a time every example leaves where it can. The property
``graphsplit.part`` of every node says which group it belongs to.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import Tensor

from graphsplit.depth.anytime import classes_dim, least_confidence
from graphsplit.errors import InputError
from graphsplit.onnx_ensemble import IR_VERSION, PART, Names, inlined, taken_over
from graphsplit.onnx_export import (
    Case,
    Exportable,
    OnnxReport,
    check_opset,
    check_path,
    write_verified,
)
from graphsplit.program import Program, meta_of

CONFIDENCE = "confidence"
EXIT = "exit"
SCORES = "scores"


def export_anytime(
    groups: Sequence[Program],
    critics: Sequence[Program],
    mains: Sequence[int],
    path: str | os.PathLike[str],
    *,
    example: Any = None,
    opset: int | None = None,
) -> OnnxReport:
    """Write groups and critics to one ONNX file that leaves early, and compare it with torch.

    Args:
        groups: In order; each takes what the one before gives.
        critics: One for each group but the last.
        mains: Which output of each group its critic takes; of the last, which one is the answer.
        path: The file to write, as for `graphsplit.onnx_export.export_onnx`.
        example: Inputs to compare with, as there.
        opset: Version of the ONNX operator set, as there.

    Returns:
        Names, shapes, files, and the largest error, at levels of confidence that lead to every exit.

    Raises:
        InputError: The pieces do not fit together.
        UnsupportedError: ONNX has no such op.
        VerificationError: The file does not compute what torch computes.
        UserError: The file cannot be written.
    """
    path = Path(path)
    check_path(path)
    check_opset(opset)
    if not critics or len(critics) != len(groups) - 1 or len(mains) != len(groups):
        raise InputError(
            f"{len(groups)} groups with {len(critics)} critics", hint="give one critic for each cut"
        )
    pieces = [Exportable(group) for group in groups]
    heads = [Exportable(critic) for critic in critics]
    cases, notes = pieces[0].cases(example)
    answers = [_answers(pieces, heads, mains, case) for case in cases]
    file = _File(pieces, heads, mains, cases[0], opset).build()
    checked = [found for case, scores in zip(cases, answers, strict=True) for found in _cases(case, scores)]
    outputs = [str(value.name) for value in file.graph.outputs]
    names = ((*pieces[0].signature.input_names, CONFIDENCE), outputs)
    return write_verified(file, path, names, checked, notes=notes)


def _chain(pieces: Sequence[Exportable], case: Case) -> list[list[Tensor]]:
    """What each group gives."""
    values: Sequence[Tensor] = case.inputs
    found = []
    for piece in pieces:
        values = piece.run(values)
        found.append(list(values))
    return found


def _answers(
    pieces: Sequence[Exportable], heads: Sequence[Exportable], mains: Sequence[int], case: Case
) -> list[Tensor]:
    """The scores at each exit."""
    features = [values[main] for values, main in zip(_chain(pieces, case), mains, strict=True)]
    return [head.run([x])[0] for head, x in zip(heads, features[:-1], strict=True)] + [features[-1]]


def _cases(case: Case, answers: Sequence[Tensor]) -> list[Case]:
    """A case for each exit that some level of confidence leads to, the level between two that matter."""
    sure = [float(least_confidence(scores).amin()) for scores in answers[:-1]]
    found = []
    for number, scores in enumerate(answers):
        if number == len(answers) - 1:
            level = 2.0  # no probability is as high
        else:
            best = max(sure[:number], default=0.0)
            if sure[number] <= best:
                continue  # where this one is sure, one before it is
            level = (sure[number] + best) / 2
        inputs = [*case.inputs, torch.tensor(level, dtype=torch.float32)]
        found.append(Case(inputs, case.sizes, [scores, torch.tensor(number)]))
    return found


class _File:
    """The main graph under construction."""

    def __init__(
        self,
        pieces: Sequence[Exportable],
        heads: Sequence[Exportable],
        mains: Sequence[int],
        case: Case,
        opset: int | None,
    ) -> None:
        chain = _chain(pieces, case)
        inputs = [case.inputs, *chain[:-1]]
        self.groups = [
            inlined(piece, Case(given, {}, ()), opset) for piece, given in zip(pieces, inputs, strict=True)
        ]
        self.critics = [
            inlined(head, Case([values[main]], {}, ()), opset)
            for head, values, main in zip(heads, chain[:-1], mains[:-1], strict=True)
        ]
        self.mains = mains
        self.names = Names({CONFIDENCE, EXIT, SCORES})
        self.weights: list[onnx_ir.Value] = []
        self.level = _value(CONFIDENCE, onnx_ir.DataType.FLOAT, [])
        ends: Any = pieces[-1].program.graph().output_node().args[0]
        symbols = pieces[0].symbols
        dims = meta_of(ends[mains[-1]]).dims
        self.shape = [symbols.get(dim.symbol or "", dim.hint) for dim in dims]

    def build(self) -> onnx_ir.Model:
        """The whole file."""
        first = self.groups[0]
        inputs = [onnx_ir.Value(name=v.name, type=v.type, shape=v.shape) for v in first.graph.inputs]
        self.names.taken.update(str(value.name) for value in inputs)
        nodes: list[onnx_ir.Node] = []
        scores, leaving = self._stage(0, inputs, nodes)
        scores.name, leaving.name = SCORES, EXIT
        graph = onnx_ir.Graph(
            [*inputs, self.level], [scores, leaving], nodes=nodes, initializers=self.weights,
            name=first.graph.name, opset_imports=first.graph.opset_imports,
        )  # fmt: skip
        return onnx_ir.Model(
            graph,
            ir_version=max(first.ir_version, IR_VERSION),
            producer_name=first.producer_name,
            producer_version=first.producer_version,
            metadata_props={"graphsplit.n": str(len(self.groups))},
        )

    def _stage(
        self, number: int, values: Sequence[onnx_ir.Value], nodes: list[onnx_ir.Node]
    ) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """Append a group, its critic and an ``If`` with all that is behind; gives scores and exit."""
        part, shared = str(number), (nodes, self.weights, self.names)
        handed = taken_over(self.groups[number], values, *shared, part, f"group_{number}")
        features = handed[self.mains[number]]
        if number == len(self.critics):
            return self._answer(number, features, nodes)
        (scores,) = taken_over(self.critics[number], [features], *shared, part, f"critic_{number}")
        sure = self._sure(scores, number, nodes)
        branches = []
        for name in ("then_branch", "else_branch"):
            inside: list[onnx_ir.Node] = []
            if name == "then_branch":
                results = self._answer(number, scores, inside)
            else:
                results = self._stage(number + 1, handed, inside)
            graph = onnx_ir.Graph([], results, nodes=inside, name=self.names.free(f"{name}_{number}"))
            branches.append(onnx_ir.AttrGraph(name, graph))
        assert scores.dtype is not None
        outputs = [
            _value(self.names.free("scores"), scores.dtype, self.shape),
            _value(self.names.free("exit"), onnx_ir.DataType.INT64, []),
        ]
        nodes.append(self._node("If", [sure], outputs, number, branches))
        return outputs[0], outputs[1]

    def _answer(
        self, number: int, scores: onnx_ir.Value, nodes: list[onnx_ir.Node]
    ) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """Leave with these scores."""
        assert scores.dtype is not None
        given = _value(self.names.free("scores"), scores.dtype, self.shape)
        leaving = _value(self.names.free("exit"), onnx_ir.DataType.INT64, [])
        nodes.append(self._node("Identity", [scores], [given], number))
        nodes.append(self._constant(np.array(number, dtype=np.int64), leaving, number))
        return given, leaving

    def _sure(self, scores: onnx_ir.Value, number: int, nodes: list[onnx_ir.Node]) -> onnx_ir.Value:
        """Append what finds out whether every example is sure: as `least_confidence`, the least of all."""
        assert scores.dtype is not None
        floats, rank = scores.dtype, len(self.shape)
        found = [_value(self.names.free(name), floats, None) for name in ("chance", "best", "least")]
        chance, best, least = found
        if rank == 1:
            size = _value(self.names.free("size"), floats, None)
            nodes.append(self._node("Abs", [scores], [size], number))
            nodes.append(self._node("Sigmoid", [size], [best], number))
        else:
            axis = classes_dim(rank)
            nodes.append(self._node("Softmax", [scores], [chance], number, [onnx_ir.AttrInt64("axis", axis)]))
            axes = _value(self.names.free("axes"), onnx_ir.DataType.INT64, [1])
            nodes.append(self._constant(np.array([axis], dtype=np.int64), axes, number))
            kept = onnx_ir.AttrInt64("keepdims", 0)
            nodes.append(self._node("ReduceMax", [chance, axes], [best], number, [kept]))
        nodes.append(self._node("ReduceMin", [best], [least], number, [onnx_ir.AttrInt64("keepdims", 0)]))
        if floats != onnx_ir.DataType.FLOAT:
            cast = _value(self.names.free("least"), onnx_ir.DataType.FLOAT, [])
            to = onnx_ir.AttrInt64("to", int(onnx_ir.DataType.FLOAT))
            nodes.append(self._node("Cast", [least], [cast], number, [to]))
            least = cast
        sure = _value(self.names.free("sure"), onnx_ir.DataType.BOOL, [])
        nodes.append(self._node("GreaterOrEqual", [least, self.level], [sure], number))
        return sure

    def _constant(self, content: Any, value: onnx_ir.Value, number: int) -> onnx_ir.Node:
        return self._node(
            "Constant", [], [value], number, [onnx_ir.AttrTensor("value", onnx_ir.tensor(content))]
        )

    def _node(
        self,
        kind: str,
        inputs: Sequence[onnx_ir.Value],
        outputs: Sequence[onnx_ir.Value],
        number: int,
        attributes: Sequence[onnx_ir.Attr] = (),
    ) -> onnx_ir.Node:
        return onnx_ir.Node(
            "", kind, inputs, attributes, outputs=outputs, name=self.names.free(f"{number}_{kind.lower()}"),
            metadata_props={PART: str(number)},
        )  # fmt: skip


def _value(name: str, dtype: onnx_ir.DataType, shape: Sequence[int | str] | None) -> onnx_ir.Value:
    return onnx_ir.Value(
        name=name, type=onnx_ir.TensorType(dtype), shape=None if shape is None else onnx_ir.Shape(shape)
    )
