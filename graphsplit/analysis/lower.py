"""One node of the full program as a node of one sub-model's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from graphsplit.analysis.analysis import Analysis
from graphsplit.analysis.facts import Path
from graphsplit.analysis.inference import operands
from graphsplit.analysis.layout import Layout
from graphsplit.analysis.localize import Local, local_value, localize
from graphsplit.builder import GraphBuilder


def lower(
    analysis: Analysis, build: GraphBuilder, node: fx.Node, part: int, value_of: Callable[[fx.Node], Any]
) -> fx.Node:
    """Append what ``node`` is in sub-model ``part``.

    Args:
        analysis: Of the full program.
        build: The graph to append to.
        node: A call of the full program.
        part: Number of the sub-model.
        value_of: The sub-model's value of an operand.
    """
    facts = analysis.inference.facts.get(node)
    replaced: dict[Path, fx.Node] = {}
    if facts is not None and facts.expects:
        for path, operand in operands(node):
            if path in facts.expects:
                replaced[path] = _sliced(
                    analysis, build, operand, value_of(operand), facts.expects[path], part
                )

    def swap(path: Path, argument: Any) -> Any:
        if path in replaced:
            return replaced[path]
        if isinstance(argument, fx.Node):
            return value_of(argument)
        return (
            fx.map_arg(argument, value_of) if isinstance(argument, (tuple, list, dict, slice)) else argument
        )

    args = tuple(
        type(argument)(swap((place, inner), item) for inner, item in enumerate(argument))
        if isinstance(argument, (list, tuple))
        else swap((place,), argument)
        for place, argument in enumerate(node.args)
    )
    kwargs = {name: swap(name, argument) for name, argument in node.kwargs.items()}
    here = Local(node, analysis.kinds, part, build, args, kwargs, analysis.inference.constant)
    target, args, kwargs = localize(here)
    if target is None:
        result: fx.Node = args[0]
        return result
    return build.call(target, args, local_value(analysis.kinds, node, part), kwargs, node.name)


def _sliced(
    analysis: Analysis, build: GraphBuilder, operand: fx.Node, value: fx.Node, expected: Any, part: int
) -> fx.Node:
    """A value that all sub-models have in full, cut where it meets units."""
    given = analysis.kinds.layout[operand]
    assert isinstance(given, Layout)
    wanted = analysis.layouts.of(given.shape, expected)
    for dim, cut in enumerate(wanted.cuts):
        if cut is not None and given.cuts[dim] is None:
            build.for_one_part = True
            value = build.take(value, dim, cut[part])
    return value
