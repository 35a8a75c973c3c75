"""Where a traced op comes from, in the user's words: module path and line of code."""

from __future__ import annotations

import functools
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graphsplit.program import Source

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)')
_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def source_from_meta(meta: Mapping[str, Any], strip: Callable[[str], str]) -> Source:
    """The innermost module and the innermost line that is neither torch's nor ours."""
    path = ""
    stack = meta.get("nn_module_stack")
    if stack:
        path = strip(next(reversed(stack.values()))[0].split("@")[0])
        if path.startswith("_empty_nn_module_stack"):
            path = ""
    file, line, code = _last_frame(meta.get("stack_trace") or "")
    return Source(path, file, line, code)


@functools.lru_cache(maxsize=4096)
def _last_frame(trace: str) -> tuple[str, int, str]:
    frames = _FRAME.findall(trace)
    frames = [frame for frame in frames if not frame[0].startswith(_OURS)]
    users = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    if not users:
        return "", 0, ""
    file, line, code = users[-1]
    return file, int(line), code.strip()


@contextmanager
def named_forward(model: nn.Module) -> Iterator[None]:
    """Let the code of every ``forward`` go by that name: of other functions the tracer keeps no line."""
    changed: list[tuple[dict[str, Any], Any]] = []
    missing = object()
    for module in model.modules():
        method = module.forward
        function = getattr(method, "__func__", method)
        if not isinstance(function, types.FunctionType) or function.__module__.startswith("torch."):
            continue
        if function.__code__.co_name == "forward" or hasattr(function, "__wrapped__"):
            continue
        renamed = _renamed(function, "forward")
        owner = getattr(method, "__self__", None)
        attributes = vars(module)
        changed.append((attributes, attributes.get("forward", missing)))
        attributes["forward"] = renamed if owner is None else types.MethodType(renamed, owner)
    try:
        yield
    finally:
        for attributes, before in changed:
            if before is missing:
                del attributes["forward"]
            else:
                attributes["forward"] = before


def _renamed(function: types.FunctionType, name: str) -> types.FunctionType:
    """The same function, with another name in tracebacks."""
    code = function.__code__.replace(co_name=name)
    twin = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__annotations__ = function.__annotations__
    twin.__dict__.update(function.__dict__)
    return twin
