"""Ways to train layer groups in one process: local critics, and what they are compared with.

All run on the same stages, draw the same random numbers for the same batch, and take the same recipe. Where a
method has no use for the critics, these learn as probes: from what a group hands on, without a gradient to
the group, so that the errors of the sub-models can be compared.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from graphsplit.errors import UserError
from graphsplit.program import TensorMeta
from graphsplit.train.stage import Stage, detached

MethodName = Literal["local_critics", "backpropagation", "joint", "synthetic_gradients"]


class Method(ABC):
    """How one batch is learned from."""

    waits: bool = True
    """A group needs gradients of those behind it, or is trained in one process for another reason."""

    def prepare(self, stages: Sequence[Stage], output: TensorMeta) -> None:
        """Put helpers at the cuts; by default there are none.

        Args:
            stages: The groups, in order.
            output: What the loss takes.
        """
        for stage in stages:
            stage.helper = None

    @abstractmethod
    def gradients(self, stages: Sequence[Stage], values: Sequence[Any], targets: Any, step: int) -> Tensor:
        """Leave gradients of a batch in all modules.

        Args:
            stages: The groups, in order.
            values: Of the model's inputs, in order.
            targets: Of the loss.
            step: Number of the batch.

        Returns:
            Mean losses of the sub-models, and for each what its critic, or helper, is off by. ``[2, n + 1]``
        """

    def train(self, stages: Sequence[Stage], values: Sequence[Any], targets: Any, step: int) -> Tensor:
        """The same, with an update of all modules."""
        found = self.gradients(stages, values, targets, step)
        for stage in stages:
            for learner in stage.learners:
                learner.update()
        return found


def _no_numbers(stages: Sequence[Stage]) -> Tensor:
    return torch.zeros(2, len(stages), dtype=torch.float64, device=stages[-1].device)


class LocalCriticTraining(Method):
    """Local critics (Lee & Lee, arXiv 2102.01963, equations 1 to 8)."""

    waits = False

    def gradients(self, stages: Sequence[Stage], values: Sequence[Any], targets: Any, step: int) -> Tensor:
        """Of the local losses."""
        return self._pass(stages, values, targets, step, update=False)

    def train(self, stages: Sequence[Stage], values: Sequence[Any], targets: Any, step: int) -> Tensor:
        """A group is updated before the next one runs, as in processes of their own."""
        return self._pass(stages, values, targets, step, update=True)

    def _pass(
        self, stages: Sequence[Stage], values: Sequence[Any], targets: Any, step: int, *, update: bool
    ) -> Tensor:
        found = _no_numbers(stages)
        for stage in stages:
            passed = stage.forward(values, targets, step)
            found[0, stage.number] = passed.losses.mean().to(found)
            if stage.number:
                before = stages[stage.number - 1]
                found[1, before.number] = before.learn(passed.losses).to(found)
                if update:
                    before.learners[1].update()
            if update:
                stage.learners[0].update()
            values = passed.handed
        return found


class Backpropagation(Method):
    """The gradient of the model's loss, through all groups."""

    def gradients(self, stages: Sequence[Stage], values: Sequence[Any], targets: Any, step: int) -> Tensor:
        """Of the last loss for the groups, of their own for the probes."""
        found = _no_numbers(stages)
        for stage in stages:
            values = stage.run(values, step)
            features = stage.features(values)
            losses = stage.losses(features if stage.critic is None else features.detach(), targets, step)
            found[0, stage.number] = losses.detach().mean().to(found)
            losses.mean().backward()
        return found


@dataclass(frozen=True)
class JointLosses(Method):
    """The weighted sum of the losses of all exits (BranchyNet: Teerapittayanon et al., arXiv 1709.01686).

    Attributes:
        weights: Of each sub-model's loss, the model's last; 1 for each unless given.
    """

    weights: tuple[float, ...] | None = None

    def prepare(self, stages: Sequence[Stage], output: TensorMeta) -> None:
        """Check the number of weights."""
        super().prepare(stages, output)
        if self.weights is not None and len(self.weights) != len(stages):
            raise UserError(
                f"{len(self.weights)} weights for {len(stages)} losses", hint="the model's is last"
            )

    def gradients(self, stages: Sequence[Stage], values: Sequence[Any], targets: Any, step: int) -> Tensor:
        """Of the sum."""
        found = _no_numbers(stages)
        weighted = []
        for stage, weight in zip(stages, self.weights or (1.0,) * len(stages), strict=True):
            values = stage.run(values, step)
            loss = stage.losses(stage.features(values), targets, step).mean()
            found[0, stage.number] = loss.detach().to(found)
            weighted.append(weight * loss.to(stages[-1].device))
        torch.stack(weighted).sum().backward()
        return found


