"""One worker of several that train apart: its replica of the model, its shard, and what it learns from.

With ``l`` the user's loss, ``f`` the replica, ``c(x)`` the mean answer of the latest compressed replicas and
``g(x)`` that of the ensemble, a worker follows the gradient

- of ``l(f(x), y) - lambda |a(f(x)) - c(x)|^2`` while it trains (EC-DNN, eq. 9);
- of ``alpha l(f(x), y) + beta l(f(x), g(x))`` while it is compressed (eq. 10).

An answer ``a`` is the softmax of the outputs over the classes where targets are classes, the sigmoid where
they are yes and no, else the outputs: see `graphsplit.answers`. Eq. 9 is for probabilities. Without bounds to
the outputs the distance would outweigh most losses of numbers sooner or later, and training would run away.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from graphsplit import untouched
from graphsplit.answers import Answers, answer_count, answers_for, probabilities
from graphsplit.ensembles import main_output
from graphsplit.errors import UserError, first_line
from graphsplit.train.learner import Learner, Learning, autocast
from graphsplit.train.loop import Metric, call, mixed_seed, seed_epoch
from graphsplit.train.sharding import Examples, ShardSampler

LOCAL, COMPRESSION = 0, 1
"""Phases of a round, for seeds."""


class Labels:
    """Answers by the number of the example, kept in one tensor of a dtype that may be smaller."""

    def __init__(self, numbers: Sequence[int], dtype: torch.dtype) -> None:
        self._rows = {number: row for row, number in enumerate(numbers)}
        self._dtype = dtype
        self._values: Tensor | None = None

    def put(self, numbers: Sequence[int], values: Tensor) -> None:
        """Keep answers ``[N, ...]``.

        Raises:
            UserError: One is larger than any number of the dtype.
        """
        kept = values.to(values.dtype if values.is_complex() else self._dtype)
        if bool((kept.isinf() & values.isfinite()).any()):
            name = str(self._dtype).removeprefix("torch.")
            raise UserError(
                f"answers up to {float(values.abs().max()):.3g} do not fit in {name}, in which they are kept",
                hint="give keep=torch.float32, or targets of a smaller scale",
            )
        if self._values is None:
            self._values = kept.new_empty((len(self._rows), *values.shape[1:]))
        self._values[[self._rows[number] for number in numbers]] = kept

    def of(self, numbers: Sequence[int]) -> Tensor:
        """The answers for these examples, ``[N, ...]``, in float32 at least."""
        assert self._values is not None
        found = self._values[[self._rows[number] for number in numbers]]
        return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found


@dataclass(frozen=True)
class Task:
    """What all workers learn.

    Attributes:
        examples: All the data.
        loss: Of outputs and targets.
        pseudo_loss: Of outputs and answers of the ensemble.
        device: Where batches are sent.
        seed: Of batches and dropout.
        batch: Examples of a batch.
        keep: Dtype of answers that are kept.
        answers: What outputs are; as targets tell, unless known.
    """

    examples: Examples
    loss: Metric
    pseudo_loss: Metric
    device: torch.device
    seed: int
    batch: int
    keep: torch.dtype
    answers: Answers | None = None

    def kind(self, outputs: Tensor, targets: Any) -> Answers:
        """What outputs are."""
        return self.answers or answers_for(outputs, targets)

    def local(self, worker: int, shard: Sequence[int], first: int, count: int) -> ShardSampler:
        """Batches of a worker's local training."""
        return ShardSampler(shard, self.batch, mixed_seed(self.seed, worker, 0), first, count)

    def relabelled(
        self, worker: int, shard: Sequence[int], round_number: int, share: float, count: int
    ) -> ShardSampler:
        """Batches of a worker's compression: of a share of its shard, drawn anew in every round."""
        seed = mixed_seed(self.seed, worker, 0)
        generator = torch.Generator().manual_seed(mixed_seed(seed, 0, round_number))
        size = max(1, round(share * len(shard)))
        chosen = torch.randperm(len(shard), generator=generator)[:size].tolist()
        own = [shard[number] for number in chosen]
        return ShardSampler(own, self.batch, mixed_seed(seed, 1, round_number), 0, count)


