"""Remove whole units: a smaller dense model.

Before::

    h = linear(x, w[8, 3]); y = linear(h, v[2, 8])

After, for half of the units::

    h = linear(x, w[4, 3]); y = linear(h, v[2, 4])

which computes what the model does with zeros in the rows of ``w`` and the columns of ``v`` that are gone. A
unit is what inference finds: a neuron, a filter, a head, a group, a channel of a residual stream with all
that is coupled to it. Its score is the sum of those of its weights.

Pruning is `partition` into what is kept and what is dropped: the same lowering makes the graph of the smaller
model, and its plan slices a checkpoint. Where an op mixes units otherwise than in a weighted sum (layer norm
over them, a softmax), the smaller model would compute something else: such an axis stays whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from graphsplit.analysis import Analysis
from graphsplit.analysis.analysis import analyse_kept
from graphsplit.analysis.dealing import Deck, Parts
from graphsplit.analysis.facts import argument
from graphsplit.analysis.inference import Inference, infer
from graphsplit.analysis.layout import Layout
from graphsplit.analysis.units import Ids, varying
from graphsplit.builder import GraphBuilder
from graphsplit.costs import Watched
from graphsplit.emission import random_state
from graphsplit.errors import PartitionError, UnsupportedError
from graphsplit.graphs import node_arg
from graphsplit.passes.base import Pass, PassResult, Programs
from graphsplit.passes.partition import extract, extract_graph
from graphsplit.plan import PartitionPlan
from graphsplit.program import Program, op_name, source_of
from graphsplit.retarget import without_noise
from graphsplit.sparsity import SCOPES, Method, Scope, Scoring, prunable
from graphsplit.sparsity.scores import saliency_of
from graphsplit.verification import (
    BOUND,
    Certificate,
    Example,
    Row,
    drawn_state,
    emitted_equals_model,
    flat_inputs,
    in_double,
    other_batch,
    outputs_error,
    quiet,
    relative_error,
    run_chain,
    tensors_error,
)

KEPT, DROPPED, WHOLE = 0, 1, -1
NORMS = {"linalg_vector_norm.default", "norm.ScalarOpt_dim", "norm.Scalar"}
WEIGHT_NORMS = {"_weight_norm.default", "_weight_norm_interface.default"}


@dataclass(frozen=True)
class Pruned:
    """A program that has lost units.

    Attributes:
        program: The given one.
        plan: Who holds what: sub-model 0 is the smaller model, sub-model 1 what is gone.
        small: The smaller model.
        axes: Axes that have lost units, by name: units before and after.
        kept: Axes that could not lose any, by name, with the reason.
        analysis: The division into what is kept and what is dropped; None for what a bundle holds.
    """

    program: Program
    plan: PartitionPlan
    small: Program
    axes: Mapping[str, tuple[int, int]]
    kept: Mapping[str, str]
    analysis: Analysis | None = None

    def masked(self, program: Program | None = None) -> Program:
        """The model in full size with zeros in all that belongs to dropped units."""
        program = program or self.program
        return program.with_state(masked_state(self.plan, program))


def masked_state(plan: PartitionPlan, program: Program) -> dict[str, Tensor]:
    """Parameters with zeros outside of what sub-model 0 holds.

    Rows brought to a length (weight norm) keep their direction, as zero has none: their length is zero.
    """
    directions = {
        str(v.target): int(argument(node, 2, "dim", 0))
        for node in program.nodes()
        if op_name(node) in WEIGHT_NORMS and (v := node_arg(node)).op == "get_attr"
    }
    values = {}
    for state in plan.state:
        entry = program.state[state.name]
        if state.kind != "parameter" or all(cut is None for cut in state.cuts):
            continue
        tensor = entry.tensor.detach().clone()
        for dim, index in enumerate(state.indices(KEPT)):
            if index is not None and dim != directions.get(state.name):
                gone = np.setdiff1d(np.arange(tensor.shape[dim]), index)
                tensor.index_fill_(dim, torch.from_numpy(gone).to(tensor.device), 0)
        values[state.name] = tensor.requires_grad_(entry.tensor.requires_grad)
    return values


def prune_units(
    program: Program,
    score: Callable[[Program], Mapping[str, Tensor]],
    amount: float = 0.5,
    scope: Scope = "layer",
    example: Example | None = None,
    rounds: int = 1,
) -> Pruned:
    """Drop the units of the smallest scores.

    Args:
        program: A traced model; it is left as it is.
        score: Gives scores of weights, by name, larger is kept; a unit's is the sum over all that belongs to
            it.
        amount: Share of the units to drop, of each axis (``"layer"``) or of all together (``"global"``). At
            least one unit of each axis stays.
        scope: See above.
        example: Inputs on which the smaller model is compared, op by op, with the masked one.
        rounds: After round t of n a share of ``(1 - amount)^(t/n)`` of the units is left, and what is left is
            scored again, in the model with zeros for what is gone.

    Raises:
        PartitionError: The amount is out of range, or no axis can lose units; the message says why.
        UnsupportedError: An op has no smaller form.
    """
    if not _is_share(amount):
        raise PartitionError(f"the amount is {amount!r}, expected a number between 0 and 1")
    if scope not in SCOPES:
        raise PartitionError(f"scope is {scope!r}, expected one of {', '.join(SCOPES)}")
    inference = infer(program, 2, outermost=True)
    held = [
        (ids, dims, f"is mixed by {_place(node)} otherwise than in a weighted sum")
        for node, facts in inference.facts.items()
        if not _ignores_zeros(node)
        for ids, dims in facts.mixes
    ]
    scores = score(program)
    while True:
        analysis, dealer = _in_rounds(inference, scores, score, amount, scope, tuple(held), rounds)
        axes, kept = _told(analysis, dealer)
        if not axes:
            _refuse(analysis, kept, amount)
        culprit = _first_difference(analysis, example)
        if culprit is None:
            return Pruned(program, analysis.plan, _small(analysis, axes), axes, kept, analysis)
        ids = _units_at(inference, culprit)
        if not any((analysis.assignment.part[one] == DROPPED).any() for one in ids):
            raise UnsupportedError(
                f"{op_name(culprit)} would compute something else without the dropped units",
                where=str(source_of(culprit)),
                hint="keep what it computes from whole, as an output of the model, or prune weights",
            )
        held += [(one, varying(one), f"would change what {_place(culprit)} computes") for one in ids]


def _in_rounds(
    inference: Inference,
    scores: Mapping[str, Tensor],
    score: Callable[[Program], Mapping[str, Tensor]],
    amount: float,
    scope: Scope,
    held: tuple[Held, ...],
    rounds: int,
) -> tuple[Analysis, _ByScore]:
    """The division after the last round."""
    program = inference.program
    gone: frozenset[int] = frozenset()
    for number in range(1, rounds):
        dealer = _ByScore(scores, 1 - (1 - amount) ** (number / rounds), scope, held, gone)
        analysis = analyse_kept(inference, dealer)
        if dealer.dropped != gone:  # else every score is as it was
            gone = dealer.dropped
            scores = score(program.with_state(masked_state(analysis.plan, program)))
    dealer = _ByScore(scores, amount, scope, held, gone)
    return analyse_kept(inference, dealer), dealer


def _is_share(amount: object) -> bool:
    return isinstance(amount, (int, float)) and not isinstance(amount, bool) and 0 < amount < 1


def _small(analysis: Analysis, axes: Mapping[str, tuple[int, int]]) -> Program:
    sizes = ", ".join(f"{name} {before} to {after}" for name, (before, after) in axes.items())
    found = extract(analysis, KEPT)
    return replace(found, notes=(*found.notes, f"pruned: {sizes}"))


def _ignores_zeros(node: fx.Node) -> bool:
    """A norm, to which units that are zero add nothing."""
    if op_name(node) not in NORMS:
        return False
    order = argument(node, 1, "ord" if "linalg" in op_name(node) else "p", 2)
    return order is None or (isinstance(order, (int, float)) and order > 0)


def _place(node: fx.Node) -> str:
    return f"{op_name(node)} ({source_of(node)})"


def _refuse(analysis: Analysis, kept: Mapping[str, str], amount: float) -> None:
    reasons = [f"{name} {reason}" for name, reason in kept.items()]
    if any(axis.size > 1 and axis.name not in kept for axis in analysis.assignment.axes):
        reasons.insert(0, f"a share of {amount} is no unit of any axis")
    reason = reasons[0] if reasons else next(iter(analysis.kept_whole), "every unit reaches an output")
    raise PartitionError(
        f"there is no unit to prune: {reason}",
        hint="prune a model that has a layer whose units meet in weighted sums alone, or its weights",
    )


Held = tuple[Ids, tuple[int, ...], str]
"""Ids of units, dimensions along which they must not be divided, and why."""


@dataclass
class _ByScore:
    """Deals the units of the largest scores to what is kept.

    Attributes:
        gone: Units that go first, as they went in a round before.
        reasons: Of units that are held, after a call.
        dropped: Units that are not kept, after a call.
    """

    scores: Mapping[str, Tensor]
    amount: float
    scope: Scope
    held: tuple[Held, ...]
    gone: frozenset[int] = frozenset()
    reasons: dict[int, str] = field(default_factory=dict)
    dropped: frozenset[int] = frozenset()

    def __call__(self, deck: Deck) -> list[Parts]:
        """What is kept of every axis."""
        self.reasons = {}
        for ids, dims, reason in self.held:
            units = deck.labels[ids]
            if any((units != units.take([0], dim)).any() for dim in dims if units.shape[dim] > 1):
                for unit in np.unique(units).tolist():
                    self.reasons.setdefault(unit, reason)
        free = [not self.reasons.keys() & set(units.tolist()) for units in deck.axes]
        value = _unit_scores(deck, self.scores)
        value[list(self.gone)] = -np.inf
        drop = self._dropped(
            [value[units] if ok else None for units, ok in zip(deck.axes, free, strict=True)]
        )
        self.dropped = frozenset(
            unit
            for units, gone in zip(deck.axes, drop, strict=True)
            if gone is not None
            for unit in units[gone].tolist()
        )
        return [
            np.where(gone, DROPPED, KEPT).astype(np.int16)
            if gone is not None and gone.any()
            else np.full(units.size, WHOLE, np.int16)
            for units, gone in zip(deck.axes, drop, strict=True)
        ]

    def _dropped(self, values: list[NDArray[np.float64] | None]) -> list[NDArray[np.bool_] | None]:
        """For each axis that can lose units which ones; the best of each stays."""
        if self.scope == "layer":
            return [None if v is None else _lowest(v, round(v.size * self.amount)) for v in values]
        open_ = [v for v in values if v is not None]
        total = np.concatenate([np.zeros(0), *open_])
        best = np.concatenate([np.zeros(0, bool), *(np.arange(v.size) == np.argmax(v) for v in open_)])
        count = min(round(total.size * self.amount), int((~best).sum()))
        gone = np.zeros(total.size, bool)
        gone[np.argsort(np.where(best, np.inf, total), kind="stable")[:count]] = True
        pieces = iter(np.split(gone, np.cumsum([v.size for v in open_])[:-1]) if open_ else [])
        return [None if v is None else next(pieces) for v in values]


def _lowest(values: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    gone = np.zeros(values.size, bool)
    # Of equal ones those that come first stay, as among weights.
    order = values.size - 1 - np.argsort(values[::-1], kind="stable")
    gone[order[: min(count, values.size - 1)]] = True
    return gone


def _unit_scores(deck: Deck, scores: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """The sum of the scores of all that belongs to a unit, by its number."""
    total = np.zeros(int(deck.labels.max()) + 1)
    for name, values in scores.items():
        for dim, ids in enumerate(deck.inference.state[name]):
            if ids is not None and ids.any():
                rest = [other for other in range(values.dim()) if other != dim]
                line = values.double().sum(rest) if rest else values.double()
                np.add.at(total, deck.labels[ids], line.cpu().numpy())
    return total


def _told(analysis: Analysis, dealer: _ByScore) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Axes that lose units, and those that cannot."""
    axes: dict[str, tuple[int, int]] = {}
    kept: dict[str, str] = {}
    assignment = analysis.assignment
    for number, axis in enumerate(assignment.axes):
        units = np.unique(assignment.unit[assignment.axis == number]).tolist()
        reason = next((dealer.reasons[unit] for unit in units if unit in dealer.reasons), None)
        if axis.counts:
            axes[axis.name] = (axis.size, axis.counts[KEPT])
        elif reason is not None:
            kept[axis.name] = reason
        elif axis.size == 1:
            kept[axis.name] = "is one unit"
    return axes, kept


