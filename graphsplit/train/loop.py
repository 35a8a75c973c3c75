"""Epochs of plain training: what a schedule does with one model at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from graphsplit.answers import (
    IGNORED,
    Answers,
    answers_for,
    check_shape,
    classes_dim,
    is_whole,
)
from graphsplit.errors import UserError
from graphsplit.signature import as_call, copied
from graphsplit.train.history import Epoch
from graphsplit.train.learner import check_scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator

Batches = Iterable[Sequence[Any]]
"""Pairs of inputs (a tensor, a tuple of arguments, a mapping of keywords) and targets, as of a DataLoader."""

Metric = Callable[[Any, Any], Tensor]
"""Of outputs and targets the mean over the examples, a scalar."""

SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]


def misclassified(outputs: Tensor, targets: Tensor, answers: Answers | None = None) -> Tensor:
    """Share of targets whose class has not the largest score; positions of -100 do not count.

    Args:
        outputs: Scores ``[N, C, ...]`` or ``[N, T, C]``; or of yes or no, as many as there are targets.
        targets: Classes ``[N, ...]``; or 0 and 1, of the shape of the scores.
        answers: What outputs are, where shapes cannot tell: see `gs.ensemble`. With
            ``functools.partial(misclassified, answers="classes_last")`` it is an ``error=``.

    Raises:
        UserError: Targets are no classes, or do not fit the scores.
    """
    kind = answers or answers_for(outputs, targets)
    if kind == "values":
        raise UserError(
            f"targets {tuple(targets.shape)} of {targets.dtype} are no classes",
            hint="give an error= for numbers, such as F.l1_loss, or none",
        )
    check_shape(kind, outputs.shape)
    if kind == "binary":
        return ((outputs > 0) != (targets > 0.5)).float().mean()
    dim = classes_dim(kind)
    true = targets if is_whole(targets) else targets.argmax(dim)
    counted = true != IGNORED
    wrong = (outputs.argmax(dim) != true) & counted
    return wrong.sum() / counted.sum().clamp_min(1)


@dataclass(frozen=True)
class Settings:
    """What is the same for every model of a schedule."""

    loss: Metric
    error: Metric | None
    device: torch.device
    step_every_batch: bool
    seed: int
    on_epoch: Callable[[Epoch], None] | None
    alive: Callable[[], None] | None = None
    """Called for every batch; raises where another process is gone."""


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Metric,
    data: Batches,
    epochs: int,
    *,
    test: Batches | None = None,
    scheduler: LRScheduler | None = None,
    step_every_batch: bool = False,
    error: Metric | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Train one model, in the same way as a `PartitionSchedule` trains its own: the baseline to compare with.

    Args:
        model: On ``device`` already, as the optimizer holds its parameters. It is changed.
        optimizer: Of its parameters.
        loss: Of outputs and targets the mean over a batch.
        data: Batches, iterated over once in every epoch.
        epochs: How many.
        test: Batches for `evaluate` after every epoch.
        scheduler: Stepped after every epoch, or after every batch.
        step_every_batch: See ``scheduler``.
        error: A second number to record, such as `misclassified`.
        device: Where batches are sent.
        seed: Of the order of the data and of dropout.
        on_epoch: Called after every epoch, with its record; ``print`` shows progress.

    Returns:
        A record for each epoch.
    """
    settings = Settings(loss, error, torch.device(device), step_every_batch, seed, on_epoch)
    return run_epochs(model, optimizer, scheduler, settings, data, test, range(epochs), part=None)


def run_epochs(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    settings: Settings,
    data: Batches,
    test: Batches | None,
    numbers: range,
    *,
    part: int | None,
) -> list[Epoch]:
    """Train for the epochs of these numbers; the random state outside is left as it was."""
    check_scheduler(scheduler)
    records = []
    with torch.random.fork_rng():
        for number in numbers:
            seed_epoch(settings.seed, part, number, data)
            records.append(_epoch(model, optimizer, scheduler, settings, data, test, number, part))
            if settings.on_epoch is not None:
                settings.on_epoch(records[-1])
    return records


def seed_epoch(seed: int, part: int | None, number: int, data: Batches) -> None:
    """Make order and dropout of an epoch depend on nothing but the seed, the sub-model and the number."""
    value = mixed_seed(seed, part, number)
    torch.manual_seed(value)
    if isinstance(data, DataLoader) and data.generator is not None:
        data.generator.manual_seed(value)


