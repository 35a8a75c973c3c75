"""Saving and loading."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError

from graphsplit.bundle.content import MANIFEST
from graphsplit.bundle.folder import check_file, made, parsing, read_manifest, replacing, write
from graphsplit.bundle.kinds import Saved, content_of, read_kind
from graphsplit.bundle.reader import Reader
from graphsplit.errors import BundleError


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
    content = content_of(obj)
    target = Path(path).resolve()
    try:
        with made(target.parent), replacing(target, overwrite) as folder:
            write(content, folder)
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
        manifest = read_manifest(folder)
        with parsing(folder / MANIFEST):
            for name, row in manifest["files"].items():
                check_file(folder, name, row)
            return read_kind(Reader(folder, manifest, torch.device(device)))
    except OSError as error:
        raise BundleError(f"the bundle {path} cannot be read: {error.strerror or error}") from error
