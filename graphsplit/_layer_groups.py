"""The public face of depth: layer groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphsplit import costs
from graphsplit.bundle import DepthBundle, program_of, without_weights
from graphsplit.depth.certificate import certify_groups
from graphsplit.depth.cuts import Cuts, cut_by_plan
from graphsplit.depth.plan import Crossing, DepthPlan, GroupPlan, Measure, Tied
from graphsplit.drawing import snippet
from graphsplit.drawing.division import ByDepth, Division
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import PlanError, UserError
from graphsplit.memory import parse_bytes
from graphsplit.passes.layer_groups import divide, extract_group, join, join_exits
from graphsplit.program import Program, TensorMeta, meta_of, source_of
from graphsplit.verification import Certificate, Example, opened_model

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage


class _DenseGradient(torch.autograd.Function):
    """The same tensor, whose gradient lies in memory without gaps."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class _Dense(nn.Module):
    """A group whose results, and gradients, lie in memory without gaps, as what is sent has to."""

    def __init__(self, group: ProgramModule) -> None:
        super().__init__()
        self.group = group

    def forward(self, *args: Any) -> Any:
        """What the group gives."""
        args = pytree.tree_map_only(Tensor, _DenseGradient.apply, args)
        return pytree.tree_map_only(Tensor, Tensor.contiguous, self.group(*args))


class LayerGroups:
    """A model divided by depth into groups that run one after the other. Made by `layer_groups`.

    Attributes:
        program: The traced model.
        cuts: Where it is cut, on its graphs.
    """

    def __init__(self, cuts: Cuts, measure: Measure, tied: Tied, example: Example | None = None) -> None:
        self.program = cuts.program
        self.cuts = cuts
        self._measure: Measure = measure
        self._tied: Tied = tied
        self._example = example

    @property
    def n(self) -> int:
        """Number of groups."""
        return self.cuts.n

    def to_bundle(self) -> DepthBundle:
        """The groups as they are now, to be saved; they have all of the model's weights."""
        return DepthBundle(without_weights(self.program), self.plan, self.current_programs())

    @classmethod
    def from_bundle(cls, found: DepthBundle) -> LayerGroups:
        """The groups that a bundle holds."""
        whole = join(found.groups, found.source)
        named = {name: entry.tensor for name, entry in whole.state.items() if name in found.source.state}
        groups = cls(
            cut_by_plan(found.source.with_state(named), found.plan), found.plan.measure, found.plan.tied
        )
        groups.__dict__["programs"] = found.groups
        return groups

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        """The groups as programs, in the order in which they run; their values are the model's."""
        return tuple(extract_group(self.cuts, group) for group in range(self.n))

    @cached_property
    def modules(self) -> list[ProgramModule]:
        """The groups: independent modules with the original parameter names, in train mode.

        The first takes the model's inputs, the last gives its outputs. What one gives, the next takes:
        ``groups[1](groups[0](x))``, or ``groups[1](*groups[0](x))`` where several tensors cross the cut.
        """
        return [emit(program) for program in self.programs]

    @property
    def costs(self) -> tuple[float, ...]:
        """Cost of each group in the measure that was balanced."""
        return self.cuts.costs

    @property
    def bound(self) -> float:
        """What the dearest group costs at least, wherever the cuts are."""
        return self.cuts.bound

    @property
    def frontiers(self) -> tuple[tuple[TensorMeta, ...], ...]:
        """What crosses each cut."""
        return tuple(program.signature.inputs for program in self.programs[1:])

    @cached_property
    def plan(self) -> DepthPlan:
        """Where the model is cut, as plain data."""
        groups = tuple(self._group_plan(group) for group in range(self.n))
        return DepthPlan(self.program.name, self._measure, self.bound, groups, self._tied)

    def _group_plan(self, group: int) -> GroupPlan:
        cuts, program = self.cuts, self.programs[group]
        first = [line.placed[cuts.places(number, group).start] for number, line in enumerate(cuts.lines)]
        crossing = cuts.crossing(0, group) if group < self.n - 1 else []
        return GroupPlan(
            starts=tuple(node.name for node in first),
            source=str(source_of(first[0])),
            cost=self.costs[group],
            flops=costs.graph_flops(program.graph("train")),
            parameters=program.parameter_count(),
            state=tuple(program.state),
            crossing=tuple(
                Crossing(
                    node.name,
                    meta_of(node).shape,
                    str(meta_of(node).dtype).removeprefix("torch."),
                    str(source_of(node)),
                )
                for node in crossing
            ),
        )

    def current_programs(self, modules: Sequence[nn.Module] | None = None) -> tuple[Program, ...]:
        """The groups as programs, with the values that the modules have now."""
        if modules is None:
            if "modules" not in self.__dict__:
                return self.programs
            modules = self.modules
        if len(modules) != self.n:
            raise PlanError(f"{len(modules)} modules for {self.n} layer groups")
        found = []
        for number, module in enumerate(modules):
            if not isinstance(module, ProgramModule):
                raise PlanError(
                    f"group {number} is a {type(module).__name__}", hint="give the modules of layer_groups"
                )
            found.append(program_of(module))
        return tuple(found)

    def pipeline_stage(self, device: str | torch.device = "cpu") -> PipelineStage:
        """This process's group for a schedule of torch.distributed.pipelining, which backpropagates.

        One process for each group, in the order of their ranks, in a process group that is there already;
        then ``ScheduleGPipe(groups.pipeline_stage(), chunks, loss_fn=loss)``.

        Raises:
            UserError: There is no process group, or one of another size.
        """
        from torch.distributed.pipelining import PipelineStage  # takes a second to import

        size = dist.get_world_size() if dist.is_initialized() else 0
        if size != self.n:
            raise UserError(
                f"{size} processes for {self.n} groups",
                hint=f"start the script with torchrun --nproc-per-node={self.n} and call init_process_group",
            )
        rank = dist.get_rank()
        return PipelineStage(_Dense(self.modules[rank]).to(device), rank, self.n, torch.device(device))

    def drawn(self, critics: Sequence[Program] = (), mains: Sequence[int] = ()) -> tuple[Program, Division]:
        """What a figure shows: the groups, and critics on the outputs ``mains`` of theirs."""
        program, owners = join_exits(self.current_programs(), critics, mains, self.program)
        return program, ByDepth(program, owners, self.n)

    def _repr_html_(self) -> str:
        """A small figure, for notebooks."""
        return snippet(*self.drawn())

    def recompose(self, modules: Sequence[nn.Module] | None = None) -> ProgramModule:
        """One model of all groups, with the values that they have now and the original parameter names.

        It equals the original bit for bit, in train mode too when both start from one seed. A copy of a
        tied weight that a group has for itself stands under another of the weight's names.

        Args:
            modules: The groups in order; by default those of `modules`.

        Raises:
            PlanError: They are not the groups of this model, in order.
        """
        return emit(join(self.current_programs(modules), self.program))

    def verify(self) -> Certificate:
        """Prove the division in float64: recomposed, and in a chain, the groups are the model."""
        return certify_groups(self.program, self.programs, join(self.programs, self.program), self._example)

    def __repr__(self) -> str:
        groups = ", ".join(f"{group.parameters:,}" for group in self.plan.groups)
        return f"LayerGroups of {self.program.name}: {self.n} groups of {groups} parameters"


