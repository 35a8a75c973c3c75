"""Run a user's model without leaving a trace in it."""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, deque)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Give the model the Python state that it had, and the random generators theirs, back.

    What forward keeps in its module (a table made at the first call, the size that it was made for) would
    hold values of a tracer, or tell the next call of a table which was taken back. That goes for attributes,
    for what they hold, and for functions with a cache. What is written into parameters and buffers stays: use
    `set_tensors` with copies.
    """
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    restore: list[Callable[[], None]] = []
    for value in _reachable(model):
        if isinstance(value, Tensor):
            if id(value) not in registered:
                restore.append(functools.partial(_restore_tensor, value, value.detach().clone()))
        elif isinstance(value, np.ndarray):
            restore.append(functools.partial(np.copyto, value, value.copy()))
        elif isinstance(value, _CONTAINERS):
            restore.append(functools.partial(_restore_container, value, copy.copy(value)))
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for give_back in reversed(restore):
            give_back()
        random.setstate(states[0])
        np.random.set_state(states[1])
        for function in _cached_functions(model):
            function.cache_clear()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each by its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def tensors_by_all_names(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each by every name that it has."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def copies_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers, as leaves."""
    return {
        name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors_of(model).items()
    }


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of parameters and buffers, at all their names, inside of `untouched`."""
    first: dict[int, str] = {}
    for name, tensor in tensors_by_all_names(model).items():
        own = first.setdefault(id(tensor), name)
        if own in tensors:
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            held = module._parameters if attribute in module._parameters else module._buffers
            held[attribute] = tensors[own]  # type: ignore[assignment]


def _reachable(model: nn.Module) -> Iterator[Any]:
    """What Python state a model has: namespaces of modules and plain objects, containers, arrays, tensors."""
    seen: set[int] = set()
    stack: list[Any] = [model]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (Tensor, np.ndarray)):
            yield value
        elif isinstance(value, dict):
            yield value
            stack.extend(value.values())
        elif isinstance(value, _CONTAINERS):
            yield value
            stack.extend(value)
        elif isinstance(value, (tuple, frozenset)):
            stack.extend(value)
        elif isinstance(value, nn.Module) or _is_plain(value):
            stack.append(vars(value))


def _is_plain(value: Any) -> bool:
    """An object of a class of the user's, or of a library on top of torch."""
    root = type(value).__module__.partition(".")[0]
    return (
        hasattr(value, "__dict__")
        and root not in {"torch", "builtins", "numpy", *sys.stdlib_module_names}
        and not isinstance(value, type)
        and not callable(value)
    )


def _restore_tensor(tensor: Tensor, kept: Tensor) -> None:
    if not tensor.is_meta and not torch.equal(tensor.detach(), kept):
        tensor.data.copy_(kept)


def _restore_container(container: Any, kept: Any) -> None:
    container.clear()
    container.update(kept) if isinstance(container, (dict, set)) else container.extend(kept)


def _cached_functions(model: nn.Module) -> Iterator[Any]:
    """Functions with ``lru_cache`` in the classes of a model and in the files that define them."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    files = {base.__module__ for base in classes if base.__module__.partition(".")[0] != "torch"}
    for space in (*classes, *(sys.modules[name] for name in files if name in sys.modules)):
        for value in list(vars(space).values()):
            if isinstance(value, functools._lru_cache_wrapper):
                yield value