class Replica:
    """One worker.

    Attributes:
        number: From 0.
        learner: The model with its optimizer.
        shard: Numbers of its examples.
        grown: Its tensors at the last aggregation.
        alive: Called for every batch; raises where another process is gone.
        seconds: Wall time of the present round.

    Raises:
        UserError: The model has no parameter that is trained, or tensors that cannot be set.
    """

    def __init__(
        self, number: int, model: nn.Module, learning: Learning, task: Task, shard: Sequence[int]
    ) -> None:
        self.number = number
        self.task = task
        self.shard = shard
        self._learning = learning
        _check_tensors(model)
        self.learner = Learner(model, learning.optimizer, learning)
        if not self.learner.trained:
            raise UserError(
                "no parameter of the model is to be trained",
                hint="requires_grad is off for all of them, or there is none",
            )
        # A mask may hold infinite numbers from the start.
        self._finite = [name for name, buffer in model.named_buffers() if bool(buffer.isfinite().all())]
        self.grown: dict[str, Tensor] = {}
        self.alive: Callable[[], None] = lambda: None
        self.seconds = 0.0

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.learner.module

    def train(self, first: int, count: int, diversity: float = 0.0, mean: Labels | None = None) -> float:
        """Local training for some steps; the mean loss.

        Args:
            first: Number of the first step.
            count: How many.
            diversity: lambda of eq. 9.
            mean: Mean answers of the latest compressed replicas.
        """

        def objective(numbers: list[int], outputs: Any, targets: Any, loss: Tensor) -> Tensor:
            if mean is None or not diversity:
                return loss
            kind = self.task.kind(main_output(outputs), targets)
            answer = probabilities(main_output(outputs), kind)
            distance = (answer - mean.of(numbers)).square()
            return loss - diversity * distance.sum() / answer_count(answer, kind)

        sampler = self.task.local(self.number, self.shard, first, count)
        return self._steps(sampler, objective, (first, LOCAL))

    def compress(
        self, sampler: ShardSampler, moment: int, alpha: float, beta: float, labels: Labels
    ) -> float:
        """Follow the ensemble on batches whose answers are known; the mean loss of the true targets."""

        def objective(numbers: list[int], outputs: Any, targets: Any, loss: Tensor) -> Tensor:
            answers = labels.of(numbers)
            try:
                return alpha * loss + beta * self.task.pseudo_loss(outputs, answers)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise UserError(
                    f"the loss takes no answers {tuple(answers.shape)} for targets: {first_line(error)}",
                    hint="give pseudo_loss=, a function of outputs and the answers of the ensemble",
                ) from error

        return self._steps(sampler, objective, (moment, COMPRESSION))

    def _steps(
        self,
        sampler: ShardSampler,
        objective: Callable[[list[int], Any, Any, Tensor], Tensor],
        moment: tuple[int, int],
    ) -> float:
        task, learner = self.task, self.learner
        start = time.perf_counter()
        total = torch.zeros((), dtype=torch.float64, device=task.device)
        self.model.train()
        with torch.random.fork_rng():
            seed_epoch(task.seed, self.number, 2 * moment[0] + moment[1], ())
            for numbers, inputs, targets in task.examples.read(sampler, task.device):
                self.alive()
                with autocast(task.device, self._learning.amp):
                    outputs = call(self.model, inputs)
                    loss = task.loss(outputs, targets)
                    whole = objective(numbers, outputs, targets, loss)
                learner.scaler.scale(whole).backward()
                learner.update()
                if learner.scheduler is not None and self._learning.step_every_batch:
                    learner.scheduler.step()
                total += loss.detach().double()
        found = float(total) / max(len(sampler), 1)
        self.seconds += time.perf_counter() - start
        return found

    def is_finite(self) -> bool:
        """True where every parameter is finite, and every buffer that was so at the start."""
        buffers = dict(self.model.named_buffers())
        tensors = [*self.model.parameters(), *[buffers[name] for name in self._finite]]
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def grow(self) -> None:
        """Keep the present tensors as those of the last aggregation."""
        self.grown = {name: tensor.clone() for name, tensor in tensors_of(self.model).items()}

    def restart(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from another replica's tensors, with a new optimizer; its schedule goes on where it was."""
        put_tensors(self.model, tensors)
        old = self.learner
        self.learner = Learner(self.model, self._learning.optimizer, self._learning)
        if old.scheduler is not None and self.learner.scheduler is not None:
            assert old.optimizer is not None and self.learner.optimizer is not None
            self.learner.scheduler.load_state_dict(old.scheduler.state_dict())
            groups = zip(self.learner.optimizer.param_groups, old.optimizer.param_groups, strict=True)
            for group, other in groups:
                group["lr"] = other["lr"]

    def state_dict(self) -> dict[str, Any]:
        """Everything that has to be known to go on."""
        return {"learner": self.learner.state_dict(), "tensors": tensors_of(self.model), "grown": self.grown}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.learner.load_state_dict(state["learner"])
        put_tensors(self.model, state["tensors"])
        _check_forms(tensors_of(self.model), state["grown"])
        self.grown = dict(state["grown"])


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, detached; tied ones once."""
    return {name: tensor.detach() for name, tensor in untouched.tensors_of(module).items()}


def put_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set the values that `tensors_of` gave.

    Raises:
        ValueError: They are of another model.
    """
    own = tensors_of(module)
    _check_forms(own, tensors)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _check_forms(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of other names or shapes.

    Raises:
        ValueError: They are of another model.
    """
    if own.keys() != tensors.keys():
        raise ValueError(f"the model has no {min(own.keys() ^ tensors.keys())}, or has lost it")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} here, {tuple(tensors[name].shape)} there")


def _check_tensors(module: nn.Module) -> None:
    """Refuse parameters and buffers that a replica cannot get from another one.

    Raises:
        UserError: One has no shape yet, or several elements in one place.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise UserError(f"{name} has no shape yet", hint="call the model on a batch before training")
        if any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            raise UserError(
                f"{name} has several elements in one place, as it was expanded", hint="give name.contiguous()"
            )


def copied(module: nn.Module) -> nn.Module:
    """A copy.

    Raises:
        UserError: There can be none.
    """
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"the model cannot be copied: {first_line(error)}",
            hint="detach tensors kept as attributes, and take weight_norm of torch.nn.utils.parametrizations",
        ) from error


def is_convex(loss: Metric, outputs: Tensor, targets: Any, seed: int = 0) -> bool:
    """False where a loss is shown not to be convex in outputs of this shape, by pairs and their middles.

    True is no proof: none of the pairs has spoken against it, or the loss takes none of them. Where outputs
    are between 0 and 1, as probabilities are, so are the pairs.
    """
    generator = torch.Generator().manual_seed(seed)

    def point(scale: float) -> Tensor:
        if _within_one(outputs):
            return torch.rand(outputs.shape, generator=generator).to(outputs)
        return scale * torch.randn(outputs.shape, generator=generator).to(outputs)

    for scale in (0.1, 1.0, 10.0):
        for _ in range(4):
            a, b = point(scale), point(scale)
            try:
                with torch.no_grad():
                    middle, ends = (
                        float(loss((a + b) / 2, targets)),
                        (float(loss(a, targets)) + float(loss(b, targets))) / 2,
                    )
            except (RuntimeError, ValueError):
                return True
            if math.isfinite(ends) and middle > ends + 1e-5 * max(1.0, abs(ends)):
                return False
    return True


FAR = 1e3
"""Scores at which a loss does what it does to infinity."""


def is_bounded(loss: Metric, outputs: Tensor, answers: Answers, seed: int = 0) -> bool:
    """False where a loss of outputs of this shape is shown to fall without end towards others' answers.

    True is no proof. Of outputs that are probabilities themselves nothing is asked. Losses of outputs that
    have bounds of another kind, as logarithms of probabilities have, may be bounded in spite of it.
    """
    if _within_one(outputs):
        return True
    generator = torch.Generator().manual_seed(seed)
    for scale, below in ((1.0, False), (10.0, False), (10.0, True)):
        others = scale * torch.randn(outputs.shape, generator=generator).to(outputs)
        others = -others.abs() if below else others
        start = torch.zeros_like(outputs, requires_grad=True)
        try:
            with torch.enable_grad():
                given = probabilities(others, answers)
                near = loss(start, given)
                (gradient,) = torch.autograd.grad(near, start)
            downhill = -gradient / gradient.abs().max()
            with torch.no_grad():
                far, farther = (float(loss(step * FAR * downhill, given)) for step in (1, 2))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return True
        if farther - far < -abs(float(near.detach())):
            return False
    return True


def _within_one(outputs: Tensor) -> bool:
    """True where all outputs are between 0 and 1: there are losses that take no others, and stop a GPU."""
    return not outputs.is_complex() and bool(((outputs > 0) & (outputs < 1)).all())
