"""The public face of fusion: K models of one architecture as one module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphsplit.bundle import FusedBundle, program_of, without_weights
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import PlanError, UserError
from graphsplit.fusion.cost import FusionCost
from graphsplit.fusion.placement import Placement
from graphsplit.passes.fuse import Fused, fuse_where_it_pays, part_of
from graphsplit.passes.fuse import fuse as fuse_programs
from graphsplit.program import Mode, Program
from graphsplit.retarget import Place, moved_graphs
from graphsplit.signature import as_call
from graphsplit.tracing import trace
from graphsplit.untouched import tensors_by_all_names
from graphsplit.verification import (
    BOUND,
    Certificate,
    Ran,
    Row,
    drawn_state,
    flat_inputs,
    in_double,
    other_batch,
    outputs_error,
    quiet,
    random_input,
    run_chain,
    tensors_error,
)

_KNOWN = "what it knows."  # no name of a part of a model, as there is a dot in it


def known(module: FusedModule) -> _Known:
    """What a fused module knows of itself, whatever its models' parts are called."""
    found: _Known = module.__dict__[_KNOWN]
    return found


@dataclass(frozen=True)
class _Known:
    """What a fused module knows of itself; see `Fused`."""

    k: int
    placements: Mapping[str, Placement]
    singles: tuple[Program, ...]
    looped: Mapping[str, int]
    in_turn: bool
    cost: FusionCost | None


