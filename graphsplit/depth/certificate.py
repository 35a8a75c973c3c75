"""The numbers that prove a division by depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from graphsplit.program import Mode, Program
from graphsplit.verification import (
    Certificate,
    Example,
    Row,
    emitted_equals_model,
    flat_inputs,
    in_double,
    other_batch,
    outputs_error,
    run_chain,
    tensors_error,
)

GRADIENTS = 1e-12
"""Gradients are summed in the order in which the nodes ran; copies of tied weights have shares of them."""


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
        expected = run_chain([whole], inputs, mode)
        for what, programs in (("recomposed", [joined]), ("the chain of groups", chain)):
            found = run_chain(programs, inputs, mode)
            error = max(
                outputs_error(found.outputs, expected.outputs), tensors_error(found.buffers, expected.buffers)
            )
            rows.append(Row(f"{what} equals the model ({mode})", error, 0.0, "float64"))
            error = tensors_error(found.gradients, expected.gradients, without=_shared(groups))
            rows.append(Row(f"gradients of {what} ({mode})", error, GRADIENTS, "float64"))
    other = other_batch(program.signature, inputs)
    if other is not None:
        rows += _another_batch(whole, joined, other)
    return Certificate(tuple(rows))


def _another_batch(whole: Program, joined: Program, inputs: Sequence[Tensor]) -> list[Row]:
    try:
        expected = run_chain([whole], inputs, "eval")
    except RuntimeError:
        return []  # the model itself takes no other batch with these inputs
    error = outputs_error(run_chain([joined], inputs, "eval").outputs, expected.outputs)
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
