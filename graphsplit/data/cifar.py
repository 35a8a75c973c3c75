"""The binary version of CIFAR-10 and CIFAR-100: records of labels and 3 × 32 × 32 bytes, channels first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graphsplit.data.files import find, read
from graphsplit.errors import LoadError

PIXELS = 3 * 32 * 32


def cifar10(folder: str | Path, *, train: bool = True) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]`` in 0 to 1 and labels ``[N]`` of CIFAR-10.

    Args:
        folder: Holds ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``.
        train: The five training files, else the test file.

    Raises:
        LoadError: A file is missing, truncated or in another format.
    """
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] if train else ["test_batch.bin"]
    return _records(folder, names, "CIFAR-10 (binary version)", label_bytes=1, label_at=0, classes=10)


def cifar100(folder: str | Path, *, train: bool = True, coarse: bool = False) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]`` in 0 to 1 and labels ``[N]`` of CIFAR-100.

    Args:
        folder: Holds ``train.bin`` and ``test.bin``.
        train: The training file, else the test file.
        coarse: The 20 superclasses, else the 100 classes.

    Raises:
        LoadError: A file is missing, truncated or in another format.
    """
    names = ["train.bin" if train else "test.bin"]
    what = "CIFAR-100 (binary version)"
    return _records(
        folder, names, what, label_bytes=2, label_at=0 if coarse else 1, classes=20 if coarse else 100
    )


def _records(
    folder: str | Path, names: Sequence[str], what: str, *, label_bytes: int, label_at: int, classes: int
) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for name in names:
        path = find(folder, [name, f"{name}.gz"], what)
        content = read(path)
        size = label_bytes + PIXELS
        if not content or len(content) % size:
            raise LoadError(
                f"{path} has {len(content):,} bytes, which is no multiple of a record's {size:,}",
                hint=f"is it a file of {what}, and whole?",
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, size)
        found = records[:, label_at]
        if int(found.max()) >= classes:
            raise LoadError(
                f"{path} has a label {int(found.max())}, expected less than {classes}",
                hint=f"is it a file of {what}?",
            )
        images.append(torch.from_numpy(records[:, label_bytes:].copy()).reshape(-1, 3, 32, 32))
        labels.append(torch.from_numpy(found.astype(np.int64)))
    return torch.cat(images).float() / 255, torch.cat(labels)
