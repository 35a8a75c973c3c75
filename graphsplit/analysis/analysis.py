"""`analyse`: everything that a rewrite has to know, in one immutable answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from graphsplit.analysis.assignment import Assignment, assign
from graphsplit.analysis.dealing import Dealer, contiguous
from graphsplit.analysis.facts import argument
from graphsplit.analysis.inference import Inference, infer, state_factors
from graphsplit.analysis.kinds import Kind, Kinds, classify, has_mean
from graphsplit.analysis.layout import Layout, Layouts
from graphsplit.analysis.validity import require_valid
from graphsplit.errors import PartitionError
from graphsplit.graphs import node_arg
from graphsplit.plan import AxisPlan, Merge, PartitionPlan, StatePlan, encode_ranges
from graphsplit.program import TRAINING, Program, StateEntry, op_name, source_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Lowered:
    """Graphs of a sub-model.

    Attributes:
        graphs: As many as the program has.
        constants: Index tensors that they need.
        for_one_part: They hold indices of this sub-model, so that no other can share them.
    """

    graphs: tuple[fx.Graph, ...]
    constants: Mapping[str, StateEntry]
    for_one_part: bool


@dataclass(frozen=True)
class Analysis:
    """What is known of a program that is to be divided into K.

    Attributes:
        program: The program.
        k: Number of sub-models.
        inference: Facts about nodes.
        assignment: Who goes where.
        layouts: Slices by factors.
        kinds: Layouts and kinds of nodes.
        plan: The division as plain data.
        divided: MEAN contractions whose input a merge has to divide by K, because their weight is tied.
        kept_whole: Why units stay together: ops without a finer rule, with module path and source line.
        lowered: Graphs of the sub-models made so far, by the first sub-model that has them.
    """

    program: Program
    k: int
    inference: Inference
    assignment: Assignment
    layouts: Layouts
    kinds: Kinds
    plan: PartitionPlan
    divided: frozenset[fx.Node]
    kept_whole: tuple[str, ...]
    lowered: dict[int, Lowered] = field(default_factory=dict, repr=False, compare=False)

    def lacks_mean(self, node: fx.Node) -> bool:
        """Does an output differ between sub-models, and is of whole numbers or flags, which have no mean?"""
        return self.kinds.kind[node] is Kind.OWN and not has_mean(node)


def analyse(
    program: Program, k: int, shares: tuple[float, ...] | None = None, deal: Dealer = contiguous
) -> Analysis:
    """Find the units of a program and divide them into K sets.

    Args:
        program: A traced program.
        k: Number of sub-models, at least 1.
        shares: Relative sizes of the K sub-models; equal by default.
        deal: Says which unit goes to which sub-model.

    Raises:
        PartitionError: K is out of range, or nothing can be divided; the message names the reason.
    """
    check_k(k)
    if shares is not None and len(shares) != k:
        raise PartitionError(f"{len(shares)} shares for K = {k} sub-models")
    if not any(entry.kind == "parameter" for entry in program.state.values()):
        raise PartitionError("the model has no parameters, so there is nothing to divide")
    _refuse_complex(program)
    inference = infer(program, k)
    assignment = assign(inference, shares, deal)
    found = _analysis(program, inference, assignment)
    _refuse_nothing(inference, assignment, found.kept_whole)
    require_valid(inference, assignment, found.plan)
    return found


def analyse_kept(inference: Inference, deal: Dealer) -> Analysis:
    """The division into what is kept (sub-model 0) and what is dropped (sub-model 1), which is no model.

    Args:
        inference: For K = 2, with the outer dimension as units.
        deal: Gives 0 for units that are kept, 1 for the others, and for axes that lose nothing -1.

    Raises:
        PartitionError: There is nothing to divide.
    """
    program = inference.program
    _refuse_complex(program)
    return _analysis(program, inference, assign(inference, None, deal, needed=1))


def _analysis(program: Program, inference: Inference, assignment: Assignment) -> Analysis:
    k = inference.k
    layouts = Layouts(assignment, k)
    kept = tuple(
        f"{facts.whole} ({source_of(node)})"
        for node, facts in inference.facts.items()
        if facts.whole is not None
    )
    kinds = classify(inference, layouts)
    plan, divided = _plan(program, inference, layouts, kinds, assignment, k)
    return Analysis(program, k, inference, assignment, layouts, kinds, plan, divided, kept)


def check_k(k: object) -> None:
    """Raise where the number of sub-models is none.

    Raises:
        PartitionError: ``k`` is no whole number of at least 1.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise PartitionError(f"K is {k!r}, expected a whole number of at least 1")


