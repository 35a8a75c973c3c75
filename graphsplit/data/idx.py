"""The IDX format of MNIST and EMNIST, gzip or not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graphsplit.data.files import find, read
from graphsplit.errors import LoadError

# The third byte of the magic number; all are big-endian.
TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | Path) -> Tensor:
    """The array in an IDX file: two zero bytes, type, number of dimensions, sizes (big-endian), values.

    Raises:
        LoadError: The file is missing, truncated, too long or in another format.
    """
    path = Path(path)
    content = read(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES:
        raise LoadError(
            f"{path} is no IDX file: it begins with {content[:4].hex() or 'nothing'}",
            hint="the files of MNIST begin with 00000803 (images) and 00000801 (labels)",
        )
    kind, rank = np.dtype(TYPES[content[2]]), content[3]
    begin = 4 + 4 * rank
    shape = tuple(np.frombuffer(content[4:begin], ">u4").tolist()) if len(content) >= begin else ()
    expected = begin + kind.itemsize * math.prod(shape)
    if len(content) != expected or len(shape) != rank:
        raise LoadError(
            f"{path} has {len(content):,} bytes, its header of {rank} dimensions {shape} says {expected:,}",
            hint="the file is truncated or was changed: fetch it again",
        )
    values = np.frombuffer(content, kind, offset=begin).reshape(shape)
    return torch.from_numpy(values.astype(kind.newbyteorder("=")))


def mnist(folder: str | Path, *, train: bool = True, split: str | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels of MNIST, or of files in its format (EMNIST, Fashion-MNIST).

    Args:
        folder: Holds ``train-images-idx3-ubyte`` and its three companions, gzip or not.
        train: The training set, else the test set.
        split: Of EMNIST: ``"balanced"``, ``"letters"``, ... for files named ``emnist-balanced-train-...``.

    Returns:
        Images ``[N, 1, H, W]`` in 0 to 1, labels ``[N]`` as int64. EMNIST's images lie on their side in the
        files; they are turned upright.

    Raises:
        LoadError: A file is missing or damaged, or images and labels differ in number.
    """
    if split is None:
        stem, what = "train" if train else "t10k", "MNIST"
    else:
        stem, what = f"emnist-{split}-{'train' if train else 'test'}", "EMNIST"
    images_at, labels_at = (
        find(folder, [f"{stem}-{kind}", f"{stem}-{kind}.gz", f"{stem}-{kind.replace('-idx', '.idx')}"], what)
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    images, labels = read_idx(images_at), read_idx(labels_at)
    if images.dim() != 3 or images.dtype != torch.uint8:
        raise LoadError(
            f"{images_at} holds {images.dtype} of shape {tuple(images.shape)}, expected bytes [N, H, W]"
        )
    if labels.shape != images.shape[:1]:
        raise LoadError(
            f"{images_at} holds {len(images):,} images, {labels_at.name} {len(labels):,} labels",
            hint="the two files belong to different sets",
        )
    if split is not None:
        images = images.transpose(1, 2)
    return images[:, None].float() / 255, labels.long()
