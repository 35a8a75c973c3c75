"""Training of layer groups by local critics (Lee & Lee, arXiv 2102.01963, section III).

With ``h_i`` what group ``i`` hands on, ``c_i`` its critic and ``l`` the loss of one example, let
``L_i = l(c_i(h_i), y)`` for the critics and ``L_{n+1}`` the loss of the model itself. Then

- group ``i`` follows the gradient of the mean of ``L_i``, the critic held fixed;
- critic ``i`` follows the gradient of the mean of ``|L_i - L_{i+1}|`` over the examples, in its own
  parameters, the target held fixed.

No gradient crosses a cut: what is handed on is detached, and one number for each example comes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphsplit.emission import ProgramModule
from graphsplit.errors import UserError
from graphsplit.train.checks import OPTIMIZER, check, optional
from graphsplit.train.learner import Learner, Learning, OptimizerFactory, autocast
from graphsplit.train.losses import PerSample, checked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from graphsplit.train.methods import Method, MethodName

CRITIC = 1 << 40
"""Added to the number of a step, so that a critic draws other random numbers than its group."""


@dataclass(frozen=True)
class Recipe(Learning):
    """How groups and critics are trained.

    Attributes:
        critic_optimizer: Makes the optimizer of a critic, or helper; None: as for a group.
        method: ``"local_critics"``, or what to compare it with, in one process: ``"backpropagation"``,
            ``"joint"`` losses (`JointLosses`) or ``"synthetic_gradients"`` (`SyntheticGradients`).
    """

    critic_optimizer: OptimizerFactory | None = None
    method: MethodName | Method = "local_critics"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(vars(self), {"critic_optimizer": optional(OPTIMIZER)})


@dataclass
class Passed:
    """What a stage leaves for others.

    Attributes:
        handed: What the next stage takes, detached.
        losses: One for each example, detached: the target of the critic before. ``[N]``
    """

    handed: list[Any]
    losses: Tensor


@dataclass
class _Estimate:
    """A batch whose critic waits for its target."""

    losses: Tensor
    features: Tensor
    targets: Any
    step: int
    updates: int


class Stage:
    """One layer group with its critic: all that trains without waiting for what is behind it.

    Attributes:
        number: Of the group, from 0.
        group: The layer group.
        critic: Estimates the loss from what the group hands on; None for the last group, which has the loss.
        learners: What updates the group, the critic and the helper.
        helper: What another method of training than local critics puts at the cut.
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
        self._waiting: deque[_Estimate] = deque()
        self.learners: list[Learner] = []
        self.helper: nn.Module | None = None

    @property
    def modules(self) -> list[nn.Module]:
        """The group, the critic where there is one, and what the method of training adds."""
        return [module for module in (self.group, self.critic, self.helper) if module is not None]

    def configure(self, recipe: Recipe) -> None:
        """Make optimizers and schedules."""
        self._amp = recipe.amp
        makers = (recipe.optimizer, *[recipe.critic_optimizer or recipe.optimizer] * 2)
        self.learners = [
            Learner(module, make, recipe) for module, make in zip(self.modules, makers, strict=False)
        ]

    def forward(self, inputs: Sequence[Any], targets: Any, step: int = 0) -> Passed:
        """Run a batch and leave the group's gradients in it; the critic's follow with `learn`.

        Args:
            inputs: What the stage before handed on, or the model's inputs in order; no gradient goes to them.
            targets: Of the loss.
            step: Number of the batch, which random numbers depend on.

        Raises:
            UserError: The loss is not one number for each example, or not finite.
        """
        targets = self.here(targets)
        outputs = self.run(detached(inputs), step)
        features = self.features(outputs)
        leaf = features if self.critic is None else features.detach().requires_grad_()
        losses = self.losses(leaf, targets, step)
        if self.critic is None:
            if losses.requires_grad:
                self.scaled(0, losses.mean()).backward()
        else:
            if features.requires_grad:
                (gradient,) = torch.autograd.grad(self.scaled(0, losses.mean()), leaf, retain_graph=True)
                features.backward(gradient)
            self._waiting.append(_Estimate(losses, leaf.detach(), targets, step, self._updates))
        return Passed(detached(outputs), losses.detach())

    def run(self, inputs: Sequence[Any], step: int) -> list[Any]:
        """What the group gives for a batch; gradients go back to the inputs where they want them."""
        inputs = self.here(inputs)
        with self._random(step), autocast(self.device, self._amp):
            return list(self.group.run_flat(inputs))

    def losses(self, features: Tensor, targets: Any, step: int) -> Tensor:
        """The loss of each example, by the critic where there is one. ``[N]``

        Raises:
            UserError: The loss is not one number for each example, or not finite.
        """
        losses = self._losses(features, self.here(targets), step)
        self._check(losses)
        return losses

    def _losses(self, features: Tensor, targets: Any, step: int) -> Tensor:
        with self._random(step + CRITIC), autocast(self.device, self._amp):
            scores = features if self.critic is None else self.critic(features)
        return checked(self._loss, scores, targets)

    def here(self, values: Any) -> Any:
        """Tensors on the device of the stage."""
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(self.device, non_blocking=True), values)

    @property
    def waiting(self) -> int:
        """Batches whose critic waits for its target."""
        return len(self._waiting)

    @property
    def oldest(self) -> int:
        """Number of examples of the batch that waits longest."""
        return self._waiting[0].losses.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the stage is."""
        tensors = (*self.group.parameters(), *self.group.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def scaled(self, learner: int, loss: Tensor) -> Tensor:
        """A loss as the scaler of float16 wants it."""
        return self.learners[learner].scaler.scale(loss) if self.learners else loss

    @property
    def _updates(self) -> int:
        return self.learners[1].updates if self.learners else 0

    def learn(self, targets: Tensor) -> Tensor:
        """Leave the critic's gradients in it: of the oldest batch that waits for its target.

        Args:
            targets: Losses of the next stage for the same examples. ``[N]``

        Returns:
            The mean over the examples of the difference between both.
        """
        batch = self._waiting.popleft()
        losses = batch.losses
        if batch.updates != self._updates:  # the critic has learned since, so that the old graph is of no use
            losses = self._losses(batch.features, batch.targets, batch.step)
        difference = (losses - targets.to(losses)).abs().mean()
        if self.critic is not None and difference.requires_grad:
            trained = [parameter for parameter in self.critic.parameters() if parameter.requires_grad]
            if trained:
                self.scaled(1, difference).backward(inputs=trained)
        return difference.detach()

    def scores(self, outputs: Sequence[Any]) -> Tensor:
        """What this stage would answer, from what its group gives."""
        features = self.features(outputs)
        return features if self.critic is None else self.critic(features)

    def features(self, outputs: Sequence[Any]) -> Tensor:
        """What the critic sees; of the last group, the output that the loss takes."""
        features: Tensor = outputs[self._main[0 if self.group.training else -1]]
        return features

    def train(self, mode: bool = True) -> None:
        """Train or eval mode, of the group and the critic."""
        for module in self.modules:
            module.train(mode)

    @contextmanager
    def _random(self, step: int) -> Iterator[None]:
        """Random numbers that depend on seed, step and stage alone, wherever the stage runs."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed((self.seed * 1_000_003 + step) * 1_003 + self.number)
            yield

    def _check(self, losses: Tensor) -> None:
        """Looking would wait for another device than the CPU, where the loop looks once an epoch."""
        if losses.device.type == "cpu" and not bool(torch.isfinite(losses).all()):
            raise diverged(self.number)


def diverged(group: int) -> UserError:
    """What is said of a group whose loss is not finite."""
    return UserError(
        f"group {group} diverged: its loss is not finite",
        hint="lower its learning rate and that of its critic, or clip gradients",
    )


def detached(values: Sequence[Any]) -> list[Any]:
    """The same values, through which no gradient goes."""
    return [value.detach() if isinstance(value, Tensor) else value for value in values]
