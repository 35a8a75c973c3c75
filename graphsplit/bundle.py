"""`save` and `load`: what graphsplit makes as a folder of JSON and safetensors.

Layout::

    manifest.json            format, tools, what is where, certificate, size and sha256 of every file
    plan.json                the partition plan, or the depth plan
    source.graph.json        a program without its tensors (also program.*, submodel_0.*, group_0.*,
                             member_0.*, merged.*)
    source.safetensors       its tensors by name; none where all are on the meta device
    masks.safetensors        masks on weights, and scores.safetensors by which they were chosen
    anything.onnx            further files, as they were given

A folder is written beside its place, forced to disk, and renamed into it, so that a reader finds the old
bundle or the new one. It is read only after the manifest and then the size and digest of every file were
found right. Nothing is pickled and no code in a bundle is run. The same object gives the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graphsplit.depth.plan import DepthPlan
from graphsplit.emission import ProgramModule, emit
from graphsplit.errors import BundleError, PlanError
from graphsplit.plan import PartitionPlan
from graphsplit.program import TRAINING, Program, StateEntry
from graphsplit.serialization import decode, encode, program_from_data, program_to_data

FORMAT = "graphsplit-bundle"
VERSION = 1
MANIFEST = "manifest.json"

Kind = Literal["program", "module", "partition", "layer-groups", "fused", "ensemble", "masks"]

Plan = TypeVar("Plan", PartitionPlan, DepthPlan)

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
# What file managers leave behind; no reason to keep a bundle from being replaced.
_IGNORED = {".DS_Store", "Thumbs.db", "desktop.ini"}


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

    source: Program
    plan: PartitionPlan
    submodels: tuple[Program, ...]
    merged: Program | None = None
    certificate: dict[str, Any] | None = None
    files: Mapping[str, bytes | Path] = field(default_factory=dict)


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

    source: Program
    plan: DepthPlan
    groups: tuple[Program, ...]
    critics: tuple[Program, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None
    files: Mapping[str, bytes | Path] = field(default_factory=dict)


@dataclass(frozen=True)
class FusedBundle:
    """All that belongs to K models that run as one.

    Attributes:
        program: All of them.
        single: One of them, without weights.
        k: How many.
        same: For each state tensor whether all models share one; others have a leading dimension of K.
        looped: How many ops of each name run once for each model.
        in_turn: Every op does.
        training: In train mode.
        certificate: Numbers that prove the rewrite, as plain JSON data.
    """

    program: Program
    single: Program
    k: int
    same: Mapping[str, bool]
    looped: Mapping[str, int]
    in_turn: bool = False
    training: bool = True
    certificate: dict[str, Any] | None = None


@dataclass(frozen=True)
class MaskBundle:
    """A model with masks.

    Attributes:
        program: The model without them.
        masks: By the first name of a parameter, true where a weight is kept.
        scores: By which they were chosen, in float64.
        options: Plain JSON data beside them: how.
    """

    program: Program
    masks: Mapping[str, Tensor]
    scores: Mapping[str, Tensor]
    options: dict[str, Any]


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

    members: tuple[Program, ...]
    weights: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None
    files: Mapping[str, bytes | Path] = field(default_factory=dict)


Saved = Program | ProgramModule | PartitionBundle | DepthBundle | FusedBundle | EnsembleBundle | MaskBundle


def save(obj: Saved, path: str | Path, *, overwrite: bool = True) -> None:
    """Write a bundle, all of it or nothing.

    Args:
        obj: What to save. Tensors on the meta device are saved without values.
        path: The folder to make. An empty folder, or a bundle that holds no foreign file, is replaced.
        overwrite: Give False to refuse to replace a bundle. Other folders are never replaced.

    Raises:
        BundleError: The object holds something without a written form, or the place is taken or cannot be
            written to.
    """
    content = _content(obj)
    target = Path(path).resolve()
    try:
        with _made(target.parent), _replacing(target, overwrite) as folder:
            _write(content, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BundleError(f"the bundle {path} cannot be written: {reason}") from error


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Saved:
    """Read a bundle.

    Args:
        path: A folder that `save` made.
        device: Where to put the tensors, whatever device they were saved from. Those saved without values are
            on the meta device.

    Returns:
        What was saved.

    Raises:
        BundleError: The bundle is missing, damaged, foreign or of a newer format; the message says which file
            and why.
    """
    folder = Path(path)
    try:
        manifest = _read_manifest(folder)
        with _parsing(folder / MANIFEST):
            for name, row in manifest["files"].items():
                _check_file(folder, name, row)
            return _Reader(folder, manifest, torch.device(device)).content()
    except OSError as error:
        raise BundleError(f"the bundle {path} cannot be read: {error.strerror or error}") from error


def without_weights(program: Program) -> Program:
    """The program with its parameters and buffers on the meta device; constants keep their values."""
    return program.with_state(
        {
            name: torch.empty_like(entry.tensor, device="meta").requires_grad_(entry.tensor.requires_grad)
            for name, entry in program.state.items()
            if entry.kind != "constant"
        }
    )


# -- what is saved -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Content:
    """An object taken apart; ``index`` is the part of the manifest that says what is where."""

    kind: Kind
    model: str
    index: dict[str, Any]
    texts: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    files: dict[str, bytes | Path] = field(default_factory=dict)

    def add(self, name: str, program: Program) -> dict[str, str | None]:
        """Take in a program under a name; returns its entry of the index."""
        graph = f"{name}.graph.json"
        self.texts[graph] = _lines(program_to_data(program)) + "\n"
        tensors = {
            entry.name: _storable(entry) for entry in program.state.values() if not entry.tensor.is_meta
        }
        if not tensors:
            return {"graph": graph, "weights": None}
        weights = f"{name}.safetensors"
        self.tensors[weights] = tensors
        return {"graph": graph, "weights": weights}


def _content(obj: Saved) -> _Content:
    """Everything that is to be written, so that what cannot be is refused before the disk is touched."""
    if isinstance(obj, PartitionBundle):
        return _partition_content(obj)
    if isinstance(obj, DepthBundle):
        return _depth_content(obj)
    if isinstance(obj, FusedBundle):
        return _fused_content(obj)
    if isinstance(obj, MaskBundle):
        content = _Content("masks", obj.program.name, {"options": encode(obj.options, "the options")})
        content.index["program"] = content.add("program", obj.program)
        content.tensors["masks.safetensors"] = dict(obj.masks)
        content.tensors["scores.safetensors"] = dict(obj.scores)
        return content
    if isinstance(obj, EnsembleBundle):
        return _ensemble_content(obj)
    if isinstance(obj, ProgramModule):
        content = _Content("module", obj.program_name, {"training": obj.training})
        content.index["program"] = content.add("program", program_of(obj))
        return content
    if isinstance(obj, Program):
        content = _Content("program", obj.name, {})
        content.index["program"] = content.add("program", obj)
        return content
    raise BundleError(
        f"a {type(obj).__name__} cannot be saved as a bundle",
        hint="give a program, a module that graphsplit made, a partition, layer groups or an ensemble",
    )


def _partition_content(obj: PartitionBundle) -> _Content:
    if len(obj.submodels) != obj.plan.k:
        raise BundleError(f"{len(obj.submodels)} sub-models for a plan of {obj.plan.k}")
    content = _Content("partition", obj.source.name, {"plan": "plan.json"})
    content.texts["plan.json"] = obj.plan.to_json()
    content.index["source"] = content.add("source", obj.source)
    content.index["submodels"] = [
        content.add(f"submodel_{number}", program) for number, program in enumerate(obj.submodels)
    ]
    content.index["merged"] = None if obj.merged is None else content.add("merged", obj.merged)
    _add_rest(content, obj.certificate, obj.files)
    return content


def _depth_content(obj: DepthBundle) -> _Content:
    if len(obj.groups) != obj.plan.n:
        raise BundleError(f"{len(obj.groups)} groups for a plan of {obj.plan.n}")
    if len(obj.critics) not in (0, obj.plan.n - 1):
        raise BundleError(f"{len(obj.critics)} critics for {obj.plan.n - 1} cuts")
    content = _Content("layer-groups", obj.source.name, {"plan": "plan.json"})
    content.texts["plan.json"] = obj.plan.to_json()
    content.index["source"] = content.add("source", obj.source)
    content.index["groups"] = [
        content.add(f"group_{number}", program) for number, program in enumerate(obj.groups)
    ]
    content.index["critics"] = [
        content.add(f"critic_{number}", program) for number, program in enumerate(obj.critics)
    ]
    content.index["options"] = encode(obj.options, "the options")
    _add_rest(content, obj.certificate, obj.files)
    return content


def _fused_content(obj: FusedBundle) -> _Content:
    content = _Content("fused", obj.single.name, {"k": obj.k, "in_turn": obj.in_turn})
    content.index["program"] = content.add("program", obj.program)
    content.index["single"] = content.add("single", without_weights(obj.single))
    content.index["same"] = sorted(name for name, same in obj.same.items() if same)
    content.index["looped"] = dict(sorted(obj.looped.items()))
    content.index["training"] = obj.training
    _add_rest(content, obj.certificate, {})
    return content


def _ensemble_content(obj: EnsembleBundle) -> _Content:
    if len(obj.weights) != len(obj.members) or not obj.members:
        raise BundleError(f"{len(obj.weights)} weights for {len(obj.members)} models")
    content = _Content("ensemble", obj.members[0].name, {})
    content.index["members"] = [
        content.add(f"member_{number}", program) for number, program in enumerate(obj.members)
    ]
    content.index["weights"] = list(obj.weights)
    content.index["options"] = encode(obj.options, "the options")
    _add_rest(content, obj.certificate, obj.files)
    return content


def _add_rest(
    content: _Content, certificate: dict[str, Any] | None, files: Mapping[str, bytes | Path]
) -> None:
    content.index["certificate"] = encode(certificate, "the certificate")
    content.index["extra"] = sorted(files)
    taken = {name.casefold() for name in (MANIFEST, *content.texts, *content.tensors)}
    for name, source in sorted(files.items()):
        if not _FILE_NAME.fullmatch(name) or name.casefold() in taken:
            raise BundleError(
                f"a file of a bundle cannot be called {name!r}",
                hint="use letters, digits, dots and dashes, once",
            )
        taken.add(name.casefold())
        content.files[name] = source


def program_of(module: ProgramModule) -> Program:
    """The program that a module runs, with the module's present tensors.

    Lifted constants count as buffers that are not part of the state dict, which is what they are in a module.

    Raises:
        BundleError: A tensor that the graph reads is no longer there under its name.
    """
    nodes = [node for graph in module._graphs for node in graph.nodes]
    read = {node.target for node in nodes if node.op == "get_attr"} - {TRAINING}
    saved = module.state_dict(keep_vars=True).keys()
    names: dict[int, list[str]] = {}
    entries: dict[int, StateEntry] = {}
    named: list[tuple[str, Tensor, Any]] = []
    named += [(name, tensor, "parameter") for name, tensor in module.named_parameters(remove_duplicate=False)]
    named += [(name, tensor, "buffer") for name, tensor in module.named_buffers(remove_duplicate=False)]
    for name, tensor, kind in named:
        # Of the names of a tied tensor the one that the graph reads comes first.
        names.setdefault(id(tensor), []).insert(0 if name in read else len(named), name)
        entries.setdefault(id(tensor), StateEntry(name, kind, tensor, persistent=name in saved))
    state = {
        names[key][0]: replace(entry, name=names[key][0], aliases=tuple(names[key][1:]))
        for key, entry in entries.items()
    }
    lost = sorted(str(name) for name in read if name not in state)
    if lost:
        raise BundleError(
            f"the module no longer holds the tensor {lost[0]}, which its graph reads",
            hint="undo what replaced it (parametrizations, pruning masks) before saving",
        )
    return Program(module.program_name, module._graphs, state, module.signature, names=_registered(module))


def _registered(module: ProgramModule) -> tuple[str, ...]:
    """Every name of a parameter or buffer, module by module."""
    names = []
    for prefix, child in module.named_modules(remove_duplicate=False):
        own = (*child._parameters.items(), *child._buffers.items())
        names += [f"{prefix}.{name}".lstrip(".") for name, value in own if value is not None]
    return tuple(names)


def _storable(entry: StateEntry) -> Tensor:
    """The values of a state tensor as safetensors takes them; complex ones as pairs of real ones."""
    tensor = entry.tensor.detach()
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
        raise BundleError(
            f"the state {entry.name} is no plain dense tensor ({type(tensor).__name__}, {tensor.layout})",
            hint="only dense tensors can be saved",
        )
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not _has_format(tensor.dtype):
        raise BundleError(f"the state {entry.name} is of {tensor.dtype}, which safetensors cannot write")
    return tensor


@functools.lru_cache(maxsize=64)
def _has_format(dtype: torch.dtype) -> bool:
    try:
        return dtype in {value.dtype for value in _round_trip(torch.empty(0, dtype=dtype)).values()}
    except (LookupError, RuntimeError, TypeError, ValueError, SafetensorError):
        return False


def _round_trip(tensor: Tensor) -> dict[str, Tensor]:
    return safetensors.torch.load(safetensors.torch.save({"tensor": tensor}))


def _lines(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry of the outermost object and each item of its lists of containers."""
    inner = indent + "  "
    if isinstance(value, dict) and not indent:
        items = [f"{inner}{json.dumps(key)}: {_lines(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + "\n}"
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return "[\n" + ",\n".join(inner + _lines(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


# -- writing -------------------------------------------------------------------------------------------------


def _write(content: _Content, folder: Path) -> None:
    """All files of a bundle, the manifest last, each forced to disk."""
    for name, text in content.texts.items():
        _write_bytes(folder / name, text.encode("utf-8"))
    for name, tensors in content.tensors.items():
        _write_tensors(folder / name, tensors)
    for name, source in content.files.items():
        if isinstance(source, bytes):
            _write_bytes(folder / name, source)
        else:
            shutil.copyfile(source, folder / name)
    names = sorted((*content.texts, *content.tensors, *content.files))
    for name in names:
        _sync(folder / name)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "kind": content.kind,
        "model": content.model,
        "tools": _tools(),
        **content.index,
        "files": {
            name: {"size": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in names
        },
    }
    _write_bytes(folder / MANIFEST, _sealed(manifest))
    _sync(folder / MANIFEST)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file. It takes no views and no tensors that share memory, so those are copied."""
    storages: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        dense = tensor.resolve_neg().contiguous()
        storage = dense.untyped_storage().data_ptr()
        apart[name] = dense.clone() if storage in storages else dense
        storages.add(storage)
    safetensors.torch.save_file(apart, path)
    # It is made for its owner alone; give it the permissions that the umask gives to the other files.
    path.chmod(path.parent.stat().st_mode & 0o666)


def _tools() -> dict[str, str]:
    from graphsplit import __version__  # the package imports this module

    return {"graphsplit": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def _rendered(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=2, allow_nan=False).encode("ascii") + b"\n"


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest with the digest of its own text as the last entry."""
    digest = hashlib.sha256(_rendered(manifest)).hexdigest()
    return _rendered({**manifest, "digest": digest})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Force a file or a folder to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; unmake them where what follows fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def _replacing(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place when all went well, and is removed when not."""
    _check_free(target, overwrite)
    stem = f".graphsplit-{secrets.token_hex(8)}"
    new, old = target.with_name(f"{stem}.new"), target.with_name(f"{stem}.old")
    try:
        new.mkdir()
        yield new
        _sync(new)
        _check_free(target, overwrite)  # again: writing may have taken minutes
        if target.exists():
            target.rename(old)
        new.rename(target)
        _sync(target.parent)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _check_free(target: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an empty folder and a bundle."""
    if not target.exists():
        return
    if not target.is_dir():
        raise BundleError(f"{target} is a file, where a folder is to be made", hint="give another place")
    if Path.cwd().is_relative_to(target):
        raise BundleError(
            f"{target} holds the working directory and cannot be replaced", hint="give a folder in it"
        )
    present = {entry.name for entry in os.scandir(target)} - _IGNORED
    if not present:
        return
    own = _own_files(target)
    if own is None:
        raise BundleError(
            f"{target} is neither empty nor a graphsplit bundle, and is not replaced",
            hint="give another place",
        )
    foreign = sorted(name for name in present if name not in own or (target / name).is_dir())
    if foreign:
        raise BundleError(
            f"{target} holds {foreign[0]}, which is no part of the bundle, and is not replaced",
            hint="move it away, or give another place",
        )
    if not overwrite:
        raise BundleError(
            f"{target} is a bundle already", hint="give another place, or allow it to be replaced"
        )


def _own_files(target: Path) -> set[str] | None:
    """The files that a bundle says it has; None for a folder that is no bundle."""
    try:
        manifest = json.loads((target / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    files = manifest.get("files")
    return {MANIFEST, *files} if isinstance(files, dict) else {MANIFEST}


# -- reading -------------------------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.exists():
        raise BundleError(f"there is no bundle at {folder}")
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file, and a bundle is a folder")
    if not path.is_file():
        raise BundleError(f"{folder} is no graphsplit bundle: it has no {MANIFEST}")
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError):
        raise BundleError(f"{path} is damaged: it is no JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{path} is not the manifest of a graphsplit bundle")
    version = manifest.get("version")
    if type(version) is not int or version < 1:
        raise BundleError(f"{path} is damaged: its format version is {version!r}")
    if version > VERSION:
        raise BundleError(
            f"{path} is of format {version}, and this graphsplit reads formats up to {VERSION}",
            hint="install a newer graphsplit",
        )
    manifest.pop("digest", None)
    with _parsing(path):
        if _sealed(manifest) != raw:
            raise BundleError(f"{path} is damaged: it does not match its own digest")
    return manifest


def _check_file(folder: Path, name: str, row: Mapping[str, Any]) -> None:
    """Compare a file with the size and the digest in the manifest."""
    path = folder / name
    size, digest = row["size"], row["sha256"]
    if not _FILE_NAME.fullmatch(name) or type(size) is not int or not _DIGEST.fullmatch(digest):
        raise BundleError(f"{folder / MANIFEST} names the file {name!r}, which no bundle can hold")
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path} is missing" if not path.exists() else f"{path} is no ordinary file")
    found = path.stat().st_size
    if found != size:
        reason = "is truncated" if found < size else "has grown"
        raise BundleError(f"{path} {reason}: {found} bytes, and the manifest says {size}")
    if _digest(path) != digest:
        raise BundleError(f"{path} is damaged: its content is not what the manifest says")


@dataclass(frozen=True)
class _Reader:
    """Builds the saved object from files that have been checked."""

    folder: Path
    manifest: dict[str, Any]
    device: torch.device

    def content(self) -> Saved:
        kind = self.manifest["kind"]
        if kind == "partition":
            return self._partition()
        if kind == "layer-groups":
            return self._layer_groups()
        if kind == "fused":
            return self._fused()
        if kind == "masks":
            return self._masks()
        if kind == "ensemble":
            return self._ensemble()
        if kind not in ("program", "module"):
            raise BundleError(f"{self.folder / MANIFEST} is of the kind {kind!r}, which is not known")
        program = self._program(self.manifest["program"])
        if kind == "program":
            return program
        return emit(program, copy=False).train(self.manifest["training"] is True)

    def _masks(self) -> MaskBundle:
        program = self._program(self.manifest["program"])
        paths = [self._path(f"{name}.safetensors") for name in ("masks", "scores")]
        masks, scores = (_read_tensors(path, set(), self.device) for path in paths)
        for path, tensors in zip(paths, (masks, scores), strict=True):
            for name, tensor in tensors.items():
                entry = program.state.get(name)
                if entry is None or entry.tensor.shape != tensor.shape:
                    raise BundleError(f"{path} holds {name}, which is no tensor of the model")
        return MaskBundle(program, masks, scores, decode(self.manifest["options"]))

    def _plan(self, read: Callable[[str], Plan]) -> Plan:
        path = self._path(self.manifest["plan"])
        try:
            return read(path.read_text("utf-8"))
        except PlanError as error:
            raise BundleError(f"{path}: {error.message}", hint=error.hint) from error

    def _layer_groups(self) -> DepthBundle:
        manifest = self.manifest
        plan = self._plan(DepthPlan.from_json)
        if len(manifest["groups"]) != plan.n:
            raise BundleError(
                f"{self._path(manifest['plan'])} is for {plan.n} groups, "
                f"the bundle has {len(manifest['groups'])}"
            )
        return DepthBundle(
            source=self._program(manifest["source"]),
            plan=plan,
            groups=tuple(map(self._program, manifest["groups"])),
            critics=tuple(map(self._program, manifest["critics"])),
            options=decode(manifest["options"]),
            certificate=decode(manifest["certificate"]),
            files={name: self._path(name).absolute() for name in manifest["extra"]},
        )

    def _fused(self) -> FusedBundle:
        manifest = self.manifest
        program, single = self._program(manifest["program"]), self._program(manifest["single"])
        same = set(manifest["same"])
        k = int(manifest["k"])
        odd = [
            name
            for name, entry in program.state.items()
            if name in single.state and name not in same and entry.tensor.shape[:1] != (k,)
        ]
        if odd:
            raise BundleError(f"{self.folder / MANIFEST} is for {k} models, and {odd[0]} is not of so many")
        return FusedBundle(
            program=program,
            single=single,
            k=k,
            same={name: name in same for name in single.state},
            looped={str(name): int(count) for name, count in manifest["looped"].items()},
            in_turn=manifest["in_turn"] is True,
            training=manifest["training"] is True,
            certificate=decode(manifest["certificate"]),
        )

    def _partition(self) -> PartitionBundle:
        manifest = self.manifest
        parsed = self._plan(PartitionPlan.from_json)
        if len(manifest["submodels"]) != parsed.k:
            raise BundleError(
                f"{self._path(manifest['plan'])} is for {parsed.k} sub-models, "
                f"the bundle has {len(manifest['submodels'])}"
            )
        return PartitionBundle(
            source=self._program(manifest["source"]),
            plan=parsed,
            submodels=tuple(map(self._program, manifest["submodels"])),
            merged=None if manifest["merged"] is None else self._program(manifest["merged"]),
            certificate=decode(manifest["certificate"]),
            files={name: self._path(name).absolute() for name in manifest["extra"]},
        )

    def _ensemble(self) -> EnsembleBundle:
        manifest = self.manifest
        weights = tuple(float(weight) for weight in manifest["weights"])
        if len(weights) != len(manifest["members"]):
            raise ValueError(f"{len(weights)} weights for {len(manifest['members'])} models")
        return EnsembleBundle(
            members=tuple(map(self._program, manifest["members"])),
            weights=weights,
            options=decode(manifest["options"]),
            certificate=decode(manifest["certificate"]),
            files={name: self._path(name).absolute() for name in manifest["extra"]},
        )

    def _path(self, name: Any) -> Path:
        """Where a file is; only files that were checked have a place."""
        if name not in self.manifest["files"]:
            raise ValueError(f"it names no digest for {name!r}")
        return self.folder / str(name)

    def _program(self, entry: Mapping[str, Any]) -> Program:
        graph = self._path(entry["graph"])
        with _parsing(graph):
            data = json.loads(graph.read_bytes())
            paired = {row["name"] for row in data["state"] if row["dtype"].startswith("complex")}
        weights = entry["weights"]
        tensors = {} if weights is None else _read_tensors(self._path(weights), paired, self.device)
        try:
            return program_from_data(data, tensors)
        except BundleError as error:
            raise BundleError(f"{graph}: {error.message}", hint=error.hint or self._skew()) from error

    def _skew(self) -> str | None:
        """A hint where another version of torch wrote the bundle."""
        written, present = self.manifest["tools"]["torch"], str(torch.__version__)
        return None if written == present else f"it was saved with torch {written}, this is {present}"


def _read_tensors(path: Path, paired: set[str], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a file, in memory of their own: a mapped file could change under them."""
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name).clone()
                tensors[name] = torch.view_as_complex(tensor) if name in paired else tensor
    except (RuntimeError, SafetensorError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Turn what a file leads to that makes no sense into one sentence that names the file."""
    try:
        yield
    except KeyError as error:
        raise BundleError(f"{path} is damaged: {error} is missing") from error
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error
