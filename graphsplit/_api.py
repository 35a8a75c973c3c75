"""The public face: what users call. It stands above the passes, which stand above the core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from graphsplit import bundle, exports
from graphsplit._ensemble import from_bundle as ensemble_of
from graphsplit._fuse import FusedModule, fuse
from graphsplit._layer_groups import LayerGroups
from graphsplit._local_critics import LocalCritics
from graphsplit._prune_units import PrunedUnits
from graphsplit._sparsify import Masks
from graphsplit._synthetic_halves import SyntheticHalves
from graphsplit.analysis import Analysis, analyse
from graphsplit.analysis.analysis import check_k
from graphsplit.analysis.dealing import Prescribed, Strategy, check_shares, dealer_of
from graphsplit.bundle import (
    Bundle,
    DepthBundle,
    EnsembleBundle,
    FusedBundle,
    MaskBundle,
    PartitionBundle,
    PrunedBundle,
)
from graphsplit.drawing import draw as figure_of
from graphsplit.drawing import snippet
from graphsplit.drawing.division import ByWidth, Division
from graphsplit.emission import ProgramModule, emit
from graphsplit.ensembles import Ensemble
from graphsplit.errors import BundleError, PartitionError, PlanError
from graphsplit.initialization import Init, initialise, refuse_nan
from graphsplit.memory import parse_bytes, smallest_k
from graphsplit.module_emission import FORMS, Form, emit_modules
from graphsplit.passes.merge import merge
from graphsplit.passes.partition import extract
from graphsplit.plan import PartitionPlan
from graphsplit.program import Program
from graphsplit.retarget import moved_graphs, place_of
from graphsplit.signature import as_call
from graphsplit.untouched import tensors_by_all_names
from graphsplit.verification import Certificate, Example, certify, opened_model

if TYPE_CHECKING:
    from graphsplit.onnx_export import OnnxReport

Submodels = Sequence[nn.Module | Mapping[str, Tensor]] | FusedModule
"""Sub-models in order, their state dicts, or all as one."""


class Partition:
    """A model divided by width into K sub-models. Made by `partition`.

    Attributes:
        program: The traced model.
        plan: Who holds what, as plain data.
        analysis: Everything else that is known.
    """

    def __init__(
        self,
        program: Program,
        analysis: Analysis,
        *,
        init: Init = "slice",
        seed: int = 0,
        example: Example | None = None,
        form: Form = "graph",
    ) -> None:
        self.program = program
        self.analysis = analysis
        self.plan: PartitionPlan = analysis.plan
        self._init: Init = init
        self._seed = seed
        self._example = example
        self._form: Form = form

    @property
    def k(self) -> int:
        """Number of sub-models."""
        return self.plan.k

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        """The K sub-models as programs."""
        return tuple(
            initialise(extract(self.analysis, part), self.analysis, part, self._init, self._seed)
            for part in range(self.k)
        )

    @cached_property
    def submodels(self) -> list[nn.Module]:
        """The K sub-models: independent modules with the original parameter names, in train mode.

        They run the graph, or are of the user's own class where ``emit="module"`` asked for it.
        """
        if self._form == "module":
            assert self._example is not None
            return emit_modules(self.analysis, self.programs, self._example)
        return [emit(program) for program in self.programs]

    def current_programs(self) -> tuple[Program, ...]:
        """The K sub-models as programs, with the values that `submodels` have now."""
        if "submodels" not in self.__dict__:
            return self.programs
        states = self._states(self.submodels)
        return tuple(program.with_state(state) for program, state in zip(self.programs, states, strict=True))

    def fuse(
        self,
        submodels: Submodels | None = None,
        *,
        own_inputs: bool = False,
        auto: bool = False,
    ) -> FusedModule:
        """The K sub-models as one module that does the work of all of them.

        Args:
            submodels: Trained sub-models, their state dicts, or what `fuse` made of them; by default those of
                this partition.
            own_inputs: Each sub-model has inputs of its own, on a leading dimension of K.
            auto: See `fuse`.

        Returns:
            A module in train mode whose outputs have a leading dimension of K; see `FusedModule`.

        Raises:
            UnsupportedError: The sub-models are not of one size.
            PlanError: The sub-models do not belong to this plan.
        """
        programs = self.current_programs()
        if submodels is not None:
            states = self._states(submodels)
            programs = tuple(p.with_state(state) for p, state in zip(self.programs, states, strict=True))
        example = self._example
        given = (example.args, example.kwargs) if example is not None and auto else ((), None)
        return fuse(programs, *given, own_inputs=own_inputs, auto=auto)

    def merge(self, submodels: Submodels | None = None, duplicate: bool = True) -> ProgramModule:
        """One model of full size from the K sub-models.

        Args:
            submodels: Trained sub-models, their state dicts, or what `fuse` made of them; by default those of
                this partition.
            duplicate: The exact merge, in which cross-unit ops and parameters of every sub-model's own stand
                K times: its output is the mean of the sub-models' outputs (before a closing softmax or
                sigmoid). Without it the original architecture, whose state dict fits the user's own class.

        Returns:
            A module in train mode; the weights between units of different sub-models are zero and trainable.

        Raises:
            PlanError: The sub-models do not belong to this plan.
        """
        return emit(self.merged_program(submodels, duplicate=duplicate), copy=False)

    def merged_program(self, submodels: Submodels | None = None, *, duplicate: bool = True) -> Program:
        """`merge` as a program."""
        states = self._states(submodels)
        merged = merge(self.analysis, states, duplicate=duplicate)
        before = place_of(entry.tensor for entry in self.program.state.values() if entry.kind == "parameter")
        after = place_of(entry.tensor for entry in merged.state.values() if entry.kind == "parameter")
        return replace(merged, graphs=moved_graphs(merged.graphs, before, after))

    def coarsen(self, k: int, submodels: Submodels | None = None) -> Partition:
        """Merge level by level: the division of the merged model into ``k``, each of several sub-models.

        Sub-model ``j`` of the result is the exact merge of its share of the sub-models, the first K/k of them
        and so on: its output is their mean. From K = 4 by 2 to 1: ``part.coarsen(2).merge()``.

        Args:
            k: Number of sub-models of the result; K is a multiple of it.
            submodels: As for `merge`.

        Raises:
            PartitionError: K is no multiple of ``k``, or what was kept whole at K can be divided at ``k``.
            PlanError: The sub-models do not belong to this plan.
        """
        check_k(k)
        if self.k % k:
            raise PartitionError(f"{self.k} sub-models cannot be merged into {k} of equal number")
        states = self._states(submodels)
        size = self.k // k
        merged = [
            merge(self.analysis, [s if part // size == number else None for part, s in enumerate(states)])
            for number in range(k)
        ]
        parts = {state.name: state.merged_parts(self.k) for state in self.plan.state}
        groups = {
            name: [None if part is None else np.where(part < 0, -1, part // size) for part in dims]
            for name, dims in parts.items()
        }
        try:
            analysis = analyse(merged[0], k, None, Prescribed(groups))
        except PlanError:
            raise PartitionError(
                f"the exact merge has other units at K = {k} than at K = {self.k}, so its levels do not nest",
                hint="merge with duplicate=False and divide the merged model again",
            ) from None
        coarse = Partition(merged[0], analysis)
        values = [{name: entry.tensor for name, entry in program.state.items()} for program in merged]
        coarse.__dict__["programs"] = tuple(
            extract(replace(analysis, program=merged[0].with_state(tensors)), number)
            for number, tensors in enumerate(values)
        )
        return coarse

    def kept_magnitude(self) -> float:
        """The part of the weights' magnitude that lies inside the sub-models, between 0 and 1.

        Counted over the parameters that join divided units to divided units; the rest are the cross weights,
        which are in no sub-model.
        """
        inside = total = 0.0
        for state in self.plan.state:
            if state.kind != "parameter" or sum(cut is not None for cut in state.cuts) < 2:
                continue
            weight = self.program.state[state.name].tensor.detach().abs()
            total += float(weight.sum(dtype=torch.float64))
            for part in range(self.k):
                inside += float(state.slice(weight, part).sum(dtype=torch.float64))
        return inside / total if total else 1.0

    def verify(self, submodels: Submodels | None = None) -> Certificate:
        """Prove the partition in float64, with random values in every parameter and buffer.

        Args:
            submodels: Also check the merge of these, with the values they have.
        """
        states = None if submodels is None else self._states(submodels)
        return certify(
            self.analysis,
            lambda part: extract(self.analysis, part),
            lambda values, duplicate: merge(self.analysis, values, duplicate=duplicate),
            self._example,
            states,
        )

    def _states(self, submodels: Submodels | None) -> list[Mapping[str, Tensor]]:
        given: Any = self.submodels if submodels is None else submodels
        if isinstance(given, FusedModule):
            given = given.models()
        if isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList):
            raise PlanError(f"one {type(given).__name__} for a plan of {self.k} sub-models")
        if len(given) != self.k:
            raise PlanError(f"{len(given)} sub-models for a plan of {self.k}")
        return [self._state(part, submodel) for part, submodel in enumerate(given)]

    def _state(self, part: int, submodel: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Every state tensor of a sub-model by its first name, checked against the plan."""
        if isinstance(submodel, nn.Module):
            found: Mapping[str, Tensor] = tensors_by_all_names(submodel)
        else:
            found = submodel
        state = {}
        for plan in self.plan.state:
            if plan.name in found:
                tensor = found[plan.name]
            elif plan.kind == "constant" or not plan.persistent:
                tensor = plan.slice(self.program.state[plan.name].tensor, part)
            else:
                raise PlanError(
                    f"sub-model {part} lacks {plan.name}", hint="is it a sub-model of this partition?"
                )
            if tuple(tensor.shape) != plan.local_shape(part):
                raise PlanError(
                    f"{plan.name} of sub-model {part} has shape {tuple(tensor.shape)}, "
                    f"the plan says {plan.local_shape(part)}",
                    hint="these weights belong to another model or another plan",
                )
            state[plan.name] = tensor.detach().requires_grad_(tensor.requires_grad)
        return state

    def drawn(self) -> tuple[Program, Division]:
        """What a figure shows."""
        return self.program, ByWidth(self.analysis)

    def _repr_html_(self) -> str:
        """A small figure, for notebooks."""
        return snippet(*self.drawn())

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,}" for count in self.plan.parameter_counts())
        full = self.plan.full_parameter_count()
        return f"Partition of {self.plan.model} into {self.k}: {counts} of {full:,} parameters"


