"""What a rule says of one node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graphsplit.analysis.units import Factors, Ids
from graphsplit.program import op_name

if TYPE_CHECKING:
    from torch import fx

    from graphsplit.analysis.inference import Inference

Path = tuple[int, ...] | str
"""Place of an operand: position in ``args`` (and in a list argument), or the name of a keyword."""


@dataclass(slots=True)
class Facts:
    """How units pass through a node.

    Attributes:
        outputs: Factors of the result; for an op with several results a list of them.
        expects: Operands that are met by units in a dimension along which they have none themselves: the
            factors by which each sub-model takes its slice of them.
        mixes: Factors of operands, with the dimensions over which the op mixes values. Where such a dimension
            is divided, each sub-model has its own result: a cross-unit op.
        contracts: The same for weighted sums against a weight that is divided alike: the cross weights are
            zero, so the full op is the op of all sub-models at once.
        linear: Operands in which the op is jointly linear (affine), the others being constants.
        keeps_zero: A result entry is zero wherever the first operand's is.
        whole: Reason why the units of the operands were kept whole, where there was no better rule.
    """

    outputs: Factors | list[Factors]
    expects: dict[Path, Factors] = field(default_factory=dict)
    mixes: list[tuple[Ids, tuple[int, ...]]] = field(default_factory=list)
    contracts: list[tuple[Ids, tuple[int, ...]]] = field(default_factory=list)
    linear: tuple[fx.Node, ...] = ()
    keeps_zero: bool = False
    whole: str | None = None


Rule = Callable[["Inference", "fx.Node"], Facts]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ops by name (``"linear.default"``)."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two rules for {name}")
            RULES[name] = function
        return function

    return register


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def place_of(node: fx.Node, position: int, name: str) -> Path:
    """Place of an argument that may be given by position or keyword."""
    return (position,) if len(node.args) > position else name


def written_places(node: fx.Node, size: int) -> NDArray[np.int64]:
    """Indices that a ``slice_scatter`` or ``select_scatter`` writes along its dimension of this size."""
    if op_name(node) == "select_scatter.default":
        return np.arange(size)[[argument(node, 3, "index")]]
    bounds = (argument(node, place, name) for place, name in ((3, "start"), (4, "end"), (5, "step")))
    return np.arange(size)[slice(*bounds)]


def indexed(node: fx.Node, rank: int) -> tuple[int, Any]:
    """Dimension and indices of a look-up along one dimension; several index tensors give -1 and None."""
    if op_name(node) == "index_select.default":
        return int(argument(node, 1, "dim")) % rank, argument(node, 2, "index")
    given: Any = node.args[1]
    places = [dim for dim, index in enumerate(given) if index is not None]
    return (places[0], given[places[0]]) if len(places) == 1 else (-1, None)


def rolled(node: fx.Node, rank: int) -> tuple[list[int], list[int]]:
    """Shifts and dimensions of a ``roll``; no dimensions for one over the flattened tensor."""
    shifts, dims = argument(node, 1, "shifts"), argument(node, 2, "dims", [])
    shifts, dims = ([value] if isinstance(value, int) else list(value) for value in (shifts, dims))
    return shifts, [dim % rank for dim in dims]
