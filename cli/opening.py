"""Opening what the user names: a model or a bundle, divided by width or by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from torch import Tensor

from graphsplit import exports
from graphsplit._api import Partition, from_bundle, partition
from graphsplit._ensemble import from_bundle as ensemble_of
from graphsplit._fuse import FusedModule
from graphsplit._layer_groups import LayerGroups
from graphsplit._prune_units import PrunedUnits
from graphsplit._sparsify import Masks
from graphsplit.bundle import (
    DepthBundle,
    EnsembleBundle,
    FusedBundle,
    MaskBundle,
    PartitionBundle,
    PrunedBundle,
    Saved,
    load,
    program_of,
)
from graphsplit.cli.common import Start, Who
from graphsplit.cli.console import Progress
from graphsplit.drawing.division import Division
from graphsplit.emission import ProgramModule
from graphsplit.ensembles import Ensemble
from graphsplit.errors import BundleError, PartitionError
from graphsplit.loading import load_model
from graphsplit.program import Program
from graphsplit.verification import Certificate


@dataclass(frozen=True)
class Asked:
    """A model or bundle as the user named it; ``allow_meta`` where weights are not needed."""

    target: str
    k: int | None = None
    entry: str | None = None
    inputs: Sequence[str] | None = None
    outputs: Sequence[str] | None = None
    allow_meta: bool = False

    @property
    def is_bundle(self) -> bool:
        """True for folders; all models are files or names."""
        return Path(self.target).is_dir()


@dataclass(frozen=True)
class Options:
    """How a model is divided, and what the sub-models start with."""

    shares: tuple[float, ...] | None = None
    strategy: Who = Who.contiguous
    fit: str | None = None
    init: Start = Start.slice
    seed: int = 0


def parse_shares(text: str | None) -> tuple[float, ...] | None:
    """The numbers of ``3,1``."""
    if text is None:
        return None
    try:
        return tuple(float(share) for share in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--shares {text}: expected numbers, such as 3,1") from None


@dataclass(frozen=True)
class Opened:
    """A division by width, of a model or from a bundle.

    Attributes:
        partition: The division.
        origin: Where it came from.
        states: State tensors of the sub-models where a bundle holds them, else None.
        example: The example inputs, where they are all by position or all by keyword.
    """

    partition: Partition
    origin: str
    states: list[Mapping[str, Tensor]] | None = None
    example: Any = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a report begins with."""
        return {"origin": self.origin, "model": self.partition.plan.model, "k": self.partition.k}

    @property
    def words(self) -> str:
        """The same as text."""
        return f"{self.partition.plan.model} from {self.origin}, {self.partition.k} sub-models"

    def drawn(self) -> tuple[Program, Division]:
        """What a figure shows."""
        return self.partition.drawn()

    def pieces(self) -> tuple[Program, ...]:
        """The sub-models, with the bundle's weights where there is one."""
        programs = self.partition.programs
        if self.states is None:
            return programs
        return tuple(
            program.with_state({name: state[name] for name in program.state if name in state})
            for program, state in zip(programs, self.states, strict=True)
        )

    def exports(self, folder: Path) -> exports.Exports:
        """The ONNX files that there can be."""
        merged = self.partition.merged_program(self.states)
        return exports.of_partition(self.pieces(), merged, folder, self.example)

    def verify(self) -> Certificate:
        """The source of a bundle has no weights: the plain merge of those of the sub-models stands for it."""
        divided = self.partition
        if self.states is None:
            return divided.verify()
        full = divided.merged_program(self.states, duplicate=False)
        return partition(full, plan=divided.plan).verify(self.states)


@dataclass(frozen=True)
class OpenedDepth:
    """A division by depth.

    Attributes:
        divided: The division.
        origin: Where it came from.
        example: The example inputs, where they are all by position or all by keyword.
    """

    divided: exports.Depth
    origin: str
    example: Any = None

    @property
    def groups(self) -> LayerGroups:
        """The layer groups."""
        return self.divided if isinstance(self.divided, LayerGroups) else self.divided.groups

    @property
    def facts(self) -> dict[str, Any]:
        """What a report begins with."""
        return {"origin": self.origin, "model": self.groups.plan.model, "n": self.groups.n}

    @property
    def words(self) -> str:
        """The same as text."""
        return f"{self.groups.plan.model} from {self.origin}, {self.groups.n} layer groups"

    def drawn(self) -> tuple[Program, Division]:
        """What a figure shows."""
        return self.divided.drawn()

    def exports(self, folder: Path) -> exports.Exports:
        """The ONNX files that there can be."""
        return exports.of_depth(self.divided, folder, self.example)

    def verify(self) -> Certificate:
        """That the groups are the model."""
        return self.groups.verify()


