"""Several models of one architecture side by side, as one writes them by hand to be fast.

What ``benchmarks/fuse.py`` holds fused modules against. Parameters stand in the order of the single model.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two convolutions and a skip, for ``k`` models side by side."""

    def __init__(self, given: int, width: int, stride: int, k: int = 1) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, groups=k, bias=False)
        self.first = conv(k * given, k * width, 3, stride, 1)
        self.second = conv(k * width, k * width, 3, 1, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(k * width), nn.BatchNorm2d(k * width)
        same = stride == 1 and given == width
        self.skip = nn.Identity() if same else conv(k * given, k * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, given, H, W]``."""
        y = torch.relu(self.norm1(self.first(x)))
        return torch.relu(self.norm2(self.second(y)) + self.skip(x))


class Linears(nn.Module):
    """Linear layers of ``k`` models, ``[N, k * given]`` to ``[k, N, width]``."""

    def __init__(self, k: int, given: int, width: int) -> None:
        super().__init__()
        self.k = k
        self.weight = nn.Parameter(torch.randn(k, given, width) * given**-0.5)
        self.bias = nn.Parameter(torch.zeros(k, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """Of folded features, or of a stack ``[k, N, given]``."""
        stack = x if x.ndim == 3 else x.unflatten(1, (self.k, -1)).transpose(0, 1)
        return torch.baddbmm(self.bias, stack, self.weight)


def resnet18(scale: float = 1, k: int = 1) -> nn.Module:
    """ResNet-18 at a quarter of its width, for images of 32 x 32; ``k`` of them by hand."""
    widths = [round(scale * width) for width in (16, 16, 32, 32, 64, 64, 128, 128)]
    blocks = [
        Block(given, width, 1 + (given < width), k)
        for given, width in zip([widths[0], *widths], widths, strict=False)
    ]
    stem = nn.Sequential(
        nn.Conv2d(3, k * widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(k * widths[0]), nn.ReLU()
    )
    head = nn.Linear(widths[-1], 10) if k == 1 else Linears(k, widths[-1], 10)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def lenets(k: int, part: int = 1) -> nn.Module:
    """``k`` of the paper's LeNet by hand, each at one ``part``-th of its width."""
    first, second, hidden = 20 // part, 50 // part, 500 // part
    if k == 1:
        return nn.Sequential(
            nn.Conv2d(1, first, 5), nn.MaxPool2d(2), nn.Conv2d(first, second, 5), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * second, hidden), nn.ReLU(), nn.Linear(hidden, 10),
        )  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(1, k * first, 5), nn.MaxPool2d(2), nn.Conv2d(k * first, k * second, 5, groups=k),
        nn.MaxPool2d(2), nn.Flatten(), Linears(k, 16 * second, hidden), nn.ReLU(), Linears(k, hidden, 10),
    )  # fmt: skip


class LocallyConnected(nn.Module):
    """``k`` of those of ``examples/paper_cifar10.py``."""

    def __init__(self, k: int, channels: int, filters: int, size: int) -> None:
        super().__init__()
        self.k, self.size = k, size
        self.weight = nn.Parameter(torch.randn(k, filters, channels, 9, size, size) * (9 * channels) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(k, filters, size, size))

    def forward(self, x: Tensor) -> Tensor:
        """Folded images ``[N, k * channels, H, W]`` to ``[N, k * filters, H, W]``."""
        padded = functional.pad(x, (1, 1, 1, 1)).unflatten(1, (self.k, -1))
        shifted = [
            padded[..., row : row + self.size, column : column + self.size]
            for row in range(3)
            for column in range(3)
        ]
        found = torch.einsum("nmcphw,mocphw->nmohw", torch.stack(shifted, 3), self.weight)
        return (found + self.bias).flatten(1, 2)


class Normalisation(nn.Module):
    """Local response normalisation of ``k`` models: each image of each is one of a larger batch."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.norm = k, nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Folded images ``[N, k * channels, H, W]``."""
        normed: Tensor = self.norm(x.reshape(len(x) * self.k, -1, *x.shape[2:]))
        return normed.view(x.shape)


def cifar10s(k: int) -> nn.Module:
    """``k`` of the paper's CIFAR-10 network by hand."""
    return nn.Sequential(
        nn.Conv2d(3, k * 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), Normalisation(k),
        nn.Conv2d(k * 64, k * 64, 5, padding=2, groups=k), nn.ReLU(), Normalisation(k),
        nn.MaxPool2d(3, 2, ceil_mode=True), LocallyConnected(k, 64, 64, 6), nn.ReLU(),
        LocallyConnected(k, 64, 32, 6), nn.ReLU(), nn.Flatten(), Linears(k, 32 * 36, 10),
    )  # fmt: skip


class Norms(nn.Module):
    """Layer norms of ``k`` models, on ``[k, N * L, width]``."""

    def __init__(self, k: int, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(k, 1, width)), nn.Parameter(torch.zeros(k, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """Of a stack."""
        return torch.addcmul(self.bias, functional.layer_norm(x, x.shape[-1:]), self.weight)


class GPTBlock(nn.Module):
    """A block of ``k`` models of ``examples/small_gpt.py``."""

    def __init__(self, k: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norms(k, width), Norms(k, width)
        self.qkv, self.out = Linears(k, width, 3 * width), Linears(k, width, width)
        self.up, self.down = Linears(k, width, 4 * width), Linears(k, 4 * width, width)

    def forward(self, x: Tensor, length: int) -> Tensor:
        """``[k, N * L, width]`` to the same."""
        width = x.shape[-1]
        q, k, v = (
            part.reshape(-1, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        added: Tensor = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + added


class GPTs(nn.Module):
    """``k`` of ``examples/small_gpt.py``."""

    def __init__(self, k: int, symbols: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.k, self.symbols, self.length = k, symbols, length
        self.embed = nn.Parameter(torch.randn(k * symbols, width))
        self.place = nn.Parameter(torch.randn(k * length, width))
        self.blocks = nn.ModuleList(GPTBlock(k, width, heads) for _ in range(layers))
        self.norm, self.head = Norms(k, width), Linears(k, width, symbols)

    def forward(self, characters: Tensor) -> Tensor:
        """Characters ``[N, L]`` to scores ``[k, N, symbols, L]``."""
        batch, length = characters.shape
        numbers = torch.arange(self.k, device=characters.device)
        found = functional.embedding(characters + self.symbols * numbers.view(-1, 1, 1), self.embed)
        places = torch.arange(length, device=characters.device) + self.length * numbers.view(-1, 1, 1)
        x = (found + functional.embedding(places, self.place)).flatten(1, 2)
        for block in self.blocks:
            x = block(x, length)
        scores: Tensor = self.head(self.norm(x))
        return scores.view(self.k, batch, length, -1).transpose(2, 3)
