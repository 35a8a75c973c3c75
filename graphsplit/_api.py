"""The public face: what users call. It stands above the passes, which stand above the core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graphsplit import bundle
from graphsplit.analysis import Analysis, analyse
from graphsplit.analysis.analysis import check_k
from graphsplit.bundle import PartitionBundle
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import PartitionError, PlanError
from graphsplit.initialization import Init, initialise, refuse_nan
from graphsplit.passes.merge import merge
from graphsplit.passes.partition import extract
from graphsplit.plan import PartitionPlan
from graphsplit.program import Program
from graphsplit.retarget import place_of, retarget_program
from graphsplit.signature import as_call
from graphsplit.tracing import trace
from graphsplit.verification import Certificate, Example, certify

if TYPE_CHECKING:
    from graphsplit.onnx_export import OnnxReport


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
    ) -> None:
        self.program = program
        self.analysis = analysis
        self.plan: PartitionPlan = analysis.plan
        self._init: Init = init
        self._seed = seed
        self._example = example

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
    def submodels(self) -> list[ProgramModule]:
        """The K sub-models: independent modules with the original parameter names, in train mode."""
        return [emit(program) for program in self.programs]

    def current_programs(self) -> tuple[Program, ...]:
        """The K sub-models as programs, with the values that `submodels` have now."""
        if "submodels" not in self.__dict__:
            return self.programs
        states = self._states(self.submodels)
        return tuple(program.with_state(state) for program, state in zip(self.programs, states, strict=True))

    def merge(
        self, submodels: Sequence[nn.Module | Mapping[str, Tensor]] | None = None, duplicate: bool = True
    ) -> ProgramModule:
        """One model of full size from the K sub-models.

        Args:
            submodels: Trained sub-models, or their state dicts; by default those of this partition.
            duplicate: The exact merge, in which cross-unit ops and parameters of every sub-model's own stand
                K times: its output is the mean of the sub-models' outputs (before a closing softmax or
                sigmoid). Without it the original architecture, whose state dict fits the user's own class.

        Returns:
            A module in train mode; the weights between units of different sub-models are zero and trainable.

        Raises:
            PlanError: The sub-models do not belong to this plan.
        """
        return emit(self.merged_program(submodels, duplicate=duplicate), copy=False)

    def merged_program(
        self, submodels: Sequence[nn.Module | Mapping[str, Tensor]] | None = None, *, duplicate: bool = True
    ) -> Program:
        """`merge` as a program."""
        states = self._states(submodels)
        merged = merge(self.analysis, states, duplicate=duplicate)
        before = place_of(entry.tensor for entry in self.program.state.values() if entry.kind == "parameter")
        after = place_of(entry.tensor for entry in merged.state.values() if entry.kind == "parameter")
        if before is None or after is None or before == after:
            return merged
        moved = after[1] if after[1] != before[1] else None
        return retarget_program(merged, before[0], after[0], moved)

    def verify(self, submodels: Sequence[nn.Module | Mapping[str, Tensor]] | None = None) -> Certificate:
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

    def _states(
        self, submodels: Sequence[nn.Module | Mapping[str, Tensor]] | None
    ) -> list[Mapping[str, Tensor]]:
        if submodels is None:
            submodels = self.submodels
        if len(submodels) != self.k:
            raise PlanError(f"{len(submodels)} sub-models for a plan of {self.k}")
        return [self._state(part, submodel) for part, submodel in enumerate(submodels)]

    def _state(self, part: int, submodel: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Every state tensor of a sub-model by its first name, checked against the plan."""
        if isinstance(submodel, nn.Module):
            named = dict(submodel.named_parameters(remove_duplicate=False))
            found: Mapping[str, Tensor] = named | dict(submodel.named_buffers(remove_duplicate=False))
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

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,}" for count in self.plan.parameter_counts())
        full = self.plan.full_parameter_count()
        return f"Partition of {self.plan.model} into {self.k}: {counts} of {full:,} parameters"


