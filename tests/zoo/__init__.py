"""Small models of many families, written the way their users write them."""

import functools
from typing import Any

import graphsplit as gs
from graphsplit.program import Program
from graphsplit.signature import as_call
from zoo import fields, hub, odd, sequence, vision
from zoo.entry import Entry

ZOO: dict[str, Entry] = {}
for _module in (vision, sequence, odd, fields, hub):
    for _entry in _module.ENTRIES:
        if _entry.name in ZOO:
            raise ValueError(f"two models are called {_entry.name}")
        ZOO[_entry.name] = _entry


def call_of(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of a model as ``(args, kwargs)``."""
    return as_call(ZOO[name].inputs())


@functools.cache
def traced(name: str) -> Program:
    """The program of a model, traced once for all tests of a process: tracing takes most of their time."""
    return gs.trace(ZOO[name].build(), *call_of(name))


__all__ = ["ZOO", "Entry", "call_of", "traced"]
