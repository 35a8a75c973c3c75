"""The public face of pruning at initialisation: masks on a model's weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from graphsplit.bundle import MaskBundle, program_of
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import PlanError, UserError
from graphsplit.initialization import freshly_drawn
from graphsplit.passes.sparsify import folded, masked
from graphsplit.program import Mode, Program, source_of
from graphsplit.sparsity import Method, Scope, Scoring, choose, cut_layers, prunable
from graphsplit.sparsity.parallel import KeptEntries, parallel
from graphsplit.sparsity.prunable import roles
from graphsplit.sparsity.scores import example_of
from graphsplit.tracing import trace
from graphsplit.train.loop import Batches, Metric
from graphsplit.train.processes import process_group, share


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One pruned parameter: its size, and how many of its entries are left."""

    name: str
    shape: tuple[int, ...]
    size: int
    kept: int

    @property
    def density(self) -> float:
        """Share of the entries that is left."""
        return self.kept / max(self.size, 1)


class Masks:
    """Which weights of a model are kept. Made by `sparsify`.

    Attributes:
        program: The traced model, without masks.
        masks: By the first name of each pruned parameter, true where a weight is kept.
        scores: By which they were chosen, as the paper of the method defines them, in float64.
        aliases: Further names of pruned parameters (tied weights), with the first name of each.
        method: That scored them.
        scope: ``"global"`` or ``"layer"``.
    """

    def __init__(
        self,
        program: Program,
        masks: Mapping[str, Tensor],
        scores: Mapping[str, Tensor],
        method: Method,
        scope: Scope,
    ) -> None:
        self.program = program
        self.masks = dict(masks)
        self.scores = dict(scores)
        self.method: Method = method
        self.scope: Scope = scope
        self.aliases = {alias: name for name in self.masks for alias in program.state[name].aliases}

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that is removed."""
        rows = self.report()
        return 1 - sum(row.kept for row in rows) / max(sum(row.size for row in rows), 1)

    @property
    def cut(self) -> tuple[str, ...]:
        """Weights of which nothing is left: their layer gives no more than its bias."""
        known = roles(self.program)
        return cut_layers(self.masks, [name for name in self.masks if known[name] == "weight"])

    def report(self) -> list[LayerRow]:
        """A row for each pruned parameter."""
        return [
            LayerRow(name, tuple(mask.shape), mask.numel(), int(mask.sum()))
            for name, mask in self.masks.items()
        ]

    # -- what is done with them ------------------------------------------------------------------------------

    def apply(self, model: nn.Module) -> nn.Module:
        """Put the masks on a model, in place, by ``torch.nn.utils.prune``.

        Parameters become ``name_orig``, masks are buffers ``name_mask``, and ``name`` is their product, anew
        at every call. ``prune.remove`` makes it permanent.

        Args:
            model: The one that was given, or another of its class; one that is not pruned.

        Returns:
            The same model.

        Raises:
            PlanError: It lacks a parameter, or has it in another shape.
        """
        named = dict(model.named_parameters(remove_duplicate=False))
        every = {**{name: name for name in self.masks}, **self.aliases}
        for name, first in every.items():
            if name not in named or named[name].shape != self.masks[first].shape:
                raise PlanError(
                    f"the model has no parameter {name} of shape {list(self.masks[first].shape)}",
                    hint="masks are for the model that they were made for, without masks on it",
                )
        with torch.no_grad():  # so that what is made here can be copied; each call makes it anew
            for name, first in every.items():
                path, _, leaf = name.rpartition(".")
                mask = self.masks[first].to(named[name].device)
                prune.custom_from_mask(model.get_submodule(path), leaf, mask)
        if isinstance(model, ProgramModule) or self._used_elsewhere():
            model.register_forward_pre_hook(_refresh)
        return model

    def _used_elsewhere(self) -> bool:
        """Does any other module than its own use a weight, so that its own hook would run too late?"""
        for node in self.program.nodes():
            if node.op == "get_attr" and node.target in self.masks:
                name = str(node.target)
                owners = {key.rpartition(".")[0] for key in (name, *self.program.state[name].aliases)}
                if not {source_of(user).module for user in node.users} <= owners:
                    return True
        return False

    def masked_program(self) -> Program:
        """The model with masks as a program, whose state has the names of ``torch.nn.utils.prune``."""
        return masked(self.program, self.masks)

    def folded_program(self) -> Program:
        """The model with zeros in place of what is masked, and no masks: what is exported."""
        return folded(self.program, self.masks)

    def module(self) -> ProgramModule:
        """A masked copy of the model, which trains without what is pruned. The masks are buffers."""
        return emit(self.masked_program())

    def agreed(self) -> Masks:
        """The masks of process 0, on every process: they may have seen other data.

        Raises:
            UserError: This process was not started by torchrun.
        """
        with process_group():
            return self.with_masks(share([self.masks])[0])

    def parallel(self, model: nn.Module) -> tuple[DistributedDataParallel, KeptEntries]:
        """The model with the masks of process 0 under ``DistributedDataParallel``, for processes of torchrun.

        Gradients are those of the global batch, as in one process; only those of kept weights are sent.

        Args:
            model: As for `apply`; it is changed.

        Returns:
            The model to call, and the hook, which counts the bytes that were sent and saved.

        Raises:
            UserError: There is no process group: call ``torch.distributed.init_process_group`` before.
        """
        if not dist.is_initialized():
            raise UserError(
                "there are no processes to train with",
                hint="start the script with torchrun, and call torch.distributed.init_process_group in it",
            )
        agreed = self.agreed()
        return parallel(agreed.apply(model), agreed.masks)

    # -- controls --------------------------------------------------------------------------------------------

    def with_masks(self, masks: Mapping[str, Tensor]) -> Masks:
        """Other masks on the same model."""
        return Masks(self.program, masks, self.scores, self.method, self.scope)

    def shuffled(self, seed: int = 0) -> Masks:
        """A control: as many weights of each layer, which ones by chance."""
        generator = torch.Generator().manual_seed(seed)
        return self.with_masks(
            {
                name: mask.reshape(-1)[torch.randperm(mask.numel(), generator=generator)].reshape(mask.shape)
                for name, mask in self.masks.items()
            }
        )

    def reinitialised(self, model: nn.Module | None = None, seed: int = 0) -> nn.Module:
        """A control: the same masks on weights that are drawn anew.

        Args:
            model: Copied; by default what is returned runs the traced graph, as `module` does.
            seed: Of the weights, uniform within 1/sqrt(fan-in) where they belong to a layer.
        """
        fresh = freshly_drawn(self.program, seed)
        if model is None:
            return emit(masked(fresh, self.masks))
        found = copy.deepcopy(model)
        named = dict(found.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, entry in fresh.state.items():
                if entry.kind == "parameter" and name in named:
                    named[name].copy_(entry.tensor)
        return self.apply(found)

    # -- storing ---------------------------------------------------------------------------------------------

    def to_bundle(self) -> MaskBundle:
        """What `graphsplit.save` writes."""
        options = {"method": self.method, "scope": self.scope}
        return MaskBundle(self.program, self.masks, self.scores, options)

    @classmethod
    def from_bundle(cls, found: MaskBundle) -> Masks:
        """What a bundle holds."""
        names = [name for name in found.program.state if name in found.masks]
        masks, scores = ({name: tensors[name] for name in names} for tensors in (found.masks, found.scores))
        return cls(found.program, masks, scores, found.options["method"], found.options["scope"])

    def __repr__(self) -> str:
        rows = self.report()
        kept, size = sum(row.kept for row in rows), sum(row.size for row in rows)
        return f"Masks on {self.program.name} by {self.method}: {kept:,} of {size:,} weights"


def _refresh(model: nn.Module, inputs: Any) -> None:
    """Multiply every weight by its mask before a call of the whole model."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                hook(module, inputs)


