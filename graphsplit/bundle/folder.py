"""A bundle's folder: written all or not at all, and read after its digests were found right."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from graphsplit.bundle.content import FILE_NAME, MANIFEST, Content
from graphsplit.errors import BundleError

FORMAT = "graphsplit-bundle"
VERSION = 1

_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
# What file managers leave behind; no reason to keep a bundle from being replaced.
_IGNORED = {".DS_Store", "Thumbs.db", "desktop.ini"}


# -- writing -------------------------------------------------------------------------------------------------


def write(content: Content, folder: Path) -> None:
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
    _write_bytes(folder / MANIFEST, sealed(manifest))
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


def sealed(manifest: Mapping[str, Any]) -> bytes:
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
def made(folder: Path) -> Iterator[None]:
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
def replacing(target: Path, overwrite: bool) -> Iterator[Path]:
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


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, once it is found to be of a format that is known and not damaged."""
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
    with parsing(path):
        if sealed(manifest) != raw:
            raise BundleError(f"{path} is damaged: it does not match its own digest")
    return manifest


def check_file(folder: Path, name: str, row: Mapping[str, Any]) -> None:
    """Compare a file with the size and the digest in the manifest."""
    path = folder / name
    size, digest = row["size"], row["sha256"]
    if not FILE_NAME.fullmatch(name) or type(size) is not int or not _DIGEST.fullmatch(digest):
        raise BundleError(f"{folder / MANIFEST} names the file {name!r}, which no bundle can hold")
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path} is missing" if not path.exists() else f"{path} is no ordinary file")
    found = path.stat().st_size
    if found != size:
        reason = "is truncated" if found < size else "has grown"
        raise BundleError(f"{path} {reason}: {found} bytes, and the manifest says {size}")
    if _digest(path) != digest:
        raise BundleError(f"{path} is damaged: its content is not what the manifest says")


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Turn what a file leads to that makes no sense into one sentence that names the file."""
    try:
        yield
    except KeyError as error:
        raise BundleError(f"{path} is damaged: {error} is missing") from error
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error
