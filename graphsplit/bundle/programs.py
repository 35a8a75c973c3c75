"""Programs as bundles take them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graphsplit.emission import ProgramModule
from graphsplit.errors import BundleError
from graphsplit.program import TRAINING, Program, StateEntry


def without_weights(program: Program) -> Program:
    """The program with its parameters and buffers on the meta device; constants keep their values."""
    return program.with_state(
        {
            name: torch.empty_like(entry.tensor, device="meta").requires_grad_(entry.tensor.requires_grad)
            for name, entry in program.state.items()
            if entry.kind != "constant"
        }
    )


def program_of(module: ProgramModule) -> Program:
    """The program that a module runs, with the module's present tensors.

    Lifted constants count as buffers that are not part of the state dict, which is what they are in a module.

    Raises:
        BundleError: A tensor that the graph reads is no longer there under its name.
    """
    nodes = [node for graph in module._graphs for node in graph.nodes]
    read = {node.target for node in nodes if node.op == "get_attr"} - {TRAINING}
    saved = module.state_dict(keep_vars=True).keys()
    names: dict[int, list[str]] = {}
    entries: dict[int, StateEntry] = {}
    named: list[tuple[str, Tensor, Any]] = []
    named += [(name, tensor, "parameter") for name, tensor in module.named_parameters(remove_duplicate=False)]
    named += [(name, tensor, "buffer") for name, tensor in module.named_buffers(remove_duplicate=False)]
    for name, tensor, kind in named:
        # Of the names of a tied tensor the one that the graph reads comes first.
        names.setdefault(id(tensor), []).insert(0 if name in read else len(named), name)
        entries.setdefault(id(tensor), StateEntry(name, kind, tensor, persistent=name in saved))
    state = {
        names[key][0]: replace(entry, name=names[key][0], aliases=tuple(names[key][1:]))
        for key, entry in entries.items()
    }
    lost = sorted(str(name) for name in read if name not in state)
    if lost:
        raise BundleError(
            f"the module no longer holds the tensor {lost[0]}, which its graph reads",
            hint="undo what replaced it (parametrizations, pruning masks) before saving",
        )
    return Program(module.program_name, module._graphs, state, module.signature, names=_registered(module))


def _registered(module: ProgramModule) -> tuple[str, ...]:
    """Every name of a parameter or buffer, module by module."""
    names = []
    for prefix, child in module.named_modules(remove_duplicate=False):
        own = (*child._parameters.items(), *child._buffers.items())
        names += [f"{prefix}.{name}".lstrip(".") for name, value in own if value is not None]
    return tuple(names)