def sparsify(
    model: nn.Module | Program,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    method: Method = "snip",
    sparsity: float = 0.9,
    data: Batches | Sequence[Any] | None = None,
    loss: Metric | None = None,
    scope: Scope = "global",
    mode: Mode = "train",
    biases: bool = False,
    norms: bool = False,
    temperature: float = 200.0,
    iterations: int = 100,
    seed: int = 0,
    outputs: Sequence[str] | None = None,
) -> Masks:
    """Choose, before training, which weights of a model to keep.

    Args:
        model: The user's module, a sub-model or a layer group, which is not changed, or a traced `Program`.
        args: Example inputs: a tensor, a tuple by position or a dict by keyword. Where ``data`` are given
            they may be left out.
        kwargs: Further example inputs by keyword.
        method: ``"snip"``, ``"grasp"`` (both need ``data`` and ``loss``), ``"synflow"``, ``"magnitude"`` or
            ``"random"``; see `graphsplit.sparsity.scores`.
        sparsity: Share of the prunable weights to remove, in [0, 1); it is met to one weight.
        data: A batch as a pair of inputs and targets, or batches as for `graphsplit.train.fit`: gradients are
            those of the mean over all of them.
        loss: Of outputs and targets the mean over a batch.
        scope: Whether the best of all weights together (``"global"``) or of each (``"layer"``) stay.
        mode: Of the model while it is scored: ``"train"`` or ``"eval"``.
        biases: Prune the biases of layers, too.
        norms: Prune the affine parameters of normalisations, too.
        temperature: Of GraSP.
        iterations: Of SynFlow.
        seed: Of random scores, and of dropout while weights are scored.
        outputs: Names of the outputs to keep, as for `trace`.

    Returns:
        The masks. A warning names layers of which nothing is left.

    Raises:
        UserError: An option is out of range, or data or loss are missing.
        PartitionError: There is nothing to prune.
        InputError: Scores are zero everywhere, or not numbers; data do not fit the model.
        UnsupportedError: GraSP cannot differentiate the loss twice.
        TraceError, UnsupportedError, InputError: The model cannot be traced.
    """
    scoring = Scoring(method, data, loss, mode, temperature, iterations, seed)
    scoring.check()
    if args == () and not kwargs and data is not None:
        args = example_of(data)
    program = program_to_prune(model, args, kwargs, outputs)
    names = prunable(program, biases=biases, norms=norms)
    scores, chosen = choose(program, names, scoring, sparsity, scope)
    masks = Masks(program, chosen, scores, method, scope)
    if masks.cut:
        warnings.warn(
            f"nothing is left of {', '.join(masks.cut)}: such a layer gives no more than its bias",
            stacklevel=2,
        )
    return masks


def program_to_prune(
    model: nn.Module | Program,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    outputs: Sequence[str] | None,
) -> Program:
    """The program of a model, traced where it is none yet."""
    if isinstance(model, ProgramModule):
        return program_of(model)
    if isinstance(model, Program):
        return model
    return trace(model, args, kwargs, outputs=outputs)
