"""K programs as one that gives the weighted sum of their outputs.

Before, for K = 2::

    y_0 = f_0(x; w_0)
    y_1 = f_1(x; w_1)

After, with the weights a buffer::

    y = sum(stack([f_0(x; w_0), f_1(x; w_1)]) * weights)

The architectures may differ, as those of sub-models of unlike shares do; inputs and outputs may not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch

from graphsplit.ensembles import Averaged, weighted
from graphsplit.errors import PlanError, UserError
from graphsplit.passes.base import Pass, PassResult, Programs


@dataclass(frozen=True)
class Ensemble(Pass):
    """``ensemble``: the sub-models as one program, whose output is the weighted sum of theirs.

    Attributes:
        weights: One for each program; by default 1 / K.
        average: ``"outputs"``, or ``"probabilities"`` for those that they stand for; where the shape cannot
            tell which, what outputs are: ``"classes"``, ``"classes_last"`` or ``"binary"``.
    """

    name: ClassVar[str] = "ensemble"
    weights: tuple[float, ...] = ()
    average: Averaged = "outputs"

    def run(self, programs: Programs) -> PassResult:
        """Join all there are."""
        if programs.cuts is not None:
            raise PlanError("layer groups run one after the other, and are no ensemble")
        k = len(programs.items)
        weights = torch.tensor(self.weights or (1 / k,) * k, dtype=torch.float64)
        if self.average not in get_args(Averaged):
            raise UserError(f"average is {self.average!r}, expected one of {', '.join(get_args(Averaged))}")
        return PassResult(Programs((weighted(programs.items, weights, self.average),)), modified=True)