@dataclass(frozen=True)
class OpenedProgram:
    """One program: a model that was merged, or fused.

    Attributes:
        program: The program.
        origin: Where it came from.
    """

    program: Program
    origin: str

    @property
    def facts(self) -> dict[str, Any]:
        """What a report begins with."""
        return {"origin": self.origin, "model": self.program.name}

    @property
    def words(self) -> str:
        """The same as text."""
        return f"{self.program.name} from {self.origin}, one program"

    def drawn(self) -> tuple[Program, Division | None]:
        """What a figure shows."""
        return self.program, None

    def exports(self, folder: Path) -> exports.Exports:
        """The one ONNX file."""
        return exports.of_programs({"model.onnx": self.program}, folder)

    def verify(self) -> Certificate:
        """There is nothing to compare with."""
        raise _no_partition(self.origin, "one program")


@dataclass(frozen=True)
class OpenedFused(OpenedProgram):
    """K models that run as one.

    Attributes:
        found: The bundle.
    """

    found: FusedBundle

    @property
    def facts(self) -> dict[str, Any]:
        """What a report begins with."""
        return {**super().facts, "k": self.found.k}

    @property
    def words(self) -> str:
        """The same as text."""
        return f"{self.program.name} from {self.origin}, {self.found.k} models as one"

    def verify(self) -> Certificate:
        """That the program does what its models do apart."""
        return FusedModule.from_bundle(self.found).verify()


@dataclass(frozen=True)
class OpenedPruned(OpenedProgram):
    """A model that has lost units.

    Attributes:
        found: The bundle.
    """

    found: PrunedBundle

    @property
    def facts(self) -> dict[str, Any]:
        """What a report begins with."""
        programs = (self.found.source, self.found.small)
        return {**super().facts, "parameters": [program.parameter_count() for program in programs]}

    @property
    def words(self) -> str:
        """The same as text."""
        before, after = self.facts["parameters"]
        return f"{self.program.name} from {self.origin}, {after:,} of {before:,} parameters"

    def verify(self) -> Certificate:
        """That it is the masked model."""
        return PrunedUnits.from_bundle(self.found).verify()


@dataclass(frozen=True)
class OpenedEnsemble:
    """Models joined to one.

    Attributes:
        ensemble: The models.
        origin: Where it came from.
    """

    ensemble: Ensemble
    origin: str

    @property
    def facts(self) -> dict[str, Any]:
        """What a report begins with."""
        return {"origin": self.origin, "model": self.ensemble.program().name, "k": self.ensemble.k}

    @property
    def words(self) -> str:
        """The same as text."""
        return f"{self.facts['model']} from {self.origin}, an ensemble of {self.ensemble.k}"

    def drawn(self) -> tuple[Program, Division | None]:
        """What a figure shows."""
        return self.ensemble.program(), None

    def exports(self, folder: Path) -> exports.Exports:
        """The one ONNX file."""
        return exports.of_programs({"ensemble.onnx": self.ensemble.program()}, folder)

    def verify(self) -> Certificate:
        """That it is the weighted sum of its members."""
        return self.ensemble.verify()


def open_model(asked: Asked, progress: Progress, options: Options | None = None) -> Opened:
    """Load, trace and analyse a model."""
    options = options or Options()
    with progress.step("load"):
        loaded = load_model(
            asked.target, entry=asked.entry, inputs=asked.inputs or (), allow_meta=asked.allow_meta
        )
    with progress.step("trace and analyse"):
        divided = partition(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            k=asked.k,
            shares=options.shares,
            strategy=options.strategy.value,
            fit=options.fit,
            init=options.init.value,
            seed=options.seed,
            outputs=asked.outputs or loaded.outputs,
        )
    return Opened(divided, asked.target, example=loaded.example)


