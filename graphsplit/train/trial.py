"""A batch tried before training: can a step be made, what are outputs, and can the loss follow them?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphsplit.answers import Answers, check_shape
from graphsplit.ensembles import main_output
from graphsplit.errors import UserError, first_line
from graphsplit.train.learner import Learning, autocast
from graphsplit.train.loop import Metric, call, seed_epoch
from graphsplit.train.replicas import Replica, Task, copied, is_bounded, is_convex

SINGLE = "the data holds examples one by one, of which batches are made; the loss is loss(outputs, targets)"


def try_step(replica: Replica, numbers: list[int], learning: Learning, *, answers: bool) -> None:
    """Try a batch with a copy of a replica: outputs, loss, gradients; the random state is left as it was.

    Args:
        replica: It is not changed.
        numbers: Of the examples of the batch.
        learning: Precision and clipping.
        answers: The outputs of one example have to be known from those of others.

    Raises:
        UserError: The model does not take the batch, its outputs belong to no examples, the loss takes them
            not, or is no scalar with a gradient.
    """
    task, size = replica.task, len(numbers)
    with torch.random.fork_rng():
        seed_epoch(task.seed, replica.number, 0, ())
        model = copied(replica.model).train()
        inputs, targets = task.examples.batch(numbers, task.device)
        with autocast(task.device, learning.amp):
            small = (
                "a batch norm needs two examples: give larger shards, batch= or mu=" if size == 1 else None
            )
            with _saying(f"the model takes no batch of {size} in training", small):
                outputs = call(model, inputs)
            if answers:
                _check_rows(outputs, size)
            what = f"the loss does not take outputs {_form(outputs)} with targets {_form(targets)}"
            with _saying(what, SINGLE):
                loss: Any = task.loss(outputs, targets)
        _check_loss(loss)
        with _saying("the loss has no gradients that can be used"):
            loss.backward()
            if learning.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), learning.clip)


@contextmanager
def _saying(what: str, hint: str | None = None) -> Iterator[None]:
    """Put what the user's code raises under one sentence."""
    try:
        yield
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{what}: {first_line(error)}", hint=hint) from error


def _check_rows(outputs: Any, size: int) -> None:
    """Refuse outputs that are not one for each example.

    Raises:
        UserError: They are.
    """
    shape = tuple(main_output(outputs).shape)
    if not shape or shape[0] != size:
        raise UserError(
            f"the model gives outputs of shape {shape} for {size} examples",
            hint="the first dimension has to be that of the examples, as each has an answer of the ensemble",
        )


def _check_loss(loss: Any) -> None:
    """Refuse a loss that cannot be followed.

    Raises:
        UserError: It is no tensor, no scalar, or has no gradient.
    """
    if not isinstance(loss, Tensor):
        raise UserError(f"the loss gives a {type(loss).__name__}, expected a scalar tensor")
    if loss.numel() != 1:
        raise UserError(
            f"the loss gives a tensor of shape {tuple(loss.shape)}, expected a scalar",
            hint="give the mean over the batch",
        )
    if not loss.requires_grad:
        raise UserError(
            "the loss has no gradient", hint="compute it from the outputs, without detach or item"
        )


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
        """Run a copy of a model."""
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