def _refuse_complex(program: Program) -> None:
    for name, entry in program.state.items():
        if entry.kind == "parameter" and entry.tensor.is_complex():
            raise PartitionError(
                f"the parameter {name} is complex, which has no rules yet",
                hint="hold its real and imaginary parts as two parameters",
            )


def _refuse_nothing(inference: Inference, assignment: Assignment, kept: tuple[str, ...]) -> None:
    k = inference.k
    if k == 1 or any(axis.counts for axis in assignment.axes):
        return
    reason = f"; {kept[0]}" if kept else ""
    if not kept and inference.holding:
        node = inference.holding[0]
        reason = f"; {op_name(node)} keeps units whole ({source_of(node)})"
    if assignment.axes:
        largest = max(assignment.axes, key=lambda axis: axis.size)
        raise PartitionError(
            f"K = {k} is larger than every axis: the widest, {largest.name}, has {largest.size} units"
            f"{reason}",
            hint=f"choose K of at most {largest.size}" if largest.size > 1 else "every axis is one unit",
        )
    raise PartitionError(
        f"there is nothing to split: every unit reaches an output or is held together{reason}",
        hint="the outputs of a model are shared by all sub-models: give the model a head, "
        "or return less of its hidden state",
    )


def _plan(
    program: Program, inference: Inference, layouts: Layouts, kinds: Kinds, assignment: Assignment, k: int
) -> tuple[PartitionPlan, frozenset[fx.Node]]:
    uses = _uses(program)
    merges, scales, divided = _merges(program, inference, kinds, uses, k)
    states = []
    ranges: dict[int, tuple[str, ...]] = {}  # of a cut, which many tensors share
    for name, entry in program.state.items():
        shape = tuple(entry.tensor.shape)
        merge: Merge = merges.get(name, "common") if name in inference.own else "common"
        if name in inference.own:
            layout = layouts.of(shape, state_factors(inference.state[name], shape))
        else:
            layout = Layout(shape, (None,) * len(shape), True, 0)
        for cut in layout.cuts:
            if cut is not None and id(cut) not in ranges:
                ranges[id(cut)] = tuple(encode_ranges(index) for index in cut)
        cuts = tuple(None if cut is None else ranges[id(cut)] for cut in layout.cuts)
        states.append(
            StatePlan(
                name, entry.kind, shape, cuts, merge, scales.get(name, 1.0), entry.aliases, entry.persistent
            )
        )
    axes = tuple(AxisPlan(a.name, a.size, a.counts, a.places) for a in assignment.axes)
    return PartitionPlan(k, program.name, axes, tuple(states)), divided


def _uses(program: Program) -> dict[str, list[tuple[fx.Node, fx.Node]]]:
    """For each state tensor the pairs of (its get_attr node, a node that uses it)."""
    uses: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
    for node in program.nodes():
        if node.op == "get_attr" and node.target != TRAINING:
            uses.setdefault(str(node.target), []).extend((node, user) for user in node.users)
    return uses


