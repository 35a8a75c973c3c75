"""Local critics: small networks that estimate the loss at a cut (Lee & Lee, arXiv 2102.01963, section III).

A critic sees one tensor of the frontier, the *main* one: the last floating-point tensor to be computed, which
on a residual stream is the stream itself. It gives what the model gives, a score for each class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from graphsplit.errors import PartitionError
from graphsplit.program import TensorMeta

Shape = tuple[int, ...]
CriticFactory = Callable[[Shape, Shape], nn.Module]
"""Of the shapes of the features and of the model's output, with the batch of the example, a critic."""

Form = Literal["conv", "conv3", "linear"]
FORMS: tuple[Form, ...] = get_args(Form)

FILTERS = 128
"""Of a critic's convolutions, as in the paper."""

_CONVOLUTIONS = {4: nn.Conv2d, 5: nn.Conv3d}


def main_tensor(frontier: Sequence[TensorMeta]) -> int:
    """Position of the tensor that a critic sees: the last one of numbers with more than a batch dimension.

    Raises:
        PartitionError: There is none.
    """
    for position in reversed(range(len(frontier))):
        if frontier[position].dtype.is_floating_point and frontier[position].ndim > 1:
            return position
    crossing = ", ".join(map(str, frontier))
    raise PartitionError(f"no critic can be put where {crossing} cross the cut", hint="cut elsewhere")


def build_critic(
    features: TensorMeta, output: TensorMeta, form: Form | CriticFactory | None, place: str
) -> nn.Module:
    """A critic for one cut.

    Args:
        features: The tensor that it sees: ``[N, C, H, W]`` (or with one dimension more), ``[N, T, D]`` or
            ``[N, D]``.
        output: What the model gives: ``[N, K]``, ``[N, T, K]``, ``[N, K, T]``, ``[N, K, H, W]`` or ``[N]``.
        form: ``"conv"`` (one 3x3 convolution, ReLU, fully connected), ``"conv3"`` (two convolutions and one
            of one channel, for large images), ``"linear"``; None chooses ``"conv"`` for images and
            ``"linear"``, over all time steps, for the rest. Or a factory.
        place: Where the cut is, for messages.

    Raises:
        PartitionError: The shapes do not fit, or the factory gives something of another shape.
    """
    if callable(form):
        critic = form(features.shape, output.shape)
        if not isinstance(critic, nn.Module):
            raise PartitionError(f"the factory gave a {type(critic).__name__} as a critic for {place}")
    else:
        if form is not None and form not in FORMS:
            raise PartitionError(
                f"a critic is {form!r}", hint=f"give one of {', '.join(FORMS)}, or a factory"
            )
        critic = _default(features, output, form, place)
    critic = critic.to(features.dtype)
    _check(critic, features, output, place)
    return critic


def _default(features: TensorMeta, output: TensorMeta, form: Form | None, place: str) -> nn.Module:
    given, wanted = features.shape, output.shape
    images = features.ndim in _CONVOLUTIONS
    if form in ("conv", "conv3") and not images:
        raise PartitionError(
            f"a convolutional critic was asked for {place}, where the features are {features}",
            hint="leave the form to graphsplit, or give a factory",
        )
    if any(dim.symbol is not None for dim in features.dims[1:]):
        raise PartitionError(
            f"the features at {place} are {features}, of which more than the batch may change",
            hint="give a factory for critics that take any size",
        )
    if images and form != "linear":
        return _convolutional(given, wanted, three=form == "conv3")
    if output.ndim == 3 and features.ndim == 3:
        steps = [dim for dim in (1, 2) if wanted[dim] == given[1]]
        if steps == [1]:
            return nn.Linear(given[2], wanted[2])
        if steps == [2]:
            return nn.Sequential(nn.Linear(given[2], wanted[1]), Transpose())
    if output.ndim not in (1, 2):
        raise PartitionError(
            f"there is no critic from features {features} at {place} to outputs {output}",
            hint="give a factory",
        )
    size = torch.Size(given[1:]).numel()
    layer = nn.Linear(size, wanted[1] if output.ndim == 2 else 1)
    return nn.Sequential(*([nn.Flatten()] if features.ndim > 2 else []), layer, *_closing(output))


def _closing(output: TensorMeta) -> list[nn.Module]:
    return [nn.Flatten(0)] if output.ndim == 1 else []


def _convolutional(given: Shape, wanted: Shape, *, three: bool) -> nn.Module:
    convolution = _CONVOLUTIONS[len(given)]
    layers: list[nn.Module] = [convolution(given[1], FILTERS, 3, padding=1), nn.ReLU()]
    channels = FILTERS
    if three:
        layers += [convolution(FILTERS, FILTERS, 3, padding=1), nn.ReLU()]
        layers += [convolution(FILTERS, 1, 3, padding=1), nn.ReLU()]
        channels = 1
    if len(wanted) == len(given):
        return nn.Sequential(*layers, convolution(channels, wanted[1], 1), Resize(wanted[2:]))
    entries = channels * torch.Size(given[2:]).numel()
    outputs = wanted[1] if len(wanted) == 2 else 1
    closing: list[nn.Module] = [nn.Flatten(0)] if len(wanted) == 1 else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(entries, outputs), *closing)


class Transpose(nn.Module):
    """Scores ``[N, T, K]`` as ``[N, K, T]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Exchange the last two dimensions."""
        return x.transpose(1, 2)


class Resize(nn.Module):
    """Scores ``[N, K, ...]`` at the sizes of the output, by nearest neighbours."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = list(size)

    def forward(self, x: Tensor) -> Tensor:
        """Interpolate."""
        return nn.functional.interpolate(x, self.size)


def _check(critic: nn.Module, features: TensorMeta, output: TensorMeta, place: str) -> None:
    """Run the critic once on zeros and compare the shape."""
    device = next((p.device for p in critic.parameters()), torch.device("cpu"))
    training = critic.training
    with torch.no_grad(), torch.random.fork_rng():
        try:
            found = critic.eval()(torch.zeros(features.shape, dtype=features.dtype, device=device))
        except (RuntimeError, TypeError) as error:
            raise PartitionError(
                f"the critic at {place} does not run on features {features}: {error}",
                hint="a critic takes one tensor",
            ) from None
    critic.train(training)
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != output.shape:
        raise PartitionError(f"the critic at {place} gives {shape}, and the model gives {output}")