def partition(
    model: nn.Module | Program,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    k: int = 2,
    init: Init = "slice",
    seed: int = 0,
    plan: PartitionPlan | None = None,
    outputs: Sequence[str] | None = None,
) -> Partition:
    """Divide a model by width into K complete sub-networks (Miranda & Von Zuben, arXiv 1511.02954).

    Args:
        model: The user's module, which is not changed, or a traced `Program`.
        args: Example inputs: a tensor, a tuple by position or a dict by keyword.
        kwargs: Further example inputs by keyword.
        k: Number of sub-models.
        init: Weights of the sub-models: ``"slice"`` of the given ones, ``"rescale"`` (the same, scaled to the
            smaller fan-in), or ``"fresh"`` (drawn anew, with another seed for each).
        seed: For ``"fresh"``.
        plan: Only accept the division of this plan, made earlier for the same model.
        outputs: Names of the outputs to keep, as for `trace`.

    Raises:
        PartitionError: K does not fit, or nothing can be divided.
        TraceError, UnsupportedError, InputError: The model cannot be traced.
        PlanError: ``plan`` belongs to another model.
    """
    example = None
    if isinstance(model, Program):
        program = model
        if args != () or kwargs:
            example = Example(None, *as_call(args, kwargs))
    else:
        check_k(k)  # before a trace that may take a while
        program = trace(model, args, kwargs, outputs=outputs)
        example = Example(model, *as_call(args, kwargs))
    if init not in ("slice", "rescale", "fresh"):
        raise PartitionError(f"init is {init!r}, expected 'slice', 'rescale' or 'fresh'")
    analysis = analyse(program, plan.k if plan is not None else k)
    if plan is not None and plan != analysis.plan:
        raise PlanError("the plan does not belong to this model", hint=_difference(plan, analysis.plan))
    if init != "fresh":
        refuse_nan(program)
    return Partition(program, analysis, init=init, seed=seed, example=example)


def _difference(given: PartitionPlan, found: PartitionPlan) -> str:
    ours = {state.name: state for state in found.state}
    for state in given.state:
        if state.name not in ours:
            return f"the model has no {state.name}"
        own = ours[state.name]
        if state != own:
            return f"{state.name} is {own.shape} here and {state.shape} in the plan, or cut differently"
    return "state tensors or axes differ"


def save(obj: Partition | PartitionBundle | Program | ProgramModule, path: str | Path) -> None:
    """Write a bundle, all of it or nothing; an older bundle in its place is replaced.

    Args:
        obj: A partition (with the sub-models as they are now, trained or not), a program or a module.
        path: The folder.

    Raises:
        BundleError: The place is taken by something else, or cannot be written.
    """
    if isinstance(obj, Partition):
        obj = PartitionBundle(bundle.without_weights(obj.program), obj.plan, obj.current_programs())
    bundle.save(obj, path)


def load(path: str | Path) -> Partition | Program | ProgramModule:
    """Read what `save` or ``graphsplit partition`` wrote; no code of the bundle is run.

    The full model's own weights are no part of a partition's bundle: the plain merge of the sub-models stands
    in for them.

    Raises:
        BundleError: The bundle is damaged, truncated, foreign or newer; one sentence says which file and why.
    """
    found = bundle.load(path)
    if not isinstance(found, PartitionBundle):
        return found
    divided = partition(found.source, plan=found.plan)
    states = [{name: entry.tensor for name, entry in program.state.items()} for program in found.submodels]
    loaded = partition(divided.merged_program(states, duplicate=False), plan=found.plan, init="fresh")
    loaded.__dict__["programs"] = found.submodels
    return loaded


def export_onnx(obj: Partition | Program | ProgramModule, path: str | Path) -> dict[str, OnnxReport]:
    """Write ONNX, checked by onnx.checker and run in ONNX Runtime against torch at two batch sizes.

    Args:
        obj: A program or module: one file. A partition: a folder with ``submodel_0.onnx`` to ``merged.onnx``.
        path: The file, or the folder.

    Returns:
        A report for each file, by its name.

    Raises:
        UnsupportedError: ONNX cannot express an op.
        VerificationError: ONNX Runtime gives other values.
    """
    from graphsplit.onnx_export import export_onnx as export  # takes half a second to import

    path = Path(path)
    if not isinstance(obj, Partition):
        return {path.name: export(obj, path)}
    path.mkdir(parents=True, exist_ok=True)
    pieces = {f"submodel_{part}.onnx": program for part, program in enumerate(obj.current_programs())}
    pieces["merged.onnx"] = obj.merged_program()
    return {name: export(program, path / name) for name, program in pieces.items()}
