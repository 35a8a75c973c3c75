"""Models drawn at random: each is split exactly, or refused by name."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphsplit as gs
from graphsplit.errors import PartitionError, UnsupportedError

WIDTHS = (4, 6, 8, 12)
ACTIVATIONS = (F.relu, torch.tanh, F.gelu, F.silu, torch.sigmoid, F.leaky_relu)
Step = tuple[str, tuple[int, ...]]

IMAGE_STEPS = (
    "conv", "grouped", "depthwise", "transposed", "batch_norm", "group_norm", "activation", "pool", "residual",
    "concat", "gate", "squeeze", "shuffle", "chunk", "shared", "pad", "scale", "second_input",
)  # fmt: skip
SEQUENCE_STEPS = (
    "linear", "layer_norm", "activation", "attention", "residual", "concat", "gate", "chunk", "shared", "mix",
    "conv", "scale", "transpose", "heads", "second_input", "select",
)  # fmt: skip


class Drawn(nn.Module):
    """Runs drawn steps on images ``[N, C, H, W]`` or sequences ``[N, T, D]``, then a head."""

    def __init__(self, images: bool, width: int, steps: list[Step], outputs: int) -> None:
        super().__init__()
        self.images, self.steps = images, []
        self.parts = nn.ModuleList()
        self.scales = nn.ParameterList()
        self.stem = nn.Conv2d(3, width, 3, padding=1) if images else nn.Embedding(20, width)
        self.side = nn.Conv2d(3, width, 1) if images else nn.Linear(5, width)
        previous: int | None = None
        for name, choice in steps:
            found = self._grow(name, choice, width, previous)
            if found is None:
                continue
            indices, width, previous = found
            self.steps.append((name, choice, indices))
        self.heads = nn.ModuleList(nn.Linear(width, 3) for _ in range(outputs))

    def _new(self, module: nn.Module) -> int:
        self.parts.append(module)
        return len(self.parts) - 1

    def _map(self, before: int, after: int, kernel: int = 1) -> nn.Module:
        return (
            nn.Conv2d(before, after, kernel, padding=kernel // 2) if self.images else nn.Linear(before, after)
        )

    def _grow(
        self, name: str, choice: tuple[int, ...], width: int, previous: int | None
    ) -> tuple[list[int], int, int | None] | None:
        a, b = choice
        new = WIDTHS[a % len(WIDTHS)]
        if name in ("linear", "conv") and not (name == "conv" and not self.images):
            index = self._new(self._map(width, new, 1 + 2 * (b % 2)))
            return [index], new, index if new == width else previous
        if name == "conv":
            return [self._new(nn.Conv1d(width, new, 3, padding=1))], new, previous
        if name == "grouped":
            groups = 2 if width % 2 == 0 and new % 2 == 0 else 1
            return [self._new(nn.Conv2d(width, new, 3, padding=1, groups=groups))], new, previous
        if name == "depthwise":
            return [self._new(nn.Conv2d(width, width, 3, padding=1, groups=width))], width, previous
        if name == "transposed":
            return [self._new(nn.ConvTranspose2d(width, new, 3, padding=1))], new, previous
        if name == "batch_norm":
            return [self._new(nn.BatchNorm2d(width))], width, previous
        if name == "group_norm":
            return [self._new(nn.GroupNorm(2 if b % 2 else 1, width))], width, previous
        if name == "layer_norm":
            return [self._new(nn.LayerNorm(width))], width, previous
        if name in ("residual", "gate"):
            return [self._new(self._map(width, width)), self._new(self._map(width, width))], width, previous
        if name == "concat":
            return [self._new(self._map(width, new))], width + new, previous
        if name == "squeeze":
            return [self._new(nn.Linear(width, 4)), self._new(nn.Linear(4, width))], width, previous
        if name == "chunk":
            if width % 2:
                return None
            return [self._new(self._map(width, 2 * width))], width, previous
        if name == "shared":
            return None if previous is None else ([previous], width, previous)
        if name in ("attention", "heads"):
            if width % 2:
                return None
            return (
                [self._new(nn.Linear(width, 3 * width)), self._new(nn.Linear(width, width))],
                width,
                previous,
            )
        if name == "mix":
            return [self._new(nn.Linear(6, 6))], width, previous
        if name == "scale":
            self.scales.append(nn.Parameter(torch.rand(width) + 0.5))
            return [len(self.scales) - 1], width, previous
        if name == "second_input":
            return ([], width, previous) if width == self.stem_width else None
        return [], width, previous

    @property
    def stem_width(self) -> int:
        weight = self.stem.weight
        return weight.shape[0] if self.images else weight.shape[1]

    def forward(self, x: Tensor, side: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        for name, choice, indices in self.steps:
            x = self._step(
                name, choice, [self.parts[i] for i in indices] if name != "scale" else indices, x, side
            )
        x = x.mean((2, 3)) if self.images else x.mean(1)
        return tuple(head(x) for head in self.heads)

    def _step(self, name: str, choice: tuple[int, ...], parts: list[Any], x: Tensor, side: Tensor) -> Tensor:
        a, b = choice
        dim = 1 if self.images else -1
        match name:
            case "conv" if not self.images:
                return parts[0](x.transpose(1, 2)).transpose(1, 2)
            case "activation":
                return ACTIVATIONS[a % len(ACTIVATIONS)](x)
            case "pool":
                pooled = F.max_pool2d(x, 2) if b % 2 else F.avg_pool2d(x, 2)
                return F.interpolate(pooled, scale_factor=2)
            case "residual":
                return x + parts[1](torch.tanh(parts[0](x)))
            case "gate":
                return parts[0](x) * torch.sigmoid(parts[1](x))
            case "concat":
                return torch.cat([x, parts[0](x)] if b % 2 else [parts[0](x), x], dim)
            case "squeeze":
                weights = torch.sigmoid(parts[1](F.relu(parts[0](x.mean((2, 3))))))
                return x * weights[:, :, None, None]
            case "shuffle":
                n, c, h, w = x.shape
                return x if c % 2 else x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            case "chunk":
                left, right = parts[0](x).chunk(2, dim)
                return left * torch.tanh(right)
            case "pad":
                return F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]
            case "scale":
                scale = self.scales[parts[0]]
                return x * (scale[:, None, None] if self.images else scale)
            case "second_input":
                return x + self.side(side)
            case "attention" | "heads":
                return _attention(x, parts, 2 if name == "attention" else 1, fused=b % 2 == 0)
            case "mix":
                return parts[0](x.transpose(1, 2)).transpose(1, 2)
            case "transpose":
                return x.flip(1) if b % 2 else x.roll(1, 1)
            case "select":
                return x + x[:, :1]
            case _:
                return parts[0](x)


def _attention(x: Tensor, parts: list[Any], heads: int, *, fused: bool) -> Tensor:
    n, t, d = x.shape
    q, k, v = (y.view(n, t, heads, d // heads).transpose(1, 2) for y in parts[0](x).chunk(3, -1))
    if fused:
        mixed = F.scaled_dot_product_attention(q, k, v)
    else:
        mixed = (q @ k.transpose(-1, -2) / (d // heads) ** 0.5).softmax(-1) @ v
    return x + parts[1](mixed.transpose(1, 2).reshape(n, t, d))


@st.composite
def models(draw: st.DrawFn) -> tuple[Drawn, tuple[Tensor, Tensor]]:
    images = draw(st.booleans())
    width = draw(st.sampled_from(WIDTHS))
    names = st.sampled_from(IMAGE_STEPS if images else SEQUENCE_STEPS)
    steps = draw(st.lists(st.tuples(names, st.tuples(st.integers(0, 7), st.integers(0, 7))), max_size=6))
    outputs = draw(st.integers(1, 2))
    note(f"Drawn(images={images}, width={width}, steps={steps}, outputs={outputs})")
    torch.manual_seed(0)
    model = Drawn(images, width, steps, outputs)
    x = torch.randn(2, 3, 8, 8) if images else torch.randint(0, 20, (2, 6))
    return model, (x, torch.randn(2, 3, 8, 8) if images else torch.randn(2, 6, 5))


def check(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> None:
    try:
        part = gs.partition(model, inputs, **options)
    except (PartitionError, UnsupportedError) as refusal:
        assert str(refusal)
        return
    certificate = part.verify()
    assert certificate.ok, certificate
    assert certificate.max_error < 1e-9


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(models(), st.sampled_from([2, 3, 4]), st.sampled_from(["contiguous", "interleaved", "random"]))
def test_a_random_model_is_split_exactly_or_refused(
    drawn: tuple[Drawn, tuple[Tensor, Tensor]], k: int, strategy: str
) -> None:
    model, inputs = drawn
    check(model, inputs, k=k, strategy=strategy)