def layer_groups(
    model: nn.Module | Program,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    n: int | None = None,
    balance: Measure = "flops",
    at: Sequence[str] | None = None,
    tied: Tied = "refuse",
    max_crossing: str | int | None = None,
    tolerance: float = 0.0,
    outputs: Sequence[str] | None = None,
) -> LayerGroups:
    """Cut a model by depth into groups of consecutive layers.

    Cuts are made in the order in which the ops run, so that they may cross skip connections: everything that
    a later group needs crosses every cut in between.

    Args:
        model: The user's module, which is not changed, or a traced `Program`.
        args: Example inputs: a tensor, a tuple by position or a dict by keyword.
        kwargs: Further example inputs by keyword.
        n: Number of groups, 2 unless ``at`` is given.
        balance: The dearest group is made as cheap as it can be, exactly: ``"flops"`` of a forward pass,
            ``"params"``, ``"memory"`` (bytes of parameters, gradients, Adam's states and what autograd
            keeps), or ``"time"`` (measured here, forward and backward).
        at: Paths of the modules at whose start a new group begins, in place of balancing.
        tied: A weight that several groups would use is refused by name, or ``"copy"``: each has its own.
        max_crossing: Bytes (``"1MB"``) that a cut may let through, with the batch of the example.
        tolerance: By which share the dearest group may be dearer than need be, where that saves bytes.
        outputs: Names of the outputs to keep, as for `trace`.

    Raises:
        PartitionError: The model cannot be cut so; the message says what is in the way.
        TraceError, UnsupportedError, InputError: The model cannot be traced.
    """
    program, example = opened_model(model, args, kwargs, outputs)
    inputs = None if example is None else program.signature.flatten(example.args, example.kwargs)
    cuts = divide(
        program, n, tuple(at or ()), balance, tied, inputs=inputs,
        max_crossing=None if max_crossing is None else parse_bytes(max_crossing), tolerance=tolerance,
    )  # fmt: skip
    return LayerGroups(cuts, balance, tied, example)