def partition(
    model: nn.Module | Program,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    k: int | None = None,
    shares: Sequence[float] | None = None,
    strategy: Strategy = "contiguous",
    data: Any = None,
    fit: str | int | None = None,
    init: Init = "slice",
    seed: int = 0,
    plan: PartitionPlan | None = None,
    outputs: Sequence[str] | None = None,
    emit: Form = "graph",
) -> Partition:
    """Divide a model by width into K complete sub-networks (Miranda & Von Zuben, arXiv 1511.02954).

    Args:
        model: The user's module, which is not changed, or a traced `Program`.
        args: Example inputs: a tensor, a tuple by position or a dict by keyword.
        kwargs: Further example inputs by keyword.
        k: Number of sub-models; by default as many as there are shares, or 2.
        shares: Relative sizes of the sub-models, ``(3, 1)``; equal ones by default.
        strategy: Who goes where: ``"contiguous"`` (neighbours together), ``"interleaved"`` (in turn),
            ``"random"`` (by ``seed``), or for trained models ``"cluster"``, which keeps as much weight
            magnitude inside the sub-models as it can.
        fit: Bytes (``"8GB"``) that one sub-model may take to train with Adam on the example's batch: the
            smallest K that fits is chosen, in place of ``k``.
        data: Inputs like ``args``, by which ``"cluster"`` keeps units together that are active together.
        init: Weights of the sub-models: ``"slice"`` of the given ones, ``"rescale"`` (the same, scaled to the
            smaller fan-in), or ``"fresh"`` (drawn anew, with another seed for each).
        seed: For ``"fresh"``, ``"random"`` and ``"cluster"``.
        plan: Only accept the division of this plan, made earlier for the same model.
        outputs: Names of the outputs to keep, as for `trace`.
        emit: What `submodels` are: modules that run their ``"graph"``, or ``"module"``: copies of the user's
            own with narrower layers, proved equal to the graph form.

    Raises:
        PartitionError: K or the shares do not fit, or nothing can be divided.
        TraceError, UnsupportedError, InputError: The model cannot be traced.
        PlanError: ``plan`` belongs to another model.
    """
    if fit is not None and (k, shares, plan) != (None, None, None):
        raise PartitionError("fit chooses K by itself: give no k, shares or plan beside it")
    budget = None if fit is None else parse_bytes(fit)
    shares, k = _shares_and_k(shares, k, plan)
    deal = dealer_of(strategy, seed)  # before a trace that may take a while
    if emit not in FORMS:
        raise PartitionError(f"emit is {emit!r}, expected 'graph' or 'module'")
    if emit == "module" and isinstance(model, Program):
        raise PartitionError(
            "emit='module' needs the user's own module, and a traced program was given",
            hint="give the module and example inputs",
        )
    program, example = opened_model(model, args, kwargs, outputs)
    if init not in ("slice", "rescale", "fresh"):
        raise PartitionError(f"init is {init!r}, expected 'slice', 'rescale' or 'fresh'")
    if budget is not None:
        shares, k = _shares_and_k(None, smallest_k(partial(_largest, program), budget), None)
    if data is not None:
        deal = dealer_of(strategy, seed, program.signature.flatten(*as_call(data, None)))
    if plan is not None:
        deal = Prescribed({state.name: state.parts(plan.k) for state in plan.state})
    analysis = analyse(program, k, shares, deal)
    if plan is not None:
        if plan.state != analysis.plan.state:
            raise PlanError("the plan does not belong to this model", hint=_difference(plan, analysis.plan))
        analysis = replace(analysis, plan=plan)  # it may name coarser axes, for the same slices
    if init != "fresh":
        refuse_nan(program)
    divided = Partition(program, analysis, init=init, seed=seed, example=example, form=emit)
    if emit == "module":
        _ = divided.submodels  # refused now, or never
    return divided


