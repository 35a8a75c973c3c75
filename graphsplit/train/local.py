"""Training of layer groups by local critics (Lee & Lee, arXiv 2102.01963, section III).

With ``h_i`` what group ``i`` hands on, ``c_i`` its critic and ``l`` the loss of one example, let
``L_i = l(c_i(h_i), y)`` for the critics and ``L_{n+1}`` the loss of the model itself. Then

- group ``i`` follows the gradient of the mean of ``L_i``, the critic held fixed;
- critic ``i`` follows the gradient of the mean of ``|L_i - L_{i+1}|`` over the examples, in its own
  parameters, the target held fixed.

No gradient crosses a cut: what is handed on is detached, and one number for each example comes back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from graphsplit.emission import ProgramModule
from graphsplit.errors import UserError
from graphsplit.train.losses import PerSample, checked

if TYPE_CHECKING:
    from collections.abc import Iterator

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]


def adam(module: nn.Module) -> torch.optim.Optimizer:
    """Adam with a learning rate of 0.001."""
    return torch.optim.Adam(module.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Recipe:
    """How groups and critics are trained.

    Attributes:
        optimizer: Makes the optimizer of a group.
        critic_optimizer: Makes the optimizer of a critic; None: as for a group.
        scheduler: Makes the learning-rate schedule of an optimizer, stepped after every epoch.
        step_every_batch: Step schedules after every batch instead.
        amp: Run forward passes under autocast in this dtype; float16 scales losses.
        clip: Largest norm of the gradient of a group, and of a critic.
    """

    optimizer: OptimizerFactory = adam
    critic_optimizer: OptimizerFactory | None = None
    scheduler: SchedulerFactory | None = None
    step_every_batch: bool = False
    amp: torch.dtype | None = None
    clip: float | None = None


class Learner:
    """A module with what updates it; one without parameters is never updated."""

    def __init__(self, module: nn.Module, make: OptimizerFactory, recipe: Recipe) -> None:
        self.module = module
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = make(module) if self.trained else None
        self.scheduler = recipe.scheduler(self.optimizer) if recipe.scheduler and self.optimizer else None
        device = self.trained[0].device.type if self.trained else "cpu"
        self.scaler = torch.amp.GradScaler(device, enabled=recipe.amp == torch.float16)
        self.clip = recipe.clip

    def update(self) -> None:
        """One step of the optimizer with the gradients that are there, which are then dropped."""
        if self.optimizer is None:
            return
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.trained, self.clip)
        if any(parameter.grad is not None for parameter in self.trained):
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Everything that has to be known to go on."""
        parts = {"module": self.module, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part.state_dict() for name, part in parts.items() if part is not None} | {
            "scaler": self.scaler.state_dict()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        self.scaler.load_state_dict(state["scaler"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


@dataclass
class Passed:
    """What a stage leaves for others.

    Attributes:
        handed: What the next stage takes, detached.
        losses: One for each example, detached: the target of the critic before. ``[N]``
    """

    handed: list[Any]
    losses: Tensor


class Stage:
    """One layer group with its critic: all that trains without waiting for what is behind it.

    Attributes:
        number: Of the group, from 0.
        group: The layer group.
        critic: Estimates the loss from what the group hands on; None for the last group, which has the loss.
    """

    def __init__(
        self,
        number: int,
        group: ProgramModule,
        critic: nn.Module | None,
        main: tuple[int, ...],
        loss: PerSample,
        seed: int = 0,
    ) -> None:
        self.number = number
        self.group = group
        self.critic = critic
        self.seed = seed
        self._main = main
        self._loss = loss
        self._amp: torch.dtype | None = None
        self._waiting: list[Tensor] = []
        self.learners: list[Learner] = []

    def configure(self, recipe: Recipe) -> None:
        """Make optimizers and schedules."""
        self._amp = recipe.amp
        make = recipe.critic_optimizer or recipe.optimizer
        self.learners = [Learner(self.group, recipe.optimizer, recipe)]
        if self.critic is not None:
            self.learners.append(Learner(self.critic, make, recipe))

    def forward(self, inputs: Sequence[Any], targets: Any, step: int = 0) -> Passed:
        """Run a batch and leave the group's gradients in it; the critic's follow with `learn`.

        Args:
            inputs: What the stage before handed on, or the model's inputs in order; no gradient goes to them.
            targets: Of the loss.
            step: Number of the batch, which random numbers depend on.

        Raises:
            UserError: The loss is not one number for each example, or not finite.
        """
        with self._random(step), self._autocast():
            outputs = list(self.group.run_flat([_detached(value) for value in inputs]))
            features = outputs[self._main[0 if self.group.training else -1]]
            if self.critic is None:
                losses = checked(self._loss, features, targets)
            else:
                leaf = features.detach().requires_grad_()
                losses = checked(self._loss, self.critic(leaf), targets)
        self._check(losses)
        scale = self.learners[0].scaler.scale if self.learners else _same
        if self.critic is None:
            if losses.requires_grad:
                scale(losses.mean()).backward()
        else:
            if features.requires_grad:
                (gradient,) = torch.autograd.grad(scale(losses.mean()), leaf, retain_graph=True)
                features.backward(gradient)
            self._waiting.append(losses)
        return Passed([_detached(value) for value in outputs], losses.detach())

    def learn(self, targets: Tensor) -> Tensor:
        """Leave the critic's gradients in it: of the oldest batch that waits for its target.

        Args:
            targets: Losses of the next stage for the same examples. ``[N]``

        Returns:
            The mean over the examples of the difference between both.
        """
        losses = self._waiting.pop(0)
        difference = (losses - targets.to(losses)).abs().mean()
        if self.critic is not None and difference.requires_grad:
            scale = self.learners[1].scaler.scale if self.learners else _same
            trained = [parameter for parameter in self.critic.parameters() if parameter.requires_grad]
            if trained:
                scale(difference).backward(inputs=trained)
        return difference.detach()

    def scores(self, outputs: Sequence[Any]) -> Tensor:
        """What this stage would answer, from what its group gives."""
        features: Tensor = outputs[self._main[0 if self.group.training else -1]]
        return features if self.critic is None else self.critic(features)

    def train(self, mode: bool = True) -> None:
        """Train or eval mode, of the group and the critic."""
        self.group.train(mode)
        if self.critic is not None:
            self.critic.train(mode)

    @contextmanager
    def _random(self, step: int) -> Iterator[None]:
        """Random numbers that depend on seed, step and stage alone, wherever the stage runs."""
        device = next((tensor.device for tensor in self.group.parameters()), torch.device("cpu"))
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed((self.seed * 1_000_003 + step) * 1_003 + self.number)
            yield

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        if self._amp is None:
            yield
            return
        device = next((tensor.device.type for tensor in self.group.parameters()), "cpu")
        with torch.autocast(device, self._amp):
            yield

    def _check(self, losses: Tensor) -> None:
        if not bool(torch.isfinite(losses).all()):
            what = "its critic's estimate" if self.critic is not None else "the loss"
            raise UserError(
                f"group {self.number} diverged: {what} is not finite",
                hint="lower its learning rate, or clip gradients",
            )


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _same(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class LocalLosses:
    """Losses of one batch.

    Attributes:
        groups: Mean loss of each group, by its critic; of the model for the last. ``[n + 1]``
        critics: Mean difference of each critic to what it estimates. ``[n]``
    """

    groups: Tensor
    critics: Tensor

    @property
    def loss(self) -> float:
        """Loss of the model."""
        return float(self.groups[-1])


@dataclass(frozen=True)
class LocalEpoch:
    """One pass over the data; means over the training examples, in train mode, while they were learned.

    Attributes:
        number: From 0.
        losses: Of each sub-model; the last is the model.
        critic_losses: Mean difference of each critic to what it estimates.
        test_losses: Of each sub-model on the test data, in eval mode; empty without test data.
        test_errors: The same for the error; empty without one.
        seconds: Wall time of training, without the test.
        examples: Training examples seen.
    """

    number: int
    losses: tuple[float, ...]
    critic_losses: tuple[float, ...]
    test_losses: tuple[float, ...] = ()
    test_errors: tuple[float, ...] = ()
    seconds: float = 0.0
    examples: int = 0

    def __str__(self) -> str:
        def row(values: Sequence[float], form: str) -> str:
            return " ".join(format(value, form) for value in values)

        text = f"epoch {self.number + 1}: losses {row(self.losses, '.4f')}"
        if self.test_losses:
            text += f", test {row(self.test_losses, '.4f')}"
        if self.test_errors:
            text += f", errors {row(self.test_errors, '.2%')}"
        return text


@dataclass
class Watch:
    """Says when training collapses: a group that does worse than guessing, or ever worse than it did."""

    best: list[float] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)

    def look(self, losses: Sequence[float]) -> None:
        """Take in the losses of an epoch, and warn of a group that has been above its first for three."""
        if not self.best:
            self.best, self.bad = list(losses), [0] * len(losses)
            return
        for group, loss in enumerate(losses):
            self.bad[group] = self.bad[group] + 1 if loss > 1.2 * self.best[group] + 1e-3 else 0
            self.best[group] = min(self.best[group], loss)
            if self.bad[group] == 3:
                warnings.warn(
                    f"training collapses: the loss of group {group} has been above its best of "
                    f"{self.best[group]:.4g} for three epochs; lower the learning rate of its critic and its "
                    "own, clip gradients, or cut into fewer groups",
                    stacklevel=3,
                )
