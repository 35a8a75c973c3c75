"""The numbers that prove a division by depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphsplit.emission import ProgramModule, emit
from graphsplit.program import Mode, Program
from graphsplit.verification import (
    Certificate,
    Example,
    Row,
    emitted_equals_model,
    flat_inputs,
    in_double,
    other_batch,
    projected_gradients,
    relative_error,
)

GRADIENTS = 1e-12
"""Gradients are summed in the order in which the nodes ran; copies of tied weights have shares of them."""


@dataclass
class _Run:
    """What a forward and a backward pass leave."""

    outputs: list[Any]
    buffers: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]


def certify_groups(
    program: Program, groups: Sequence[Program], recomposed: Program, example: Example | None
) -> Certificate:
    """Check layer groups: put together they are the program, bit for bit, and so they are in a chain.

    Args:
        program: What was divided.
        groups: The pieces, with the program's own values.
        recomposed: The pieces as one program.
        example: Inputs; without them random ones are made from the signature.
    """
    rows = [_every_parameter_once(program, groups)]
    if any(entry.tensor.is_meta for entry in program.state.values()):
        return Certificate(tuple(rows))
    if example is not None and example.model is not None:
        rows += emitted_equals_model(program, example)
    whole, joined = in_double(program), in_double(recomposed)
    chain = [in_double(group) for group in groups]
    inputs = flat_inputs(program.signature, example)
    modes: tuple[Mode, ...] = ("eval", "train")
    for mode in modes:
        expected = _run([whole], inputs, mode)
        for what, programs in (("recomposed", [joined]), ("the chain of groups", chain)):
            found = _run(programs, inputs, mode)
            error = max(_error(found.outputs, expected.outputs), _common(found.buffers, expected.buffers))
            rows.append(Row(f"{what} equals the model ({mode})", error, 0.0, "float64"))
            error = _common(found.gradients, expected.gradients, without=_shared(groups))
            rows.append(Row(f"gradients of {what} ({mode})", error, GRADIENTS, "float64"))
    other = other_batch(program.signature, inputs)
    if other is not None:
        rows += _another_batch(whole, joined, other)
    return Certificate(tuple(rows))


def _another_batch(whole: Program, joined: Program, inputs: Sequence[Tensor]) -> list[Row]:
    try:
        expected = _run([whole], inputs, "eval")
    except RuntimeError:
        return []  # the model itself takes no other batch with these inputs
    error = _error(_run([joined], inputs, "eval").outputs, expected.outputs)
    return [Row("recomposed equals the model, another batch size", error, 0.0, "float64")]


def _every_parameter_once(program: Program, groups: Sequence[Program]) -> Row:
    counts = Counter(name for group in groups for name in group.state)
    missing = [name for name in program.state if not counts[name]]
    several = [name for name in _shared(groups) if not _has_copies(name, groups)]
    return Row(
        "every parameter is in one group, or has a copy in each", float(len(missing + several)), 0.0, "counts"
    )


def _shared(groups: Sequence[Program]) -> set[str]:
    counts = Counter(
        name for group in groups for name, entry in group.state.items() if entry.kind == "parameter"
    )
    return {name for name, count in counts.items() if count > 1}


def _has_copies(name: str, groups: Sequence[Program]) -> bool:
    tensors = [group.state[name].tensor for group in groups if name in group.state]
    return len({id(tensor) for tensor in tensors}) == len(tensors)


def _run(programs: Sequence[Program], inputs: Sequence[Tensor], mode: Mode) -> _Run:
    """Programs one after the other, under one seed."""
    modules: list[ProgramModule] = [emit(program).train(mode == "train") for program in programs]
    values: Sequence[Any] = inputs
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in modules:
            values = module.run_flat(values)
    state: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    for module in modules:
        state = dict(module.named_parameters()) | state
        buffers = dict(module.named_buffers()) | buffers
    return _Run(list(values), buffers, projected_gradients(values, state))


def _error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    if len(found) != len(expected):
        return float("inf")
    return max((_difference(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)


def _difference(found: Any, expected: Any) -> float:
    if isinstance(expected, Tensor):
        return relative_error(found, expected) if isinstance(found, Tensor) else float("inf")
    return 0.0 if found == expected else float("inf")


def _common(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], without: set[str] | None = None
) -> float:
    """Largest difference over the tensors of one name; infinite where one is missing."""
    names = expected.keys() - (without or set())
    if not names <= found.keys():
        return float("inf")
    return max((_difference(found[name], expected[name]) for name in names), default=0.0)