class FusedModule(ProgramModule):
    """K models of one architecture, in which every op does the work of all. Made by `fuse`.

    Takes what one model takes, or one input for each model on a leading dimension of K; gives the outputs of
    all on a leading dimension of K. Parameters have their original names, and each holds those of all models,
    in the shape in which the ops read it: one optimizer trains all, and with a loss that is the sum of theirs
    each has its own gradient. `models` and `state_dicts` give each model's own, as views.

    What it knows of itself (`k`, `looped`, `in_turn`, `cost`) gives way to a part of the models with its
    name: where they have a layer ``k``, ``fused.k`` is that.
    """

    _SHARED: ClassVar[set[str]] = {*ProgramModule._SHARED, _KNOWN}
    _YIELDING: ClassVar[set[str]] = {*ProgramModule._YIELDING, "k", "looped", "in_turn", "cost"}

    def __init__(self, fused: Fused) -> None:
        super().__init__(fused.program, copy=False)
        single = fused.singles[0]
        placements = {
            name: each for first, each in fused.placements.items() for name in _names(single, first)
        }
        singles = tuple(map(without_weights, fused.singles))
        own = _Known(fused.k, placements, singles, dict(fused.looped), fused.in_turn, fused.cost)
        self.__dict__[_KNOWN] = own

    @property
    def k(self) -> int:
        """Number of models."""
        return self._yielded("k", known(self).k)

    @property
    def looped(self) -> Mapping[str, int]:
        """How many ops of each name run once for each model, as they have no better way."""
        return self._yielded("looped", known(self).looped)

    @property
    def in_turn(self) -> bool:
        """Every op does, as it was asked for what pays, and fusing did not."""
        return self._yielded("in_turn", known(self).in_turn)

    @property
    def cost(self) -> FusionCost | None:
        """What was measured to find that out."""
        return self._yielded("cost", known(self).cost)

    def state_dicts(self) -> list[dict[str, Tensor]]:
        """The state of each model under the original names; the tensors are views of this module's."""
        saved, own = self.state_dict(), known(self)
        return [part_of(own.placements, saved, number, own.k) for number in range(own.k)]

    def models(self) -> list[ProgramModule]:
        """Each model as a module of its own, whose parameters and gradients are views of this module's."""
        named, own = tensors_by_all_names(self), known(self)
        found = []
        for number, single in enumerate(_of_each(own.singles, own.k)):
            model = emit(single.with_state(self._state_of(named, number)), copy=False).train(self.training)
            for name, parameter in model.named_parameters():
                gradient = named[name].grad
                if gradient is not None:
                    parameter.grad = own.placements[name].part(gradient, number, own.k)
            found.append(model)
        return found

    def _state_of(self, named: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        detached = {name: tensor.detach() for name, tensor in named.items()}
        own = part_of(known(self).placements, detached, number, known(self).k)
        return {name: tensor.requires_grad_(named[name].requires_grad) for name, tensor in own.items()}

    def load_models(self, models: Sequence[nn.Module | Mapping[str, Tensor]]) -> None:
        """Take over the values of K models, or of their state dicts.

        Raises:
            PlanError: There are not K of them, or one has other tensors.
        """
        placements, k = known(self).placements, known(self).k
        if len(models) != k:
            raise PlanError(f"{len(models)} models for {k}")
        states = [model.state_dict() if isinstance(model, nn.Module) else model for model in models]
        with torch.no_grad():
            for name, tensor in self.state_dict().items():
                if name not in placements:
                    continue
                placement = placements[name]
                own = placement.part(tensor, 0, k)
                for number, state in enumerate(states):
                    if name not in state or state[name].shape != own.shape:
                        raise PlanError(
                            f"model {number} has no {name} of shape {list(own.shape)}",
                            hint="these values belong to another model",
                        )
                    if placement.kind == "same" and not torch.equal(states[0][name], state[name]):
                        raise PlanError(
                            f"{name} is one tensor for all models, and model {number} has other values of it",
                            hint="fuse these models anew",
                        )
                tensor.copy_(placement.together([state[name] for state in states]))

    def load_optimizers(
        self,
        optimizer: Optimizer,
        optimizers: Sequence[Optimizer],
        models: Sequence[nn.Module],
    ) -> None:
        """Go on fused where K optimizers have stopped: momenta and moments are put together.

        Args:
            optimizer: Of this module's parameters, of the same class.
            optimizers: Of each model.
            models: The models that they have trained, with the original parameter names.

        Raises:
            PlanError: A model lacks a parameter, or the models have taken different numbers of steps.
        """
        if len(optimizers) != known(self).k or len(models) != known(self).k:
            raise PlanError(f"{len(optimizers)} optimizers of {len(models)} models for {known(self).k}")
        named = [dict(model.named_parameters()) for model in models]
        for name, parameter in self.named_parameters():
            lost = next((number for number, own in enumerate(named) if name not in own), None)
            if lost is not None:
                raise PlanError(f"model {lost} has no parameter {name}")
            states = [own.state.get(found[name], {}) for own, found in zip(optimizers, named, strict=True)]
            optimizer.state[parameter] = _together(
                name, states, named[0][name].shape, known(self).placements[name]
            )

    def split_optimizer(
        self,
        optimizer: Optimizer,
        optimizers: Sequence[Optimizer],
        models: Sequence[nn.Module],
    ) -> None:
        """Go on apart where this module's optimizer has stopped; the opposite of `load_optimizers`."""
        placements, k = known(self).placements, known(self).k
        for number, (own, model) in enumerate(zip(optimizers, models, strict=True)):
            named = dict(model.named_parameters())
            for name, parameter in self.named_parameters():
                own.state[named[name]] = {
                    key: placements[name].part(value, number, k).clone()
                    if isinstance(value, Tensor) and value.shape == parameter.shape
                    else value.clone()
                    if isinstance(value, Tensor)
                    else value
                    for key, value in optimizer.state.get(parameter, {}).items()
                }

    def verify(self) -> Certificate:
        """Prove the fusion in float64, with random values in every parameter and buffer.

        In both modes, and with another batch size where that is free, outputs, buffers and gradients are
        compared with those of K separate models; what is drawn at random is left out, as each way draws other
        numbers.
        """
        own, singles = known(self), tuple(map(program_of, self.models()))
        return certify_fused(Fused(program_of(self), singles, own.k, own.placements, own.looped))

    def to_bundle(self) -> FusedBundle:
        """What `gs.save` writes."""
        own = known(self)
        placements = {name: own.placements[name] for name in own.singles[0].state}
        return FusedBundle(
            program_of(self), own.singles, own.k, placements, own.looped, own.in_turn, training=self.training
        )

    @classmethod
    def from_bundle(cls, found: FusedBundle) -> FusedModule:
        """The module that a bundle holds."""
        fused = Fused(found.program, found.singles, found.k, found.placements, found.looped, found.in_turn)
        return cls(fused).train(found.training)

    def _follow(self, before: Place | None, after: Place | None) -> None:
        """Let the graphs of a single model go along, too."""
        super()._follow(before, after)
        own = known(self)
        singles = (replace(one, graphs=moved_graphs(one.graphs, before, after)) for one in own.singles)
        self.__dict__[_KNOWN] = replace(own, singles=tuple(singles))

    def __getstate__(self) -> dict[str, Any]:
        """As data, like the rest of the module."""
        from graphsplit.serialization import program_to_data

        state = super().__getstate__()
        own = state.pop(_KNOWN)
        state[_KNOWN] = replace(own, singles=()), list(map(program_to_data, own.singles))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read what `__getstate__` wrote."""
        from graphsplit.serialization import program_from_data

        own, singles = state.pop(_KNOWN)
        super().__setstate__(state)
        self.__dict__[_KNOWN] = own
        named = tensors_by_all_names(self)
        programs = (
            without_weights(program_from_data(single, self._state_of(named, number)))
            for number, single in enumerate(singles)
        )
        self.__dict__[_KNOWN] = replace(own, singles=tuple(programs))


def _of_each(singles: Sequence[Program], k: int) -> Sequence[Program]:
    """The program of each model, where one may stand for all."""
    return singles if len(singles) == k else [singles[0]] * k


def _names(program: Program, name: str) -> tuple[str, ...]:
    """Every name of a state tensor."""
    return (name, *program.state[name].aliases)


_COUNTERS = {"step", "mu_product", "eta", "mu"}
"""What optimizers of torch hold as numbers, so that they look like the moments of a single number."""


def _together(
    name: str, states: Sequence[Mapping[str, Any]], shape: torch.Size, placement: Placement
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in states[0]:
        values = [state.get(key) for state in states]
        tensors = [value for value in values if isinstance(value, Tensor) and value.shape == shape]
        if len(tensors) == len(values) and (shape or key not in _COUNTERS):
            found[key] = placement.together(tensors)
        elif all(_equal(value, values[0]) for value in values):
            found[key] = values[0].clone() if isinstance(values[0], Tensor) else values[0]
        else:
            raise PlanError(
                f"the optimizers of {name} differ in {key}",
                hint="train all models for the same number of steps",
            )
    return found


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def certify_fused(fused: Fused) -> Certificate:
    """Prove a fusion with random values, without noise: each model against its own program.

    In both modes, and with another batch size where that is free.

    Args:
        fused: All models as one program, and each, of which the graphs count, and not the values.
    """
    generator = torch.Generator().manual_seed(0)
    singles = _of_each(fused.singles, fused.k)
    single = singles[0]
    drawn = [drawn_state(own, generator) for own in singles]
    shared = [name for name in drawn[0] if fused.placements[name].kind == "same"]
    for other in drawn[1:]:
        other.update((name, drawn[0][name]) for name in shared)
    state = {
        name: fused.placements[name]
        .together([own[name] for own in drawn])
        .requires_grad_(single.state[name].requires_grad)
        for name in drawn[0]
    }
    whole = in_double(quiet(fused.program.with_state(state)))
    programs = [
        in_double(quiet(program.with_state(own))) for program, own in zip(singles, drawn, strict=True)
    ]
    signature = programs[0].signature
    inputs = flat_inputs(signature, None)
    each = [inputs] * fused.k
    own_inputs = has_own_inputs(fused.program, single)
    if own_inputs:
        drawn_too = ([random_input(meta, generator) for meta in signature.inputs] for _ in programs[1:])
        each = [inputs, *drawn_too]
    cases: list[tuple[str, Mode, list[list[Tensor]]]] = [("eval", "eval", each), ("train", "train", each)]
    others = [other_batch(signature, values) for values in each]
    if others[0] is not None:
        cases.append(
            ("eval, another batch size", "eval", [values for values in others if values is not None])
        )
    rows = []
    for case, mode, values in cases:
        try:
            apart = [run_chain([one], own, mode) for one, own in zip(programs, values, strict=True)]
        except Exception:  # torch raises errors of many types
            if values is each:
                raise
            continue  # the models themselves take no other batch with these inputs
        given = [torch.stack(every) for every in zip(*values, strict=True)] if own_inputs else values[0]
        found = run_chain([whole], given, mode, stacked=True)
        errors = [_errors(found, ran, fused, number) for number, ran in enumerate(apart)]
        for what, column in zip(
            (f"outputs of {fused.k} models", "buffers", "gradients"), zip(*errors, strict=True), strict=True
        ):
            rows.append(Row(f"{what}, fused and apart ({case})", max(column), BOUND, "float64"))
    return Certificate(tuple(rows))


def has_own_inputs(fused: Program, single: Program) -> bool:
    """True where each model has inputs of its own."""
    pairs = zip(fused.signature.inputs, single.signature.inputs, strict=True)
    return any(a.ndim != b.ndim for a, b in pairs)


def _errors(found: Ran, own: Ran, fused: Fused, number: int) -> tuple[float, float, float]:
    """Of outputs, buffers and gradients of one model."""
    outputs = [value[number] if isinstance(value, Tensor) else value for value in found.outputs]
    buffers = part_of(fused.placements, found.buffers, number, fused.k)
    gradients = part_of(fused.placements, found.gradients, number, fused.k)
    return (
        outputs_error(outputs, own.outputs),
        tensors_error(buffers, own.buffers),
        tensors_error(gradients, own.gradients),
    )


def fuse(
    models: Sequence[nn.Module | Program],
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    own_inputs: bool = False,
    auto: bool = False,
) -> FusedModule:
    """K models of one architecture as one module, which takes over a copy of their values.

    Args:
        models: Modules, which are not changed, or programs.
        args: Example inputs of one model, for modules that are not traced yet.
        kwargs: Further example inputs by keyword.
        own_inputs: Each model has inputs of its own, on a leading dimension of K; else all see the same.
        auto: Measure what fusing brings, on the example inputs where there are any, and run every op once for
            each model where it does not pay; see `FusedModule.cost`.

    Raises:
        UserError: What is given is no list of models.
        PartitionError: There are none in it.
        UnsupportedError: They are not of one architecture; the first difference is named.
        TraceError, UnsupportedError, InputError: A model cannot be traced.
    """
    programs = [_program(model, args, kwargs) for model in listed(models)]
    if not auto:
        return FusedModule(fuse_programs(programs, own_inputs=own_inputs))
    given = args != () or bool(kwargs)
    inputs = programs[0].signature.flatten(*as_call(args, kwargs)) if programs and given else None
    return FusedModule(fuse_where_it_pays(programs, own_inputs=own_inputs, inputs=inputs))


def listed(models: Any) -> list[nn.Module | Program]:
    """Models that were given as a list, or another sequence of modules and programs.

    Raises:
        UserError: They were not.
    """
    single = isinstance(models, (nn.Module, Program)) and not isinstance(models, nn.ModuleList)
    if single or not isinstance(models, Iterable):
        raise UserError(
            f"a list of models is expected, and a {type(models).__name__} was given",
            hint="give [model_1, model_2, ...]; those of a partition are partition.submodels",
        )
    found = list(models)
    for model in found:
        if not isinstance(model, (nn.Module, Program)):
            raise UserError(
                f"a {type(model).__name__} stands among the models", hint="give modules or programs"
            )
    return found


def _program(model: nn.Module | Program, args: Any, kwargs: Mapping[str, Any] | None) -> Program:
    if isinstance(model, ProgramModule):
        return program_of(model)
    return model if isinstance(model, Program) else trace(model, args, kwargs)