@dataclass(frozen=True)
class SyntheticGradients(Method):
    """Synthetic gradients (DNI: Jaderberg et al., arXiv 1608.05343).

    A helper at each cut guesses, from what the group hands on, the gradient of the loss with respect to it;
    the group learns from the guess, and the helper from the gradient that the next group finds, which itself
    builds on the guess at the next cut. Guesses are of each example's gradient, so that they do not depend
    on the size of a batch, and begin with zero, as in the paper.

    Attributes:
        conditioned: Helpers see the targets, too, where these are classes.
        width: Units, or filters, of a helper's two hidden layers.
        seed: Of the helpers' weights.
    """

    conditioned: bool = True
    width: int = 256
    seed: int = 0

    def prepare(self, stages: Sequence[Stage], output: TensorMeta) -> None:
        """Make helpers anew."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for stage, following in itertools.pairwise(stages):
                metas = following.group.signature.inputs
                stage.helper = Guesses(metas, self.width, _classes(output) if self.conditioned else 0)
                stage.helper.to(stage.device)
        stages[-1].helper = None

    def gradients(self, stages: Sequence[Stage], values: Sequence[Any], targets: Any, step: int) -> Tensor:
        """From guess to guess."""
        found = _no_numbers(stages)
        guessed: list[Tensor | None] = []
        for stage in stages:
            leaves = [
                value.detach().requires_grad_(stage.number > 0 and value.is_floating_point())
                for value in stage.here(values)
            ]
            values = stage.run(leaves, step)
            features = stage.features(values)
            losses = stage.losses(features if stage.critic is None else features.detach(), targets, step)
            found[0, stage.number] = losses.detach().mean().to(found)
            losses.mean().backward()
            ahead = guessed
            if stage.helper is not None:
                guessed = stage.helper(values, stage.here(targets))
                _follow(values, guessed, len(losses))
            if stage.number:
                before = stages[stage.number - 1]
                found[1, before.number] = _teach(ahead, leaves, len(losses)).to(found)
            values = detached(values)
        return found


def _follow(values: Sequence[Tensor], guesses: Sequence[Tensor | None], examples: int) -> None:
    """Gradients of a group, by what is guessed for each of the tensors that it hands on."""
    pairs = [
        (value, guess.detach().to(value) / examples)
        for value, guess in zip(values, guesses, strict=True)
        if guess is not None and value.requires_grad
    ]
    if pairs:
        torch.autograd.backward([value for value, _ in pairs], [guess for _, guess in pairs])


def _teach(guesses: Sequence[Tensor | None], leaves: Sequence[Tensor], examples: int) -> Tensor:
    """Gradients of a helper: of the squared distance to what was found, the mean over the examples."""
    total: Tensor | None = None
    for guess, leaf in zip(guesses, leaves, strict=True):
        if guess is not None:
            truth = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad * examples
            error = (guess - truth.to(guess)).square().sum() / examples
            total = error if total is None else total + error
    if total is None:
        return torch.zeros(())
    total.backward()
    return total.detach()


class Guesses(nn.Module):
    """A guess for each tensor of numbers that crosses a cut."""

    def __init__(self, metas: Sequence[TensorMeta], width: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.nets = nn.ModuleList(
            _Guess(meta, width, classes) if meta.dtype.is_floating_point and meta.ndim > 1 else nn.Identity()
            for meta in metas
        )

    def forward(self, values: Sequence[Tensor], targets: Any) -> list[Tensor | None]:
        """Gradients of each example's loss, in the shapes of the values; None where there are none."""
        labels = _one_hot(targets, self.classes)
        return [
            net(value.detach(), labels) if isinstance(net, _Guess) else None
            for net, value in zip(self.nets, values, strict=True)
        ]


class _Guess(nn.Module):
    """Two hidden layers: of convolutions for images, of units at each position for sequences."""

    def __init__(self, meta: TensorMeta, width: int, classes: int) -> None:
        super().__init__()
        self.images = meta.ndim == 4
        channels = meta.shape[1 if self.images else -1]
        self.classes = classes

        def layer(given: int, wanted: int) -> nn.Module:
            if self.images:
                return nn.Conv2d(given, wanted, 3, padding=1, dtype=meta.dtype)
            return nn.Linear(given, wanted, dtype=meta.dtype)

        last = layer(width, channels)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.net = nn.Sequential(
            layer(channels + classes, width), nn.ReLU(), layer(width, width), nn.ReLU(), last
        )

    def forward(self, value: Tensor, labels: Tensor | None) -> Tensor:
        """The gradient, in the shape of the value."""
        given = value.to(next(self.net.parameters()).dtype)
        if self.classes:
            shape = (*value.shape[:-1], self.classes)
            if self.images:
                shape = (value.shape[0], self.classes, *value.shape[2:])
            seen = _spread(labels, shape, self.images).to(given)
            given = torch.cat([given, seen], 1 if self.images else -1)
        found: Tensor = self.net(given)
        return found


def _spread(labels: Tensor | None, shape: Sequence[int], images: bool) -> Tensor:
    """Labels ``[N, K]``, or ``[N, T, K]`` for sequences, at every position; zeros where they do not fit."""
    if labels is None:
        return torch.zeros(shape)
    if not images and tuple(labels.shape) == tuple(shape):
        return labels
    if labels.ndim != 2:
        return labels.new_zeros(shape)
    between = (1,) * (len(shape) - 2)
    return labels.view(len(labels), *((-1, *between) if images else (*between, -1))).expand(shape)


def _one_hot(targets: Any, classes: int) -> Tensor | None:
    if not classes or not isinstance(targets, Tensor) or targets.is_floating_point():
        return None
    return functional.one_hot(targets.clamp(0, classes - 1), classes)


def _classes(output: TensorMeta) -> int:
    """Number of classes in scores ``[N, K, ...]``, or ``[N, T, K]`` of sequences."""
    return output.shape[-1 if output.ndim == 3 else 1] if output.ndim > 1 else 0


METHODS: dict[MethodName, type[Method]] = {
    "local_critics": LocalCriticTraining,
    "backpropagation": Backpropagation,
    "joint": JointLosses,
    "synthetic_gradients": SyntheticGradients,
}


def method_of(method: MethodName | Method) -> Method:
    """A method by name, or one with options.

    Raises:
        UserError: There is no such name.
    """
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise UserError(f"there is no method {method!r}", hint=f"give one of {', '.join(METHODS)}")
    return METHODS[method]()
