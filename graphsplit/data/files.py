"""Reading files that somebody else made: missing, damaged and foreign ones get one clear sentence."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

from graphsplit.errors import LoadError


def find(folder: str | Path, names: Sequence[str], what: str) -> Path:
    """The first of these files that there is.

    Raises:
        LoadError: There is no such folder, or none of the files is in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LoadError(f"there is no folder {folder}", hint=f"give the folder that holds {what}")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise LoadError(
        f"{folder} holds no {' or '.join(names[:2])}",
        hint=f"put the files of {what} there; none is downloaded",
    )


def read(path: Path) -> bytes:
    """All bytes of a file; of a gzip file those that were packed, whatever its name.

    Raises:
        LoadError: It cannot be read, or the gzip file is damaged.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise LoadError(f"{path} is a damaged gzip file: {error}", hint="fetch the file again") from None
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror}") from None
