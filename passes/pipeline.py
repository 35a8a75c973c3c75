"""Passes in a row, with a check between any two.

>>> pipeline = Pipeline.parse("partition(k=2) | merge")
>>> [p.name for p in pipeline.passes]
['partition', 'merge']
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphsplit.errors import GraphsplitError, InternalError, UserError
from graphsplit.passes.base import Pass, PassResult, Programs
from graphsplit.passes.dead_code_elimination import DeadCodeElimination
from graphsplit.passes.ensemble import Ensemble
from graphsplit.passes.fuse import Fuse
from graphsplit.passes.layer_groups import LayerGroups, Recompose
from graphsplit.passes.merge import Merge
from graphsplit.passes.partition import Partition
from graphsplit.passes.prune_units import PruneUnits
from graphsplit.passes.sparsify import Sparsify
from graphsplit.passes.unstack import Unstack
from graphsplit.passes.widen import Widen
from graphsplit.program import Program, check

PASSES: tuple[type[Pass], ...] = (
    Partition, Merge, Fuse, Ensemble, Widen, LayerGroups, Recompose, Sparsify, PruneUnits, Unstack,
    DeadCodeElimination,
)  # fmt: skip
"""Every pass that can be named in a pipeline's text."""


@dataclass(frozen=True)
class Timing:
    """One run of a pass: seconds, whether it changed anything, and why not."""

    name: str
    seconds: float
    modified: bool
    reason: str = ""


@dataclass
class Pipeline:
    """Runs passes in order.

    Attributes:
        passes: What to run.
        verify: Check every program for well-formedness before the first pass and after each.
        between: Called with the pass and its result after each pass, to print or measure.
        timings: Of the last run.
    """

    passes: Sequence[Pass]
    verify: bool = True
    between: Callable[[Pass, PassResult], None] | None = None
    timings: list[Timing] = field(default_factory=list)

    @classmethod
    def parse(cls, text: str, registry: Sequence[type[Pass]] = PASSES) -> Pipeline:
        """Read ``"name(option=value) | name"``; values are Python literals.

        Raises:
            UserError: A pass or option is unknown, or a value is no literal; near names are offered.
        """
        items = [item.strip() for item in text.split("|")]
        if not all(items):
            raise UserError(
                f"the pipeline {text!r} has an empty step", hint="write passes as 'name(option=value) | name'"
            )
        return cls([_parse_pass(item, registry) for item in items])

    def __call__(self, programs: Program | Sequence[Program] | Programs) -> Programs:
        """Run every pass.

        Raises:
            GraphsplitError: As the pass raised it, with the pass and those before it named.
            InternalError: A pass left a malformed program; the message has the pass, the node and the line.
        """
        current = Programs.of(programs)
        self.timings = []
        if self.verify:
            self._check(current, "the input of the pipeline")
        for number, item in enumerate(self.passes):
            before = ", ".join(p.name for p in self.passes[:number]) or "nothing"
            place = f"pass {item.name} (after {before})"
            start = time.perf_counter()
            try:
                result = item.run(current)
            except GraphsplitError as error:
                error.message = f"{place}: {error.message}"
                raise
            except Exception as error:
                raise InternalError(f"{place} failed with {type(error).__name__}: {error}") from error
            self.timings.append(
                Timing(item.name, time.perf_counter() - start, result.modified, result.reason)
            )
            if self.verify:
                self._check(result.programs, place)
            if self.between is not None:
                self.between(item, result)
            current = result.programs
        return current

    @staticmethod
    def _check(programs: Programs, place: str) -> None:
        for program in programs.items:
            try:
                check(program)
            except InternalError as error:
                error.message = f"{place}: {error.message}"
                raise

    def __str__(self) -> str:
        return " | ".join(_text(item) for item in self.passes)


def _parse_pass(text: str, registry: Sequence[type[Pass]]) -> Pass:
    try:
        expression = ast.parse(text.replace("-", "_"), mode="eval").body
    except SyntaxError:
        raise UserError(
            f"cannot read the pass {text!r}", hint="write it as 'name' or 'name(option=value)'"
        ) from None
    call = expression if isinstance(expression, ast.Call) else ast.Call(expression, [], [])
    if not isinstance(call.func, ast.Name) or call.args:
        raise UserError(
            f"cannot read the pass {text!r}", hint="options are given by name: 'name(option=value)'"
        )
    known = {kind.name: kind for kind in registry}
    name = call.func.id.replace("_", "-")
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known passes: {', '.join(known)}"
        raise UserError(f"there is no pass {name!r}", hint=hint)
    kind = known[name]
    options = {option.name: option for option in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg not in options:
            raise UserError(
                f"{name} has no option {keyword.arg!r}", hint=f"its options: {', '.join(options) or 'none'}"
            )
        try:
            value = ast.literal_eval(keyword.value)
        except ValueError:
            raise UserError(
                f"{name}: {keyword.arg} is no literal", hint="write a number, True, False or a string"
            ) from None
        wanted = type(options[keyword.arg].default)
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise UserError(f"{name}: {keyword.arg} is {value!r}, expected a {wanted.__name__}")
        values[keyword.arg] = value
    return kind(**values)


def _text(item: Pass) -> str:
    changed = [
        f"{option.name}={getattr(item, option.name)!r}"
        for option in dataclasses.fields(item)
        if getattr(item, option.name) != option.default
    ]
    return f"{item.name}({', '.join(changed)})" if changed else item.name
