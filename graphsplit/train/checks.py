"""What a user's settings have to be: a table for each kind of them, and one function that looks at it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, get_args

import torch
from torch import nn

from graphsplit.errors import UserError


@dataclass(frozen=True)
class Rule:
    """What a setting is expected to be, in words, and as a question."""

    expected: str
    holds: Callable[[Any], bool]


def check(values: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Refuse a setting against its rule.

    Raises:
        UserError: The first one, with what was given and what is expected.
    """
    for name, rule in rules.items():
        if not rule.holds(values[name]):
            raise UserError(f"{name} is {_shown(values[name])}, expected {rule.expected}")


def _shown(value: Any) -> str:
    """A value in few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    plain = isinstance(value, (str, int, float, type(None), torch.dtype, torch.device))
    return repr(value) if plain else f"of type {type(value).__name__}"


# Kinds of rules


def whole(least: int | None = None) -> Rule:
    """A whole number."""

    def holds(value: Any) -> bool:
        return _is(value, numbers.Integral) and (least is None or value >= least)

    return Rule("a whole number" if least is None else f"a whole number of {least} or more", holds)


def number(expected: str, fits: Callable[[float], bool]) -> Rule:
    """A number for which something holds."""
    return Rule(expected, lambda value: _is(value, numbers.Real) and fits(value))


def one_of(*known: Any) -> Rule:
    """One of a few."""
    return Rule(f"one of {', '.join(map(str, known))}", lambda value: any(value is own for own in known))


def named(choices: Any) -> Rule:
    """One of the names of a ``Literal``."""
    names = get_args(choices)
    return Rule(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def kind(expected: str, *classes: type) -> Rule:
    """An object of one of some classes."""
    return Rule(expected, lambda value: isinstance(value, classes))


def function(expected: str, but: type = nn.Module) -> Rule:
    """What can be called, but no class of some kind, which would make an instance."""

    def holds(value: Any) -> bool:
        called = value.func if isinstance(value, partial) else value
        return callable(value) and not (isinstance(called, type) and issubclass(called, but))

    return Rule(expected, holds)


def optional(rule: Rule) -> Rule:
    """The same, or None."""
    return Rule(f"{rule.expected}, or None", lambda value: value is None or rule.holds(value))


def _is(value: Any, of: type) -> bool:
    return isinstance(value, of) and not isinstance(value, bool)


# The tables

NOT_NEGATIVE = number("a number of 0 or more", lambda value: value >= 0 and math.isfinite(value))
METRIC = function("a function of outputs and targets, such as torch.nn.functional.cross_entropy")
OPTIMIZER = function(
    "a function of a module, such as lambda m: torch.optim.SGD(m.parameters(), lr=0.1)",
    torch.optim.Optimizer,
)

LEARNING = {
    "optimizer": OPTIMIZER,
    "scheduler": optional(function("a function of an optimizer")),
    "amp": optional(one_of(torch.float16, torch.bfloat16)),
    "clip": optional(number("a number above 0", lambda value: value > 0)),
}
"""Of `Learning`."""

RUN = {
    "model": Rule(
        "a module, or a function that makes one",
        lambda value: isinstance(value, nn.Module) or callable(value),
    ),
    "loss": METRIC,
    "pseudo_loss": optional(METRIC),
    "error": optional(METRIC),
    "test": optional(kind("batches", Iterable)),
    "checkpoint": optional(kind("a folder", str, PathLike)),
    "on_round": optional(function("a function of a record")),
}
"""Of `EnsembleCompression.run`."""
