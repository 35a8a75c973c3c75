"""What can be in a bundle, and how each kind is taken apart and put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from graphsplit.bundle.content import MANIFEST, Content
from graphsplit.bundle.programs import program_of, without_weights
from graphsplit.bundle.reader import Reader
from graphsplit.depth.plan import DepthPlan
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import BundleError
from graphsplit.fusion.placement import Placement
from graphsplit.plan import PartitionPlan
from graphsplit.program import Program
from graphsplit.serialization import decode, encode


@dataclass(frozen=True)
class PartitionBundle:
    """All that belongs to a partition.

    Attributes:
        source: The full model. `without_weights` leaves its tensors out.
        plan: Who holds what.
        submodels: The sub-models in order.
        merged: The full-size model put together from them.
        certificate: Numbers that prove the rewrite, as plain JSON data.
        files: Further files by name (ONNX): their content, or where it is. After `load`: where they are.
    """

    kind: ClassVar[str] = "partition"
    source: Program
    plan: PartitionPlan
    submodels: tuple[Program, ...]
    merged: Program | None = None
    certificate: dict[str, Any] | None = None
    files: Mapping[str, bytes | Path] = field(default_factory=dict)

    def content(self) -> Content:
        """What is written."""
        if len(self.submodels) != self.plan.k:
            raise BundleError(f"{len(self.submodels)} sub-models for a plan of {self.plan.k}")
        content = Content(self.kind, self.source.name, {"plan": "plan.json"})
        content.texts["plan.json"] = self.plan.to_json()
        content.index["source"] = content.add("source", self.source)
        content.index["submodels"] = content.add_all("submodel", self.submodels)
        content.index["merged"] = None if self.merged is None else content.add("merged", self.merged)
        content.add_rest(self.certificate, self.files)
        return content

    @classmethod
    def read(cls, reader: Reader) -> PartitionBundle:
        """What was written."""
        manifest = reader.manifest
        plan = reader.plan(PartitionPlan.from_json)
        _check_count(reader, plan.k, len(manifest["submodels"]), "sub-models")
        return cls(
            source=reader.program(manifest["source"]),
            plan=plan,
            submodels=reader.programs(manifest["submodels"]),
            merged=None if manifest["merged"] is None else reader.program(manifest["merged"]),
            certificate=reader.certificate(),
            files=reader.files(),
        )


@dataclass(frozen=True)
class DepthBundle:
    """All that belongs to layer groups.

    Attributes:
        source: The full model, as it was cut. `without_weights` leaves its tensors out.
        plan: Where it is cut.
        groups: The groups in order.
        critics: Local critics, one for each cut; or none.
        options: Plain JSON data beside them: what the critics were made for.
        certificate: Numbers that prove the rewrite, as plain JSON data.
        files: Further files by name (ONNX): their content, or where it is. After `load`: where they are.
    """

    kind: ClassVar[str] = "layer-groups"
    source: Program
    plan: DepthPlan
    groups: tuple[Program, ...]
    critics: tuple[Program, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None
    files: Mapping[str, bytes | Path] = field(default_factory=dict)

    def content(self) -> Content:
        """What is written."""
        if len(self.groups) != self.plan.n:
            raise BundleError(f"{len(self.groups)} groups for a plan of {self.plan.n}")
        if len(self.critics) not in (0, self.plan.n - 1):
            raise BundleError(f"{len(self.critics)} critics for {self.plan.n - 1} cuts")
        content = Content(self.kind, self.source.name, {"plan": "plan.json"})
        content.texts["plan.json"] = self.plan.to_json()
        content.index["source"] = content.add("source", self.source)
        content.index["groups"] = content.add_all("group", self.groups)
        content.index["critics"] = content.add_all("critic", self.critics)
        content.index["options"] = encode(self.options, "the options")
        content.add_rest(self.certificate, self.files)
        return content

    @classmethod
    def read(cls, reader: Reader) -> DepthBundle:
        """What was written."""
        manifest = reader.manifest
        plan = reader.plan(DepthPlan.from_json)
        _check_count(reader, plan.n, len(manifest["groups"]), "groups")
        return cls(
            source=reader.program(manifest["source"]),
            plan=plan,
            groups=reader.programs(manifest["groups"]),
            critics=reader.programs(manifest["critics"]),
            options=decode(manifest["options"]),
            certificate=reader.certificate(),
            files=reader.files(),
        )


@dataclass(frozen=True)
class FusedBundle:
    """All that belongs to K models that run as one.

    Attributes:
        program: All of them.
        singles: Each, without weights; one stands for all where they differ in no more than that.
        k: How many.
        placements: How each state tensor of all models stands in one.
        looped: How many ops of each name run once for each model.
        in_turn: Every op does.
        training: In train mode.
        certificate: Numbers that prove the rewrite, as plain JSON data.
    """

    kind: ClassVar[str] = "fused"
    program: Program
    singles: tuple[Program, ...]
    k: int
    placements: Mapping[str, Placement]
    looped: Mapping[str, int]
    in_turn: bool = False
    training: bool = True
    certificate: dict[str, Any] | None = None

    def content(self) -> Content:
        """What is written."""
        single, *others = map(without_weights, self.singles)
        content = Content(self.kind, single.name, {"k": self.k, "in_turn": self.in_turn})
        content.index["program"] = content.add("program", self.program)
        content.index["single"] = content.add("single", single)
        if others:
            content.index["others"] = content.add_all("other", others)
        content.index["placements"] = {
            name: [placement.kind, placement.ones] for name, placement in sorted(self.placements.items())
        }
        content.index["looped"] = dict(sorted(self.looped.items()))
        content.index["training"] = self.training
        content.add_rest(self.certificate, {})
        return content

    @classmethod
    def read(cls, reader: Reader) -> FusedBundle:
        """What was written."""
        manifest = reader.manifest
        program, single = reader.program(manifest["program"]), reader.program(manifest["single"])
        placements = {
            str(name): Placement(kind, ones) for name, (kind, ones) in manifest["placements"].items()
        }
        k, others = int(manifest["k"]), manifest.get("others", [])
        odd = [
            name
            for name, entry in single.state.items()
            if program.state[name].tensor.shape != placements[name].shape(entry.tensor.shape, k)
        ]
        if odd:
            raise BundleError(f"{reader.folder / MANIFEST} is for {k} models, and {odd[0]} is not of so many")
        if len(others) not in (0, k - 1):
            raise BundleError(f"{reader.folder / MANIFEST} is for {k} models, and has {len(others) + 1}")
        return cls(
            program=program,
            singles=(single, *reader.programs(others)),
            k=k,
            placements=placements,
            looped={str(name): int(count) for name, count in manifest["looped"].items()},
            in_turn=manifest["in_turn"] is True,
            training=manifest["training"] is True,
            certificate=reader.certificate(),
        )


@dataclass(frozen=True)
class MaskBundle:
    """A model with masks.

    Attributes:
        program: The model without them.
        masks: By the first name of a parameter, true where a weight is kept.
        scores: By which they were chosen, in float64.
        options: Plain JSON data beside them: how.
    """

    kind: ClassVar[str] = "masks"
    program: Program
    masks: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    options: dict[str, Any]

    def content(self) -> Content:
        """What is written."""
        content = Content(self.kind, self.program.name, {"options": encode(self.options, "the options")})
        content.index["program"] = content.add("program", self.program)
        content.tensors["masks.safetensors"] = dict(self.masks)
        content.tensors["scores.safetensors"] = dict(self.scores)
        return content

    @classmethod
    def read(cls, reader: Reader) -> MaskBundle:
        """What was written."""
        program = reader.program(reader.manifest["program"])
        found = []
        for name in ("masks.safetensors", "scores.safetensors"):
            found.append(reader.tensors(name))
            for parameter, tensor in found[-1].items():
                entry = program.state.get(parameter)
                if entry is None or entry.tensor.shape != tensor.shape:
                    raise BundleError(
                        f"{reader.path(name)} holds {parameter}, which is no tensor of the model"
                    )
        masks, scores = found
        return cls(program, masks, scores, decode(reader.manifest["options"]))


@dataclass(frozen=True)
class PrunedBundle:
    """A model that has lost units.

    Attributes:
        source: The model before. `without_weights` leaves its tensors out.
        plan: Who holds what: sub-model 0 is the smaller model, sub-model 1 what is gone.
        small: The smaller model.
        axes: Axes that have lost units, by name: units before and after.
        kept: Axes that could not lose any, by name, with the reason.
        certificate: Numbers that prove the rewrite, as plain JSON data.
    """

    kind: ClassVar[str] = "pruned"
    source: Program
    plan: PartitionPlan
    small: Program
    axes: Mapping[str, tuple[int, int]]
    kept: Mapping[str, str]
    certificate: dict[str, Any] | None = None

    def content(self) -> Content:
        """What is written."""
        content = Content(self.kind, self.source.name, {"plan": "plan.json"})
        content.texts["plan.json"] = self.plan.to_json()
        content.index["source"] = content.add("source", self.source)
        content.index["small"] = content.add("small", self.small)
        content.index["axes"] = {name: list(sizes) for name, sizes in self.axes.items()}
        content.index["kept"] = dict(self.kept)
        content.add_rest(self.certificate, {})
        return content

    @classmethod
    def read(cls, reader: Reader) -> PrunedBundle:
        """What was written."""
        manifest = reader.manifest
        plan = reader.plan(PartitionPlan.from_json)
        small = reader.program(manifest["small"])
        for state in plan.state:
            entry = small.state.get(state.name)
            if entry is not None and tuple(entry.tensor.shape) != state.local_shape(0):
                raise BundleError(f"{reader.folder / MANIFEST}: {state.name} is of another size than planned")
        return cls(
            source=reader.program(manifest["source"]),
            plan=plan,
            small=small,
            axes={str(name): (int(before), int(after)) for name, (before, after) in manifest["axes"].items()},
            kept={str(name): str(reason) for name, reason in manifest["kept"].items()},
            certificate=reader.certificate(),
        )


@dataclass(frozen=True)
class EnsembleBundle:
    """All that belongs to an ensemble.

    Attributes:
        members: The models in order.
        weights: One for each.
        options: Plain JSON data beside them: where the weights come from, and what is averaged.
        certificate: Numbers that prove the rewrite, as plain JSON data.
        files: Further files by name (ONNX): their content, or where it is. After `load`: where they are.
    """

    kind: ClassVar[str] = "ensemble"
    members: tuple[Program, ...]
    weights: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None
    files: Mapping[str, bytes | Path] = field(default_factory=dict)

    def content(self) -> Content:
        """What is written."""
        if len(self.weights) != len(self.members) or not self.members:
            raise BundleError(f"{len(self.weights)} weights for {len(self.members)} models")
        content = Content(self.kind, self.members[0].name)
        content.index["members"] = content.add_all("member", self.members)
        content.index["weights"] = list(self.weights)
        content.index["options"] = encode(self.options, "the options")
        content.add_rest(self.certificate, self.files)
        return content

    @classmethod
    def read(cls, reader: Reader) -> EnsembleBundle:
        """What was written."""
        manifest = reader.manifest
        weights = tuple(float(weight) for weight in manifest["weights"])
        if len(weights) != len(manifest["members"]):
            raise ValueError(f"{len(weights)} weights for {len(manifest['members'])} models")
        return cls(
            members=reader.programs(manifest["members"]),
            weights=weights,
            options=decode(manifest["options"]),
            certificate=reader.certificate(),
            files=reader.files(),
        )


Bundle = PartitionBundle | DepthBundle | FusedBundle | EnsembleBundle | MaskBundle | PrunedBundle
Saved = Program | ProgramModule | Bundle

_KINDS: dict[str, type[Bundle]] = {
    kind.kind: kind
    for kind in (PartitionBundle, DepthBundle, FusedBundle, EnsembleBundle, MaskBundle, PrunedBundle)
}


def _check_count(reader: Reader, planned: int, found: int, what: str) -> None:
    if found != planned:
        path = reader.path(reader.manifest["plan"])
        raise BundleError(f"{path} is for {planned} {what}, the bundle has {found}")


def content_of(obj: Saved) -> Content:
    """Everything that is to be written, so that what cannot be is refused before the disk is touched."""
    if isinstance(obj, Bundle):
        return obj.content()
    if isinstance(obj, ProgramModule):
        content = Content("module", obj.program_name, {"training": obj.training})
        content.index["program"] = content.add("program", program_of(obj))
        return content
    if isinstance(obj, Program):
        content = Content("program", obj.name)
        content.index["program"] = content.add("program", obj)
        return content
    raise BundleError(
        f"a {type(obj).__name__} cannot be saved as a bundle",
        hint="give a program, a module that graphsplit made, a partition, layer groups or an ensemble",
    )


def read_kind(reader: Reader) -> Saved:
    """What was saved, by its kind."""
    kind = reader.manifest["kind"]
    if kind in _KINDS:
        return _KINDS[kind].read(reader)
    if kind not in ("program", "module"):
        raise BundleError(f"{reader.folder / MANIFEST} is of the kind {kind!r}, which is not known")
    program = reader.program(reader.manifest["program"])
    if kind == "program":
        return program
    return emit(program, copy=False).train(reader.manifest["training"] is True)
