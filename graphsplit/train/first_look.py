"""One step of training on a copy that is dropped, to say what cannot work before anything is trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graphsplit.ensembles import main_output
from graphsplit.errors import UserError, first_line
from graphsplit.train.learner import Learning, autocast
from graphsplit.train.loop import call, seed_epoch
from graphsplit.train.replicas import Replica, copied, tensors_of

SINGLE = "the data holds examples one by one, of which batches are made"


def first_look(replica: Replica, numbers: list[int], learning: Learning, *, answers: bool) -> None:
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
            with _saying("the loss does not take what the model gives, and the targets", SINGLE):
                loss: Any = task.loss(outputs, targets)
        _check_loss(loss)
        with _saying("the loss has no gradients that can be used"):
            loss.backward()
            if learning.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), learning.clip)
        if answers:
            _warn_of_written_buffers(model.eval(), inputs)


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


def _warn_of_written_buffers(model: nn.Module, inputs: Any) -> None:
    """Warn of a forward that changes buffers in eval mode."""
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    with torch.no_grad():
        call(model, inputs)
    for name, tensor in tensors_of(model).items():
        if not torch.equal(tensor, before[name]) and bool(before[name].isfinite().all()):
            warnings.warn(
                f"forward writes {name} in eval mode, too: numbers depend on the order in which answers are "
                "computed, which is another one with another exchange, or number of processes",
                stacklevel=6,
            )
            return
