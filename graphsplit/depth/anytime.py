"""Leave early: a model with critics stops where its budget ends, or where it is sure enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphsplit.emission import ProgramModule
from graphsplit.errors import InputError, UnsupportedError
from graphsplit.program import Program, TensorMeta


class Prediction(NamedTuple):
    """What an anytime model gives.

    Attributes:
        scores: Of the sub-model at which each example left, like the model's output. ``[N, ...]``
        exits: Number of that sub-model. ``[N]``
        flops: Spent on each example, critics that were asked included. ``[N]``
    """

    scores: Tensor
    exits: Tensor
    flops: Tensor


class Anytime(nn.Module):
    """Groups and critics that answer early. Made by `LocalCritics.anytime`; always in eval mode.

    With a budget the largest sub-model within it answers, for all examples. With a confidence an example
    leaves at the first sub-model that gives its class at least this probability, the lowest over all
    positions where there are several; what is left goes on as a smaller batch.

    Attributes:
        budgets: FLOPs of each sub-model for one example, its own critic included.
    """

    def __init__(
        self,
        groups: Sequence[ProgramModule],
        critics: Sequence[nn.Module],
        mains: Sequence[int],
        flops: Sequence[float],
        critic_flops: Sequence[float],
        whole: Program,
    ) -> None:
        super().__init__()
        self.groups = nn.ModuleList(groups)
        self.critics = nn.ModuleList(critics)
        self.budgets = tuple(flops)
        self._mains = tuple(mains)
        self._critic_flops = (*critic_flops, 0.0)
        self._signature = whole.signature
        self._batch_dims = [_batch_dims(group.signature.inputs) for group in groups]
        self.eval()

    def train(self, mode: bool = True) -> Anytime:
        """Only eval mode makes sense: in training every group runs."""
        super().train(False)
        if mode:
            raise InputError("an anytime model does not train", hint="train the local critics that made it")
        return self

    def forward(
        self, *args: Any, budget: float | None = None, confidence: float | None = None, **kwargs: Any
    ) -> Tensor:
        """The scores of `predict`."""
        return self.predict(*args, budget=budget, confidence=confidence, **kwargs).scores

    def predict(
        self, *args: Any, budget: float | None = None, confidence: float | None = None, **kwargs: Any
    ) -> Prediction:
        """Answer within a budget, or as soon as a sub-model is sure.

        Args:
            args: Inputs of the model.
            budget: FLOPs for one example; None: any.
            confidence: Probability of the class at which an example leaves; None: none leaves early.
            kwargs: Further inputs of the model.

        Raises:
            InputError: No sub-model is within the budget, or the confidence is no probability.
            UnsupportedError: Examples cannot be told apart in what crosses a cut.
        """
        if confidence is not None and not 0 <= confidence <= 1:
            raise InputError(f"a confidence of {confidence}", hint="give a probability between 0 and 1")
        last = self._last(budget)
        values: Sequence[Any] = self._signature.flatten(args, kwargs)
        spent = 0.0
        remaining: Tensor | None = None
        found: Prediction | None = None
        for number in range(last + 1):
            values = self._group(number).run_flat(values)
            own = self.budgets[number] - self._critic_flops[number] - self._run_before(number)
            if number < last and confidence is None:
                spent += own
                continue
            spent += own + self._critic_flops[number]
            scores = self._scores(number, values)
            if found is None:
                count = scores.shape[0]
                remaining = torch.arange(count, device=scores.device)
                found = Prediction(
                    scores.new_zeros(scores.shape),
                    remaining.new_full((count,), last),
                    scores.new_zeros(count),
                )
            assert remaining is not None
            sure = torch.ones_like(remaining, dtype=torch.bool)
            if number < last and confidence is not None:
                sure = least_confidence(scores) >= confidence
            leaving = remaining[sure]
            found.scores[leaving], found.exits[leaving], found.flops[leaving] = scores[sure], number, spent
            remaining = remaining[~sure]
            if not len(remaining):
                break
            if not bool(sure.any()):
                continue
            values = self._kept(number + 1, values, ~sure)
        assert found is not None
        return found

    def _run_before(self, number: int) -> float:
        """FLOPs of the groups before one, without critics."""
        return self.budgets[number - 1] - self._critic_flops[number - 1] if number else 0.0

    def _last(self, budget: float | None) -> int:
        if budget is None:
            return len(self.budgets) - 1
        within = [number for number, flops in enumerate(self.budgets) if flops <= budget]
        if not within:
            raise InputError(
                f"no sub-model answers within {budget:,.0f} FLOPs",
                hint=f"the smallest takes {min(self.budgets):,.0f}",
            )
        return max(within, key=lambda number: (self.budgets[number], number))

    def _group(self, number: int) -> ProgramModule:
        group = self.groups[number]
        assert isinstance(group, ProgramModule)
        return group

    def _scores(self, number: int, values: Sequence[Any]) -> Tensor:
        features: Tensor = values[self._mains[number]]
        if number == len(self.critics):
            return features
        scores: Tensor = self.critics[number](features)
        return scores

    def _kept(self, group: int, values: Sequence[Tensor], keep: Tensor) -> list[Tensor]:
        """Of everything that goes on to a group the examples that stay."""
        kept = []
        for value, dim in zip(values, self._batch_dims[group], strict=True):
            if dim is not None and dim < 0:
                raise UnsupportedError(
                    f"examples cannot leave one by one at cut {group - 1}: a dimension joins the batch",
                    hint="give a budget, or one example at a time",
                )
            kept.append(value if dim is None else value[(slice(None),) * dim + (keep,)])
        return kept


def _batch_dims(inputs: Sequence[TensorMeta]) -> list[int | None]:
    """The dimension of the batch in each tensor; None without one, -1 where it is joined with another."""
    found: list[int | None] = []
    for meta in inputs:
        dims = [(place, dim.symbol) for place, dim in enumerate(meta.dims) if dim.symbol is not None]
        if not dims:
            found.append(None)
        else:
            found.append(dims[0][0] if len(dims) == 1 and dims[0][1].isidentifier() else -1)
    return found


def classes_dim(rank: int) -> int:
    """The dimension of classes in scores ``[N, K]``, ``[N, T, K]`` or ``[N, K, H, W]``."""
    return 2 if rank == 3 else 1


def least_confidence(scores: Tensor) -> Tensor:
    """Probability of the class of each example, the lowest over its positions; of scores ``[N]`` of two."""
    if scores.dim() == 1:
        return torch.sigmoid(scores.abs())
    dim = classes_dim(scores.dim())
    best = scores.softmax(dim).amax(dim)
    return best if best.dim() == 1 else best.flatten(1).amin(1)
