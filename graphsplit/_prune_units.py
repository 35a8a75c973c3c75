"""The public face of pruning whole units: a smaller dense model, proved equal to the masked one."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from graphsplit._sparsify import program_to_prune
from graphsplit.bundle import PrunedBundle, without_weights
from graphsplit.costs import graph_flops
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import PartitionError
from graphsplit.module_emission import FORMS, Form, emit_modules
from graphsplit.passes.prune_units import Pruned, certify_pruned
from graphsplit.passes.prune_units import prune_units as prune_program
from graphsplit.plan import PartitionPlan
from graphsplit.program import Mode, Program
from graphsplit.signature import as_call
from graphsplit.sparsity import Method, Scope, Scoring, prunable
from graphsplit.sparsity.scores import example_of, saliency_of
from graphsplit.train.loop import Batches, Metric
from graphsplit.untouched import tensors_by_all_names
from graphsplit.verification import Certificate, Example


class PrunedUnits:
    """A model that has lost whole units. Made by `prune_units`.

    Attributes:
        pruned: The division into what is kept and what is dropped.
    """

    def __init__(self, pruned: Pruned, example: Example | None = None, form: Form = "graph") -> None:
        self.pruned = pruned
        self._example = example
        self._form: Form = form

    @property
    def axes(self) -> Mapping[str, tuple[int, int]]:
        """Axes that have lost units, by name: units before and after."""
        return self.pruned.axes

    @property
    def kept(self) -> Mapping[str, str]:
        """Axes that could not lose any, by name, with the reason."""
        return self.pruned.kept

    @property
    def plan(self) -> PartitionPlan:
        """Who holds what, as plain data: ``plan.slice_state_dict(full, 0)`` makes a checkpoint smaller."""
        return self.pruned.plan

    @property
    def program(self) -> Program:
        """The smaller model as a program."""
        return self.pruned.small

    def current_program(self) -> Program:
        """The smaller model as a program, with the values that `module` has now."""
        if "module" not in self.__dict__:
            return self.program
        return self.program.with_state(tensors_by_all_names(self.module))

    @cached_property
    def module(self) -> nn.Module:
        """The smaller model, in train mode, with the original parameter names.

        It runs the graph, or is of the user's own class where ``emit="module"`` asked for it.
        """
        if self._form == "module":
            assert self._example is not None and self.pruned.analysis is not None
            return emit_modules(self.pruned.analysis, [self.program], self._example)[0]
        return emit(self.program)

    def masked(self) -> ProgramModule:
        """The model in full size with zeros in all that belongs to dropped units."""
        return emit(self.pruned.masked())

    def flops(self) -> tuple[int, int]:
        """FLOPs of a forward pass on the example, of the given model and of the smaller one."""
        return graph_flops(self.pruned.program.graph("train")), graph_flops(self.program.graph("train"))

    def parameters(self) -> tuple[int, int]:
        """Number of parameters of the given model and of the smaller one."""
        return self.pruned.program.parameter_count(), self.program.parameter_count()

    def verify(self) -> Certificate:
        """Prove in float64, with random weights, that the smaller model is the masked one in both modes."""
        return certify_pruned(self.pruned, self._example)

    def to_bundle(self) -> PrunedBundle:
        """What `graphsplit.save` writes: the smaller model with its weights, the plan, the model without."""
        return PrunedBundle(
            without_weights(self.pruned.program), self.plan, self.current_program(), self.axes, self.kept
        )

    @classmethod
    def from_bundle(cls, found: PrunedBundle) -> PrunedUnits:
        """What a bundle holds; the weights that are gone are ones, until `masked` makes zeros of them."""
        values = {}
        for state in found.plan.state:
            if state.name in found.small.state:
                tensor = found.small.state[state.name].tensor.detach()
                full = torch.ones(state.shape, dtype=tensor.dtype, device=tensor.device)
                index = state.grid(0, tensor.device)
                full[... if index is None else index] = tensor
                values[state.name] = full.requires_grad_(found.source.state[state.name].requires_grad)
        source = found.source.with_state(values)
        return cls(Pruned(source, found.plan, found.small, found.axes, found.kept))

    def __repr__(self) -> str:
        before, after = self.parameters()
        return f"PrunedUnits of {self.program.name}: {after:,} of {before:,} parameters"


def prune_units(
    model: nn.Module | Program,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    method: Method = "magnitude",
    amount: float = 0.5,
    data: Batches | Sequence[Any] | None = None,
    loss: Metric | None = None,
    scope: Scope = "layer",
    mode: Mode = "train",
    biases: bool = False,
    norms: bool = False,
    temperature: float = 200.0,
    iterations: int = 100,
    seed: int = 0,
    outputs: Sequence[str] | None = None,
    emit: Form = "graph",
) -> PrunedUnits:
    """Drop whole units, neurons, filters, heads, channels, and give the smaller dense model.

    Args:
        model: The user's module, a sub-model or a layer group, which is not changed, or a traced `Program`.
        args: Example inputs: a tensor, a tuple by position or a dict by keyword. Where ``data`` are given
            they may be left out.
        kwargs: Further example inputs by keyword.
        method: Scores of weights, as for `sparsify`; a unit's is the sum over all that belongs to it.
        amount: Share of the units to drop, in (0, 1); at least one unit of each axis stays.
        data: As for `sparsify`.
        loss: As for `sparsify`.
        scope: Whether each axis loses this share (``"layer"``) or all of them together (``"global"``).
        mode: Of the model while it is scored.
        biases: Count the scores of biases, too.
        norms: Count those of the affine parameters of normalisations, too.
        temperature: Of GraSP.
        iterations: Rounds of SynFlow, after each of which the units that are left are scored again.
        seed: Of random scores, and of dropout while weights are scored.
        outputs: Names of the outputs to keep, as for `trace`.
        emit: What `PrunedUnits.module` is: a module that runs its ``"graph"``, or ``"module"``: a copy of the
            user's own with narrower layers.

    Raises:
        UserError: An option is out of range, or data or loss are missing.
        PartitionError: No unit can be dropped; the message says why.
        InputError: Scores are zero everywhere, or not numbers; data do not fit the model.
        UnsupportedError: An op has no smaller form, or GraSP cannot differentiate the loss twice.
        TraceError, UnsupportedError, InputError: The model cannot be traced.
    """
    scoring = Scoring(method, data, loss, mode, temperature, iterations, seed)
    scoring.check()
    if emit not in FORMS:
        raise PartitionError(f"emit is {emit!r}, expected 'graph' or 'module'")
    if emit == "module" and (isinstance(model, (Program, ProgramModule))):
        raise PartitionError(
            "emit='module' needs the user's own module, and a traced program was given",
            hint="give the module and example inputs",
        )
    if args == () and not kwargs and data is not None:
        args = example_of(data)
    program = program_to_prune(model, args, kwargs, outputs)
    names = prunable(program, biases=biases, norms=norms)
    score = functools.partial(saliency_of, names=names, scoring=scoring)
    example = None
    if args != () or kwargs:
        own = None if isinstance(model, (Program, ProgramModule)) else model
        example = Example(own, *as_call(args, kwargs))
    pruned = prune_program(program, score, amount, scope, example, scoring.rounds)
    found = PrunedUnits(pruned, example, emit)
    if emit == "module":
        _ = found.module  # refused now, or never
    return found
