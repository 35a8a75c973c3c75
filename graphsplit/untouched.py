"""Run a user's model without leaving a trace in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Give modules the attributes that they had, and the random generator its state, back.

    What forward keeps in its module (a table made at the first call, the size that it was made for) would
    hold values of a tracer, or tell the next call of a table which was taken back. What is written into
    tensors stays: use `set_tensors` with copies.
    """
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    containers = [pair for _, kept in attributes for value in kept.values() for pair in _contents(value)]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for found, kept in attributes:
            found.clear()
            found.update(kept)
        for container, content in containers:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of parameters and buffers, at all their names, inside of `untouched`."""
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    first: dict[int, str] = {}
    for name, tensor in named:
        own = first.setdefault(id(tensor), name)
        if own in tensors:
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            held = module._parameters if attribute in module._parameters else module._buffers
            held[attribute] = tensors[own]  # type: ignore[assignment]


def _contents(value: Any) -> Iterator[tuple[Any, Any]]:
    """Lists, dicts and sets in a value, each with a copy."""
    if isinstance(value, (list, dict, set)):
        yield value, copy.copy(value)
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _contents(inner)
