"""Digests of tensors and of data: what tells two of them apart without keeping, or sending, either."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

PIECE = 32 << 20
"""Bytes of a tensor that are copied to the CPU at once."""


def digest(value: Any) -> str:
    """Of nested values: dtypes, shapes and bytes of tensors, numbers and texts, of all else the kind."""
    leaves, form = pytree.tree_flatten(value)
    found = hashlib.sha256(repr(form).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            _add(found, leaf.detach())
        else:
            known = isinstance(leaf, (bool, int, float, str, bytes, type(None)))
            found.update(repr(leaf if known else type(leaf)).encode())
    return found.hexdigest()


def _add(found: Any, tensor: Tensor) -> None:
    found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if not tensor.numel():
        return
    rows = tensor if tensor.dim() else tensor[None]
    count = max(1, PIECE * len(rows) // (rows.numel() * rows.element_size()))
    for piece in rows.split(count):
        flat = piece.cpu().resolve_conj().resolve_neg().contiguous().view(-1)
        found.update(flat.view(torch.uint8).numpy().data)