def open_any(asked: Asked, progress: Progress) -> Opened | OpenedDepth | OpenedEnsemble | OpenedProgram:
    """The division of a bundle, by width or by depth, or of a model; or the one program of a bundle."""
    if not asked.is_bundle:
        return open_model(asked, progress)
    bundle = _read_any(asked, progress)
    if isinstance(bundle, PartitionBundle):
        return open_partition(asked, bundle, progress)
    if asked.k is not None:
        raise typer.BadParameter(f"-k is for partitions, and {asked.target} holds {what_is_in(bundle)}")
    if isinstance(bundle, FusedBundle):
        return OpenedFused(bundle.program, asked.target, bundle)
    if isinstance(bundle, PrunedBundle):
        return OpenedPruned(bundle.small, asked.target, bundle)
    if isinstance(bundle, EnsembleBundle):
        return OpenedEnsemble(ensemble_of(bundle), asked.target)
    if not isinstance(bundle, DepthBundle):
        return OpenedProgram(single_program(bundle), asked.target)
    with progress.step("open"):
        return OpenedDepth(from_bundle(bundle), asked.target)


def single_program(bundle: Program | ProgramModule | MaskBundle | PrunedBundle) -> Program:
    """The one program of a bundle; masks are zeros in its weights."""
    if isinstance(bundle, MaskBundle):
        return Masks.from_bundle(bundle).folded_program()
    if isinstance(bundle, PrunedBundle):
        return bundle.small
    return bundle if isinstance(bundle, Program) else program_of(bundle)


def open_width(asked: Asked, progress: Progress, options: Options | None = None) -> Opened:
    """The division of a bundle, or of a model."""
    if not asked.is_bundle:
        return open_model(asked, progress, options)
    if options not in (None, Options()):
        raise typer.BadParameter(
            "--shares, --strategy, --fit and --seed are for models; a bundle is divided already"
        )
    return open_partition(asked, _read_any(asked, progress), progress)


def _read_any(asked: Asked, progress: Progress) -> Saved:
    """What a bundle holds; options that are for models are refused."""
    if asked.entry or asked.inputs or asked.outputs:
        raise typer.BadParameter(
            "--entry, --input and --keep-output are for models; a bundle is traced already"
        )
    with progress.step("read"):
        return load(asked.target)


def open_partition(asked: Asked, bundle: Saved, progress: Progress) -> Opened:
    """The division that a bundle holds."""
    bundle = _as_partition(asked.target, bundle)
    if asked.k not in (None, bundle.plan.k):
        raise PartitionError(
            f"{asked.target} is for K = {bundle.plan.k}",
            hint=f"leave out -k, or partition the model for {asked.k}",
        )
    return open_bundle(bundle, asked.target, progress)


def read_bundle(path: str, progress: Progress) -> PartitionBundle:
    """A bundle that holds a partition."""
    return _as_partition(path, _read_any(Asked(path), progress))


def _as_partition(path: str, bundle: Saved) -> PartitionBundle:
    if isinstance(bundle, PartitionBundle):
        return bundle
    raise _no_partition(path, what_is_in(bundle))


def what_is_in(bundle: Saved) -> str:
    """The kind of a bundle, in words."""
    if isinstance(bundle, EnsembleBundle):
        return "an ensemble"
    if isinstance(bundle, DepthBundle):
        return "layer groups"
    if isinstance(bundle, PartitionBundle):
        return "a partition"
    return "a fused module" if isinstance(bundle, FusedBundle) else "one program"


def _no_partition(path: str, what: str) -> BundleError:
    return BundleError(
        f"{path} holds {what} and no partition", hint="give a folder that `graphsplit partition` wrote"
    )


def open_bundle(bundle: PartitionBundle, path: str, progress: Progress) -> Opened:
    """The division that a bundle holds."""
    with progress.step("analyse"):
        divided = partition(bundle.source, plan=bundle.plan)
    return Opened(divided, path, [state_of(program) for program in bundle.submodels])


def state_of(program: Program) -> dict[str, Tensor]:
    """Every state tensor by name."""
    return {name: entry.tensor for name, entry in program.state.items()}
