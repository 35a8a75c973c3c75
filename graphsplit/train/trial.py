"""A batch tried before training: what outputs are, and whether the loss can follow them."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphsplit.answers import Answers, check_shape
from graphsplit.ensembles import main_output
from graphsplit.errors import UserError, first_line
from graphsplit.train.loop import Metric, call
from graphsplit.train.replicas import Task, is_bounded, is_convex


@dataclass(frozen=True)
class Trial:
    """One batch of a replica.

    Attributes:
        task: What is learnt.
        outputs: Of a copy of the replica in eval mode.
        targets: Of the batch.
        written: Buffers that forward wrote, though in eval mode.
        answers: What outputs are; None where it is not known.
    """

    task: Task
    outputs: Any
    targets: Any
    written: tuple[str, ...]
    answers: Answers | None

    @classmethod
    def of(cls, task: Task, model: nn.Module, inputs: Any, targets: Any) -> Trial:
        """Run a copy of a model, and the loss.

        Raises:
            UserError: The loss does not take the outputs with the targets.
        """
        model = copy.deepcopy(model).eval()
        before = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
        with torch.no_grad():
            outputs = call(model, inputs)
        after = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
        written = tuple(
            name
            for name, (buffer, version) in after.items()
            if name not in before or before[name][0] is not buffer or before[name][1] != version
        )
        try:
            with torch.no_grad():
                task.loss(outputs, targets)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UserError(
                f"the loss does not take outputs {_form(outputs)} with targets {_form(targets)}: "
                f"{first_line(error)}",
                hint="the loss is called as loss(outputs, targets), with what the model and the data give",
            ) from error
        return cls(task, outputs, targets, written, task.answers)

    @property
    def main(self) -> Tensor:
        """The main output."""
        return main_output(self.outputs)

    def decided(self) -> Trial:
        """The same with what outputs are.

        Raises:
            UserError: The targets leave it open, or outputs cannot be what is said.
        """
        answers = self.task.kind(self.main, self.targets)
        check_shape(answers, self.main.shape)
        return replace(self, answers=answers)

    def check_bounded(self) -> None:
        """Refuse a loss that runs away when values stand for its targets, as scores for probabilities do.

        A loss that the user made for answers is trusted.

        Raises:
            UserError: It has no smallest value.
        """
        task = self.task
        if self.answers != "values" or task.pseudo_loss is not task.loss:
            return
        if not is_bounded(self._of_main(task.loss), self.main, "values"):
            raise UserError(
                "the loss falls without end where outputs as they are stand for real numbers as targets",
                hint="where targets are probabilities, say by answers= what outputs are: 'binary' (sigmoid), "
                "'classes' or 'classes_last' (softmax); else give pseudo_loss=, or answers='values'",
            )

    def warn(self) -> None:
        """Say what the user ought to know of the loss and the model."""
        if not is_convex(self._of_main(self.task.loss), self.main, self.targets):
            warnings.warn(
                "the loss is not convex in the outputs: the guarantee that the ensemble's loss is never "
                "above the mean loss of its members is gone",
                stacklevel=5,
            )
        if self.written:
            warnings.warn(
                f"forward writes {', '.join(self.written)} in eval mode, too: answers depend on how often "
                "replicas are asked, and numbers are not those of another exchange or of one process",
                stacklevel=5,
            )

    def _of_main(self, metric: Metric) -> Metric:
        """The metric as a function of the main output, with all others as they are."""
        leaves, spec = pytree.tree_flatten(self.outputs)
        main = self.main

        def found(values: Tensor, targets: Any) -> Tensor:
            return metric(
                pytree.tree_unflatten([values if leaf is main else leaf for leaf in leaves], spec), targets
            )

        return found


def _form(values: Any) -> str:
    """Shapes and dtypes of tensors, nested as they are."""

    def one(leaf: Any) -> str:
        if not isinstance(leaf, Tensor):
            return type(leaf).__name__
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"

    return ", ".join(map(one, pytree.tree_leaves(values)))