def _merges(
    program: Program,
    inference: Inference,
    kinds: Kinds,
    uses: dict[str, list[tuple[fx.Node, fx.Node]]],
    k: int,
) -> tuple[dict[str, Merge], dict[str, float], frozenset[fx.Node]]:
    """How each state tensor is merged, factors, and contractions whose input has to be divided by K."""
    merges: dict[str, Merge] = {}
    scales: dict[str, float] = {}
    weighted: set[fx.Node] = set()
    for name in inference.state:
        pairs = uses.get(name, [])
        nodes = {node for node, _ in pairs}
        own = any(kinds.kind[node] is Kind.OWN for node in nodes) or (not pairs and k > 1)
        summed = [user for node, user in pairs if user in kinds.scaled and node is _weight(user, kinds)]
        if pairs and len(summed) == len(pairs):
            merges[name] = "average"
            weighted.update(summed)
        elif own:
            only_mean = bool(pairs) and all(kinds.kind.get(user) is Kind.MEAN for _, user in pairs)
            merges[name] = "average" if only_mean else "stack"
        else:
            merges[name] = "place"
    left = kinds.scaled - weighted
    for node in sorted(left, key=lambda n: n.name):
        affine = _affine_before(program, node, kinds, uses)
        if affine is not None and all(merges.get(name) == "place" and name not in scales for name in affine):
            for name in affine:
                scales[name] = 1.0 / k
            left = left - {node}
    return merges, scales, frozenset(left)


def _weight(node: fx.Node, kinds: Kinds) -> fx.Node | None:
    """The weight of a contraction, where it is a state tensor itself."""
    inside = []
    for operand in node.all_input_nodes:
        layout = kinds.layout.get(operand)
        if operand.op == "get_attr" and isinstance(layout, Layout) and layout.active:
            inside.append(operand)
    return inside[0] if len(inside) == 1 else None


NORMS = {
    "layer_norm.default": (2, 3),
    "rms_norm.default": (2,),
    "batch_norm.default": (1, 2),
    "group_norm.default": (2, 3),
}
PASSES = {
    "dropout.default", "to.dtype", "contiguous.default", "clone.default", "view.default", "reshape.default",
    "flatten.using_ints", "permute.default", "transpose.int", "alias.default", "slice.Tensor", "select.int",
    "index.Tensor", "adaptive_avg_pool2d.default", "mean.dim", "type_as.default",
}  # fmt: skip


def _affine_before(
    program: Program, node: fx.Node, kinds: Kinds, uses: dict[str, list[tuple[fx.Node, fx.Node]]]
) -> list[str] | None:
    """Parameters of the affine op before a tied output layer, into which the division by K can be folded."""
    if program.branches_on_training:
        return None
    current = next((n for n in node.all_input_nodes if n.op == "call_function" and len(n.users) == 1), None)
    while current is not None and current.op == "call_function" and len(current.users) == 1:
        name = op_name(current)
        if name in NORMS:
            affine = [argument(current, place, "") for place in NORMS[name]]
            if len(current.args) <= NORMS[name][0]:
                affine = [current.kwargs.get("weight"), current.kwargs.get("bias")]
            return _single_use([a for a in affine if isinstance(a, fx.Node)], uses)
        if name == "mul.Tensor":
            state = [a for a in current.all_input_nodes if a.op == "get_attr" and kinds.kind[a] is Kind.SPLIT]
            if state:
                return _single_use(state, uses)
            if not isinstance(current.args[1], fx.Node):
                current = node_arg(current)
                continue
            return None
        if name == "linear.default" and current not in kinds.scaled and current not in kinds.apart:
            return _single_use([a for a in current.args[1:] if isinstance(a, fx.Node)], uses)
        if name not in PASSES or not isinstance(current.args[0], fx.Node):
            return None
        current = current.args[0]
    return None


def _single_use(nodes: list[fx.Node], uses: dict[str, list[tuple[fx.Node, fx.Node]]]) -> list[str] | None:
    if not nodes or any(node.op != "get_attr" or len(uses[str(node.target)]) != 1 for node in nodes):
        return None
    return [str(node.target) for node in nodes]