def _largest(program: Program, k: int) -> list[Program]:
    """The sub-models that may be the largest: units that are left over go to the first ones."""
    return [extract(analyse(program, k), 0)]


def _shares_and_k(
    shares: Sequence[float] | None, k: int | None, plan: PartitionPlan | None
) -> tuple[tuple[float, ...], int]:
    if plan is not None:
        k, shares = plan.k, None
    found = None if shares is None else check_shares(shares)
    if k is None:
        k = 2 if found is None else len(found)
    check_k(k)
    return found or (1.0,) * k, k


def _difference(wanted: PartitionPlan, found: PartitionPlan) -> str:
    ours = {state.name: state for state in found.state}
    for state in wanted.state:
        if state.name not in ours:
            return f"the model has no {state.name}"
        own = ours[state.name]
        if state != own:
            return f"{state.name} is {own.shape} here and {state.shape} in the plan, or cut differently"
    return "state tensors or axes differ"


Object = (
    Partition | LayerGroups | LocalCritics | SyntheticHalves | FusedModule | Ensemble | Masks | PrunedUnits
    | Program | ProgramModule
)  # fmt: skip


def save(obj: Object | Bundle, path: str | Path) -> None:
    """Write a bundle, all of it or nothing; an older bundle in its place is replaced.

    Args:
        obj: What graphsplit made, with the weights that it has now: a partition, layer groups, local critics,
            synthetic halves, a fused module, an ensemble, masks, a model that lost units, a program or
            a module.
        path: The folder.

    Raises:
        BundleError: The place is taken by something else, or cannot be written.
    """
    if isinstance(obj, Partition):
        obj = PartitionBundle(bundle.without_weights(obj.program), obj.plan, obj.current_programs())
    elif isinstance(
        obj, (LayerGroups, LocalCritics, SyntheticHalves, FusedModule, Ensemble, Masks, PrunedUnits)
    ):
        obj = obj.to_bundle()
    bundle.save(obj, path)


