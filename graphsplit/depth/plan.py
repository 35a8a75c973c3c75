"""Where a model is cut by depth, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from graphsplit.errors import PlanError

Measure = Literal["flops", "params", "memory", "time"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
Tied = Literal["refuse", "copy"]
TIED: tuple[Tied, ...] = get_args(Tied)
UNITS: Mapping[Measure, str] = {
    "flops": "FLOPs",
    "params": "parameters",
    "memory": "bytes",
    "time": "seconds",
}

FORMAT = "graphsplit-depth-plan"
VERSION = 1


@dataclass(frozen=True)
class Crossing:
    """A tensor that crosses a cut.

    Attributes:
        name: Of the node that computes it.
        shape: With the batch of the example.
        dtype: As in ``float32``.
        source: Module and line of the user's code.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    source: str


@dataclass(frozen=True)
class GroupPlan:
    """One layer group.

    Attributes:
        starts: Name of its first node in each graph of the program.
        source: Module and line at which it starts.
        cost: In the plan's measure.
        flops: Of a forward pass, with the batch of the example.
        parameters: Number of scalars in its parameters.
        state: Names of the parameters, buffers and constants that it holds.
        crossing: What it hands to the next group; nothing for the last.
    """

    starts: tuple[str, ...]
    source: str
    cost: float
    flops: int
    parameters: int
    state: tuple[str, ...]
    crossing: tuple[Crossing, ...] = ()


@dataclass(frozen=True)
class DepthPlan:
    """A division into layer groups.

    Attributes:
        model: Class name of the model.
        measure: What was balanced.
        bound: What the dearest group costs at least, wherever the cuts are.
        groups: In the order in which they run.
        tied: ``"refuse"``, or ``"copy"`` where every group that uses a tied weight has its own.
    """

    model: str
    measure: Measure
    bound: float
    groups: tuple[GroupPlan, ...]
    tied: Tied = "refuse"

    @property
    def n(self) -> int:
        """Number of groups."""
        return len(self.groups)

    def to_json(self) -> str:
        """The plan as text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DepthPlan:
        """Read what `to_json` wrote.

        Raises:
            PlanError: The text is no plan, or one of a newer format.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("it is of another format")
            if data.pop("version") != VERSION:
                raise ValueError("it is of a newer format")
            groups = tuple(_group(row) for row in data.pop("groups"))
            plan = cls(groups=groups, **data)
            if plan.measure not in MEASURES:
                raise ValueError(f"the measure {plan.measure!r} is not known")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this is no depth plan: {error}") from None
        return plan


def _group(row: dict[str, Any]) -> GroupPlan:
    crossing = tuple(Crossing(**{**item, "shape": tuple(item["shape"])}) for item in row["crossing"])
    return GroupPlan(
        **{**row, "starts": tuple(row["starts"]), "state": tuple(row["state"]), "crossing": crossing}
    )