def _sliced(plan: PartitionPlan, program: Program) -> dict[str, Tensor]:
    """What sub-model 0 holds of the state of a program."""
    values = {}
    for state in plan.state:
        entry = program.state[state.name]
        values[state.name] = state.slice(entry.tensor.detach(), KEPT).requires_grad_(entry.requires_grad)
    return values


# -- op by op ------------------------------------------------------------------------------------------------


class _Values(Watched):
    """Runs a graph and looks at the value of every node."""

    def __init__(self, graph: fx.Graph, state: Mapping[str, Tensor], training: bool) -> None:
        super().__init__(graph, state)
        self.training = training
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and write its value down, by its name."""
        value = super().run_node(n)
        self.seen[n.name] = value
        return value


def _first_difference(analysis: Analysis, example: Example | None) -> fx.Node | None:
    """The first op at which the smaller model differs from the masked one; none where they are equal.

    Both run in float64 with random weights, in every mode, without noise.
    """
    generator = torch.Generator().manual_seed(0)
    full, small = in_double(analysis.program), in_double(extract(analysis, KEPT))
    full = full.with_state(random_state(full, generator))
    full = full.with_state(masked_state(analysis.plan, full))
    small = small.with_state(_sliced(analysis.plan, full))
    inputs = flat_inputs(full.signature, example)
    modes = (True, False)
    graphs = analysis.program.graphs
    for number, graph in enumerate(graphs):
        become: dict[fx.Node, fx.Node] = {}
        built = extract_graph(analysis, graph, KEPT, GraphBuilder({}, analysis.program.state), become).graph
        kept = set(built.nodes)
        for training in modes if len(graphs) == 1 else modes[number : number + 1]:
            runs = []
            for program in (full, small):
                state = {name: entry.tensor.detach().clone() for name, entry in program.state.items()}
                run = _Values(without_noise(program.graphs[number]), state, training)
                with torch.no_grad():
                    run.run(*(x.clone() for x in inputs))
                runs.append(run.seen)
            for node, new in become.items():
                if node.op != "call_function" or new not in kept:
                    continue  # inputs and state; what nothing uses
                before, after = runs[0][node.name], runs[1][new.name]
                if _differs(analysis, node, before, after):
                    return node
    return None


def _differs(analysis: Analysis, node: fx.Node, before: Any, after: Any) -> bool:
    layout = analysis.kinds.layout.get(node)
    layouts = layout if isinstance(layout, list) else [layout]
    pairs = (
        zip(before, after, layouts, strict=True)
        if isinstance(before, (tuple, list)) and isinstance(layout, list)
        else [(before, after, layouts[0])]
    )
    for value, found, place in pairs:
        if isinstance(value, Tensor) and isinstance(found, Tensor) and isinstance(place, Layout):
            for dim, cut in enumerate(place.cuts):
                if cut is not None:
                    value = value.index_select(dim, torch.from_numpy(cut[KEPT]).to(value.device))
            if relative_error(found, value) > BOUND:
                return True
    return False


def _units_at(inference: Inference, node: fx.Node) -> list[Ids]:
    """Units that an op sums or mixes; all that its operands have where it says nothing."""
    facts = inference.facts[node]
    found = [ids for ids, _ in (*facts.contracts, *facts.mixes)]
    if not found:
        found = [ids for operand in node.all_input_nodes for ids in inference.factors(operand)]
    return found


# -- proof ---------------------------------------------------------------------------------------------------


def certify_pruned(pruned: Pruned, example: Example | None = None) -> Certificate:
    """Prove that the smaller model is the masked one, with random values, in both modes and without noise."""
    rows: list[Row] = []
    if example is not None and example.model is not None:
        rows += emitted_equals_model(pruned.program, example)
    plan = pruned.plan
    generator = torch.Generator().manual_seed(1)
    full, small = (in_double(quiet(program)) for program in (pruned.program, pruned.small))
    full = pruned.masked(full.with_state(drawn_state(full, generator)))
    small = small.with_state(_sliced(plan, full))
    inputs = flat_inputs(full.signature, example)
    batches = [("", inputs)]
    other = other_batch(full.signature, inputs)
    if other is not None:
        batches.append((", another batch size", other))
    for label, tensors in batches:
        for mode in ("eval", "train"):
            try:
                expected = run_chain([full], tensors, mode)
            except Exception:  # torch raises errors of many types
                if tensors is inputs:
                    raise
                continue  # the model itself takes no other batch with these inputs
            found = run_chain([small], tensors, mode)
            cuts = {state.name: state for state in plan.state}
            buffers, gradients = (
                {name: cuts[name].slice(value, KEPT) for name, value in held.items() if name in cuts}
                for held in (expected.buffers, expected.gradients)
            )
            for what, error in (
                ("outputs", outputs_error(found.outputs, expected.outputs)),
                ("buffers", tensors_error(found.buffers, buffers)),
                ("gradients", tensors_error(found.gradients, gradients)),
            ):
                rows.append(Row(f"{what} of the masked model ({mode}{label})", error, BOUND, "float64"))
    return Certificate(tuple(rows))


@dataclass(frozen=True)
class PruneUnits(Pass):
    """``prune-units(method="magnitude", amount=0.5)``: every program to a smaller one, each for itself.

    ``scoring`` holds data and loss for the methods that need them, and comes first where it is given. The
    options are those of `graphsplit.prune_units`.
    """

    name: ClassVar[str] = "prune-units"
    method: str = "magnitude"
    amount: float = 0.5
    scope: str = "layer"
    biases: bool = False
    norms: bool = False
    iterations: int = 100
    seed: int = 0
    scoring: Scoring | None = None

    def run(self, programs: Programs) -> PassResult:
        """Prune every program; how it was divided is known no longer, as its tensors have other sizes."""
        method: Method = self.method  # type: ignore[assignment]  # `Scoring.check` refuses what is none
        scope: Scope = self.scope  # type: ignore[assignment]
        scoring = self.scoring or Scoring(method, iterations=self.iterations, seed=self.seed)
        scoring.check()
        found = []
        for program in programs.items:
            names = prunable(program, biases=self.biases, norms=self.norms)
            score = functools.partial(saliency_of, names=names, scoring=scoring)
            found.append(prune_units(program, score, self.amount, scope, rounds=scoring.rounds))
        kept = {name: reason for pruned in found for name, reason in pruned.kept.items()}
        reason = "; ".join(f"{name} {why}" for name, why in kept.items())
        return PassResult(Programs(tuple(pruned.small for pruned in found)), modified=True, reason=reason)