def load(path: str | Path) -> Object:
    """Read what `save` or the command line wrote; no code of the bundle is run.

    The full model's own weights are no part of a partition's bundle: the plain merge of the sub-models stands
    in for them.

    Raises:
        BundleError: The bundle is damaged, truncated, foreign or newer; one sentence says which file and why.
    """
    found = bundle.load(path)
    if isinstance(found, DepthBundle):
        return from_bundle(found)
    if isinstance(found, FusedBundle):
        return FusedModule.from_bundle(found)
    if isinstance(found, MaskBundle):
        return Masks.from_bundle(found)
    if isinstance(found, PrunedBundle):
        return PrunedUnits.from_bundle(found)
    if isinstance(found, EnsembleBundle):
        return ensemble_of(found)
    if not isinstance(found, PartitionBundle):
        return found
    divided = partition(found.source, plan=found.plan)
    states = [{name: entry.tensor for name, entry in program.state.items()} for program in found.submodels]
    loaded = partition(divided.merged_program(states, duplicate=False), plan=found.plan, init="fresh")
    loaded.__dict__["programs"] = found.submodels
    return loaded


def from_bundle(found: DepthBundle) -> exports.Depth:
    """What a bundle holds of a model that is cut by depth."""
    if "labels" in found.options:
        return SyntheticHalves.from_bundle(found)
    return LocalCritics.from_bundle(found) if found.critics else LayerGroups.from_bundle(found)


