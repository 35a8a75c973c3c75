"""What a pass is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from graphsplit.analysis import Analysis
from graphsplit.depth.cuts import Cuts
from graphsplit.errors import PartitionError
from graphsplit.program import Program


@dataclass(frozen=True)
class Programs:
    """What flows through a pipeline: one program, or those that it was divided into.

    Attributes:
        items: The programs at this point.
        analysis: How they came from one program, once a pass has divided it by width.
        cuts: The same by depth.
    """

    items: tuple[Program, ...]
    analysis: Analysis | None = None
    cuts: Cuts | None = None

    @classmethod
    def of(cls, programs: Program | Sequence[Program] | Programs) -> Programs:
        """Wrap what a user gives."""
        if isinstance(programs, Programs):
            return programs
        return cls((programs,)) if isinstance(programs, Program) else cls(tuple(programs))

    def single(self) -> Program:
        """The one program there is.

        Raises:
            PartitionError: There are several.
        """
        if len(self.items) != 1:
            raise PartitionError(f"expected one program, there are {len(self.items)}")
        return self.items[0]

    def with_items(self, items: Sequence[Program]) -> Programs:
        """Other programs, divided in the same way."""
        return replace(self, items=tuple(items))


@dataclass(frozen=True)
class PassResult:
    """Programs after a pass, and whether they differ from those before."""

    programs: Programs
    modified: bool
    reason: str = ""


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite: options are fields, ``name`` is what users type, `run` does the work.

    A pass never changes the programs it is given.
    """

    name: ClassVar[str]

    @abstractmethod
    def run(self, programs: Programs) -> PassResult:
        """Apply the rewrite."""
