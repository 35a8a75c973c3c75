"""Where a traced op comes from, in the user's words: module path and line of code."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

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
    users = [frame for frame in frames if not frame[0].startswith((_TORCH, _OURS))]
    if not users:
        users = frames
    if not users:
        return "", 0, ""
    file, line, code = users[-1]
    return file, int(line), code.strip()