def draw(obj: Object, path: str | Path, *, depth: int | None = None) -> None:
    """Write a figure of a model, nested by module, with its parts in colours.

    Args:
        obj: A partition, layer groups, local critics (which are drawn, too) or synthetic halves; an ensemble,
            a model that lost units, a program or module is drawn without parts.
        path: The file: ``.svg`` is a still picture, ``.html`` opens and closes modules, and can be searched.
        depth: How many levels of modules are open (at the start); as many as can be read unless given.

    Raises:
        UserError: The name of the file ends in neither, or ``depth`` is negative.
        BundleError: The file cannot be written.
    """
    path = Path(path)
    obj = _as_program(obj)
    program, division = (obj, None) if isinstance(obj, Program) else obj.drawn()
    text = figure_of(program, division, path, depth)
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise BundleError(f"{path} cannot be written: {error.strerror or error}") from error


def export_onnx(obj: Object, path: str | Path) -> dict[str, OnnxReport]:
    """Write ONNX, checked by onnx.checker and run in ONNX Runtime against torch at two batch sizes.

    Args:
        obj: A program, a module, an ensemble, a model that lost units or masks (zeros in the weights): one
            file. A partition: a folder with ``submodel_0.onnx`` to ``merged.onnx``, and ``ensemble.onnx``, in
            which every sub-model is a function and the mean of all is given. Layer groups: a folder with
            ``group_0.onnx`` and so on; local critics: ``submodel_0.onnx`` and so on beside them, and
            ``anytime.onnx``, which leaves early at the confidence that is its last input.
        path: The file, or the folder.

    Returns:
        A report for each file, by its name.

    Raises:
        UnsupportedError: ONNX cannot express an op.
        VerificationError: ONNX Runtime gives other values.
    """
    path = Path(path)
    obj = _as_program(obj)
    if isinstance(obj, Program):
        found = exports.of_programs({path.name: obj}, path.parent)
    else:
        path.mkdir(parents=True, exist_ok=True)
        if isinstance(obj, Partition):
            found = exports.of_partition(obj.current_programs(), obj.merged_program(), path)
        else:
            found = exports.of_depth(obj, path)
    return {name: write() for name, write in found.items()}


def _as_program(obj: Object) -> Partition | exports.Depth | Program:
    """Modules, ensembles and masked models as the program that they run."""
    if isinstance(obj, ProgramModule):
        return bundle.program_of(obj)
    if isinstance(obj, PrunedUnits):
        return obj.current_program()
    if isinstance(obj, Masks):
        return obj.folded_program()
    return obj.program() if isinstance(obj, Ensemble) else obj
