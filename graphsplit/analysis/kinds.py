"""What each tensor is to K sub-models, and what a merge can do with it.

This is the type system of the merge: COMMON values are the same in all sub-models; a SPLIT one is the full
tensor of which each holds a slice; an OWN one exists once for each sub-model, with no full tensor behind it;
a MEAN one is the average over the sub-models, which is all that the outputs need where the rest of the way is
linear (eq. (1) of Miranda & Von Zuben, arXiv 1511.02954).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch
from torch import fx

from graphsplit.analysis.facts import Facts
from graphsplit.analysis.inference import MOVES, Inference, output_nodes
from graphsplit.analysis.layout import Layout, Layouts
from graphsplit.graphs import node_arg
from graphsplit.program import TensorMeta, op_name

aten = torch.ops.aten


class Kind(enum.Enum):
    """See the module's text."""

    COMMON = "common"
    SPLIT = "split"
    OWN = "own"
    MEAN = "mean"


CLOSING = {"softmax.int", "log_softmax.int", "_softmax.default", "_log_softmax.default", "sigmoid.default"}


def closing_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Softmax and sigmoid ops from which only moves lead to an output: the mean is taken before them."""
    ends = {node for node in output_nodes(graph) if isinstance(node, fx.Node)}

    def leads_out(node: fx.Node) -> bool:
        return all(user.op == "output" or (op_name(user) in MOVES and leads_out(user)) for user in node.users)

    found = set()
    for end in ends:
        node = end
        while op_name(node) in MOVES and node.op == "call_function":
            node = node_arg(node)
        if node.op == "call_function" and op_name(node) in CLOSING and leads_out(node):
            found.add(node)
    return found


@dataclass
class Kinds:
    """Layouts and kinds of every node.

    Attributes:
        layout: Of every node with one tensor result; a list for several results.
        kind: Of every node.
        apart: Nodes that a merge computes once for each sub-model.
        scaled: MEAN contractions over units: their weight, or their input, is to be divided by K.
    """

    layout: dict[fx.Node, Layout | list[Layout]] = field(default_factory=dict)
    kind: dict[fx.Node, Kind] = field(default_factory=dict)
    apart: set[fx.Node] = field(default_factory=set)
    scaled: set[fx.Node] = field(default_factory=set)
    closing: set[fx.Node] = field(default_factory=set)


def layouts_of(kinds: Kinds, node: fx.Node) -> list[Layout]:
    """Layouts of all results of a node."""
    found = kinds.layout.get(node)
    if found is None:
        return []
    return found if isinstance(found, list) else [found]


def classify(inference: Inference, layouts: Layouts) -> Kinds:
    """Layouts and kinds of every node of every graph."""
    kinds = Kinds()
    for graph in inference.program.graphs:
        closing = closing_nodes(graph)
        kinds.closing |= closing
        for node in graph.nodes:
            _lay_out(inference, layouts, kinds, node)
        refused: set[fx.Node] = set()
        while True:
            mean_ok = _linear_to_outputs(inference, graph, closing, refused)
            for node in graph.nodes:
                if node.op != "output":
                    _classify(inference, layouts, kinds, node, mean_ok)
            wrong = {
                operand
                for node in graph.nodes
                if node.op == "call_function" and kinds.kind[node] is not Kind.MEAN
                for operand in node.all_input_nodes
                if kinds.kind[operand] is Kind.MEAN
            }
            if not wrong:
                break
            refused |= wrong
    return kinds


def _lay_out(inference: Inference, layouts: Layouts, kinds: Kinds, node: fx.Node) -> None:
    value = node.meta.get("value")
    facts = inference.facts.get(node)
    if isinstance(value, TensorMeta):
        factors = facts.outputs if facts else inference.factors(node)
        assert isinstance(factors, tuple)
        kinds.layout[node] = layouts.of(value.shape, factors)
    elif isinstance(value, tuple):
        several = facts.outputs if facts else [()] * len(value)
        assert isinstance(several, list)
        kinds.layout[node] = [
            layouts.of(item.shape, factors) if isinstance(item, TensorMeta) else Layout((), (), True, 0)
            for item, factors in zip(value, several, strict=True)
        ]


def _linear_to_outputs(
    inference: Inference, graph: fx.Graph, closing: set[fx.Node], refused: set[fx.Node]
) -> set[fx.Node]:
    """Nodes whose value reaches the outputs by linear ops alone."""
    good: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in refused:
            continue
        fits = bool(node.users) and has_mean(node)
        for user in node.users:
            if user.op == "output":
                continue
            facts = inference.facts.get(user)
            linear = facts is not None and (node in facts.linear or user in closing)
            if not linear or user not in good:
                fits = False
                break
        if fits:
            good.add(node)
    return good


def has_mean(node: fx.Node) -> bool:
    """False for whole numbers and truth values, of which there is no mean of the same type."""
    value = node.meta.get("value")
    tensors = [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, TensorMeta)]
    return all(x.dtype.is_floating_point or x.dtype.is_complex for x in tensors)


def _classify(
    inference: Inference, layouts: Layouts, kinds: Kinds, node: fx.Node, mean_ok: set[fx.Node]
) -> None:
    kinds.apart.discard(node)
    kinds.scaled.discard(node)
    if node in inference.common:
        kinds.kind[node] = Kind.COMMON
        return
    if node.op == "get_attr":
        layout = kinds.layout[node]
        assert isinstance(layout, Layout)
        whole = layouts.k == 1 or (layout.active and layout.disjoint)
        kinds.kind[node] = Kind.SPLIT if whole else Kind.OWN
        return
    facts = inference.facts[node]
    found = kinds.layout.get(node)
    results = layouts_of(kinds, node)
    active = any(layout.active for layout in results)
    disjoint = all(layout.disjoint for layout in results if layout.active)
    own = [operand for operand in node.all_input_nodes if kinds.kind[operand] in (Kind.OWN, Kind.MEAN)]
    mixes = any(layouts.active_along(ids, dims) for ids, dims in facts.mixes)
    sums = any(layouts.active_along(ids, dims) for ids, dims in facts.contracts)
    if not active and node in mean_ok and _as_mean(kinds, node, facts, own, mixes, sums):
        kinds.kind[node] = Kind.MEAN
        if sums:
            kinds.scaled.add(node)
        return
    apart = layouts.k > 1 and (
        bool(own)
        or mixes
        or (sums and not (active and disjoint))
        or _outer(kinds, node, facts, results)
        or _takes_one_of_several(kinds, node)
    )
    if apart:
        kinds.apart.add(node)
        kinds.kind[node] = Kind.SPLIT if active and disjoint and isinstance(found, Layout) else Kind.OWN
    else:
        kinds.kind[node] = Kind.SPLIT if active else Kind.COMMON


def _as_mean(kinds: Kinds, node: fx.Node, facts: Facts, own: list[fx.Node], mixes: bool, sums: bool) -> bool:
    """A node whose mean over the sub-models follows from means (or full tensors) of its operands."""
    if node in kinds.closing:
        return any(kinds.kind[operand] in (Kind.MEAN, Kind.OWN) for operand in node.all_input_nodes)
    if mixes:
        return False
    if not sums:
        # Of values that each sub-model has of other units there is no mean, only of what is taken of them.
        divided = any(layout.active for operand in own for layout in layouts_of(kinds, operand))
        linear = all(operand in facts.linear and has_mean(operand) for operand in own)
        return bool(own) and linear and not divided
    weights = [
        w for w in node.all_input_nodes if isinstance(kinds.layout.get(w), Layout) and w.op == "get_attr"
    ]
    summed = [operand for operand in own if operand not in facts.linear and operand not in weights]
    # A sum over units: activations must be full tensors; a weight that some sub-models share is averaged.
    return not summed and all(
        kinds.kind[operand] is not Kind.OWN or operand.op == "get_attr" for operand in own
    )


def _takes_one_of_several(kinds: Kinds, node: fx.Node) -> bool:
    """True for the results of an op with several that is computed once for each sub-model."""
    return any(
        operand in kinds.apart and isinstance(kinds.layout.get(operand), list)
        for operand in node.all_input_nodes
    )


def _outer(kinds: Kinds, node: fx.Node, facts: Facts, results: list[Layout]) -> bool:
    """True where a result between two axes would not be zero outside of the sub-models' blocks."""
    if not any(layout.factors > 1 for layout in results):
        return False
    blocks = [
        operand for operand in node.all_input_nodes if any(x.factors > 1 for x in layouts_of(kinds, operand))
    ]
    if facts.contracts and len(blocks) == len(node.all_input_nodes):
        return False
    return not (facts.keeps_zero and blocks)