def mixed_seed(seed: int, part: int | None, number: int) -> int:
    """One number of a seed, a sub-model (None: the full model) and a number."""
    place = 0 if part is None else part + 1
    return ((seed * 1_000_003 + place) * 1_000_003 + number) % (1 << 63)


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    settings: Settings,
    data: Batches,
    test: Batches | None,
    number: int,
    part: int | None,
) -> Epoch:
    model.train()
    sums = torch.zeros(2, dtype=torch.float64, device=settings.device)
    examples = 0
    start = time.perf_counter()
    for batch in data:
        if settings.alive is not None:
            settings.alive()
        inputs, targets, size = read_batch(settings.device, batch)
        optimizer.zero_grad()
        outputs = call(model, inputs)
        loss = settings.loss(outputs, targets)
        loss.backward()
        optimizer.step()
        if scheduler is not None and settings.step_every_batch:
            scheduler.step()
        sums += size * _metrics(settings, loss, outputs, targets)
        examples += size
    totals = sums.tolist()  # waits for the device
    seconds = time.perf_counter() - start
    if not examples:
        raise no_batch()
    if scheduler is not None and not settings.step_every_batch:
        scheduler.step()
    test_loss, test_error = (None, None)
    if test is not None:
        test_loss, test_error = evaluate(
            model, settings.loss, test, error=settings.error, device=settings.device
        )
    return Epoch(
        part=part,
        number=number,
        loss=totals[0] / examples,
        error=None if settings.error is None else totals[1] / examples,
        test_loss=test_loss,
        test_error=test_error,
        seconds=seconds,
        examples=examples,
        learning_rate=float(optimizer.param_groups[0]["lr"]),
    )


def evaluate(
    model: nn.Module,
    loss: Metric,
    data: Batches,
    *,
    error: Metric | None = None,
    device: str | torch.device = "cpu",
) -> tuple[float, float | None]:
    """Loss and error over the data, averaged over examples, in eval mode.

    Args:
        model: Left in the mode that it was in.
        loss: Of outputs and targets the mean over a batch.
        data: Batches.
        error: A second number to average.
        device: Where batches are sent.

    Raises:
        UserError: There is no batch.
    """
    settings = Settings(loss, error, torch.device(device), False, 0, None)
    sums = torch.zeros(2, dtype=torch.float64, device=settings.device)
    examples = 0
    with evaluating(model), torch.no_grad():
        for batch in data:
            inputs, targets, size = read_batch(settings.device, batch)
            outputs = call(model, inputs)
            sums += size * _metrics(settings, loss(outputs, targets), outputs, targets)
            examples += size
    if not examples:
        raise no_test_batch()
    totals = sums.tolist()
    return totals[0] / examples, None if error is None else totals[1] / examples


def no_batch() -> UserError:
    """What is said of an epoch without data."""
    return UserError(
        "the data gave no batch in this epoch",
        hint="give a DataLoader or a list: an iterator is empty after one epoch",
    )


def no_test_batch() -> UserError:
    """What is said of a test without data."""
    return UserError("the test data gave no batch", hint="an iterator is empty after it was read once")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and the former one afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _metrics(settings: Settings, loss: Tensor, outputs: Any, targets: Any) -> Tensor:
    """Loss and error (0 without one) as one tensor, left on the device."""
    if settings.error is None:
        error = torch.zeros((), dtype=torch.float64, device=settings.device)
    else:
        with torch.no_grad():
            error = settings.error(outputs, targets).detach().double()
    return torch.stack([loss.detach().double(), error])


def read_batch(device: torch.device, batch: Sequence[Any]) -> tuple[Any, Any, int]:
    """Inputs and targets on the device, and the number of examples: the first size of the first target."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise UserError(
            f"a batch is a {type(batch).__name__}, expected a pair of inputs and targets",
            hint="several inputs go into a tuple or a mapping: ((x, mask), y) or ({'x': x}, y)",
        )
    moved = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), list(batch))
    tensors = [leaf for leaf in pytree.tree_leaves(moved[1]) if isinstance(leaf, Tensor)]
    if not tensors or not tensors[0].dim():
        raise UserError(
            "targets hold no tensor with a batch dimension", hint="a batch is (inputs, targets), as tensors"
        )
    return moved[0], moved[1], tensors[0].shape[0]


def as_batches(data: Batches | Sequence[Any]) -> Batches:
    """Batches of what a user gives: one pair of inputs and targets is a batch of its own.

    A pair has a tensor or a mapping as targets; put one whose targets are a tuple or list into a list.
    """
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], (Tensor, Mapping)):
        return [data]
    return data


def take(batch: Any, index: Tensor, size: int) -> Any:
    """Some examples of a batch of ``size``; tensors that do not have so many belong to all of them."""

    def taken(tensor: Tensor) -> Tensor:
        whole = not tensor.dim() or tensor.shape[0] != size
        return tensor if whole else tensor.index_select(0, index.to(tensor.device))

    return pytree.tree_map_only(Tensor, taken, batch)


def call(model: nn.Module, inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> Any:
    """What a model gives for the inputs of a batch; it has copies, as it may change them in place."""
    args, kwargs = copied(as_call(inputs, None))
    return model(*args, **kwargs)
