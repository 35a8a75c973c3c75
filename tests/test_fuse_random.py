"""Fused models of random ops: whatever follows on what, in whichever layout it stands, each model is as by itself.

A case is a network whose first values stand in each of the layouts of fusion, followed by ops chosen by a seed.
``GRAPHSPLIT_SAMPLES=50`` tries 50 times as many seeds.
"""

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphsplit as gs
from graphsplit._fuse import certify_fused
from graphsplit.passes.fuse import fuse
from graphsplit.program import check

SEEDS = 4 * max(1, int(os.environ.get("GRAPHSPLIT_SAMPLES", "1")))
LENGTH = 14
LARGEST = 20_000  # elements of a value

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "affine": lambda v: 2 * v + 1,
    "gelu": F.gelu,
    "clone": torch.clone,
    "clamp": lambda v: v.abs().clamp(max=1.5),
    "masked_fill": lambda v: v.masked_fill(v > 0.5, 0.0),
    "where": lambda v: torch.where(v > 0, v, 0.1 * v),
    "softmax of the last": lambda v: v.softmax(-1),
    "softmax of channels": lambda v: v.softmax(1),
    "cumsum": lambda v: v.cumsum(-1),
    "mean of the last": lambda v: v.mean(-1, keepdim=True),
    "mean of channels": lambda v: v.mean(1),
    "mean of channels, kept": lambda v: v.mean(1, keepdim=True),
    "mean of all": torch.mean,
    "sum": lambda v: v.sum(-1),
    "max": lambda v: v.max(1)[0],
    "amax": lambda v: v.amax(-1, keepdim=True),
    "var": lambda v: v.var(1, keepdim=True),
    "unsqueeze 0": lambda v: v.unsqueeze(0),
    "unsqueeze 1": lambda v: v.unsqueeze(1),
    "unsqueeze -1": lambda v: v.unsqueeze(-1),
    "squeeze": lambda v: v.squeeze(1),
    "transpose 0, 1": lambda v: v.transpose(0, 1),
    "transpose 1, 2": lambda v: v.transpose(1, 2),
    "transpose 1, -1": lambda v: v.transpose(1, -1),
    "transpose -1, -2": lambda v: v.transpose(-1, -2),
    "permute behind the batch": lambda v: v.permute(0, *reversed(range(1, v.ndim))),
    "permute": lambda v: v.permute(*reversed(range(v.ndim))),
    "flatten 1": lambda v: v.flatten(1),
    "flatten 2": lambda v: v.flatten(2),
    "flatten 0, 1": lambda v: v.flatten(0, 1),
    "flatten -2": lambda v: v.flatten(-2),
    "reshape to rows": lambda v: v.reshape(v.shape[0], -1),
    "reshape to a matrix": lambda v: v.reshape(-1, v.shape[-1]),
    "reshape to sequences": lambda v: v.reshape(v.shape[0], v.shape[1], -1),
    "reshape to groups": lambda v: v.reshape(v.shape[0], 2, v.shape[1] // 2, *v.shape[2:]),
    "unflatten 1": lambda v: v.unflatten(1, (2, -1)),
    "unflatten -1": lambda v: v.unflatten(-1, (2, -1)),
    "chunk 1": lambda v: v.chunk(2, 1)[1],
    "chunk -1": lambda v: v.chunk(2, -1)[0],
    "split": lambda v: v.split([1, v.shape[1] - 1], 1)[1],
    "unbind": lambda v: v.unbind(1)[0],
    "slice 1": lambda v: v[:, 1:],
    "slice -1": lambda v: v[..., :2],
    "select 1": lambda v: v[:, 0],
    "select -1": lambda v: v[..., -1],
    "index 1": lambda v: v[:, torch.tensor([1, 0])],
    "index -1": lambda v: v[..., torch.tensor([0, 1, 0])],
    "index_select 1": lambda v: v.index_select(1, torch.tensor([1, 0, 1])),
    "index_select -1": lambda v: v.index_select(-1, torch.tensor([1])),
    "index_add": lambda v: v.index_add(1, torch.tensor([1, 0]), v[:, :2]),
    "slice_scatter": lambda v: v.slice_scatter(2 * v[:, :1], 1, 1, 2),
    "gather": lambda v: v.gather(1, v.argsort(1)),
    "topk": lambda v: v.topk(2, -1)[0],
    "sort": lambda v: v.sort(1)[0],
    "flip": lambda v: v.flip(1),
    "fft of the last": lambda v: torch.fft.irfft(torch.fft.rfft(v).conj() * 2, n=v.shape[-1]),
    "fft of channels": lambda v: torch.fft.fft(v, dim=1).abs(),
    "fft of two": lambda v: torch.fft.ifft2(torch.fft.fft2(v) ** 2).real,
    "roll": lambda v: v.roll(1, -1),
    "tril": torch.tril,
    "pad 1": lambda v: F.pad(v, (1, 1)),
    "pad 2": lambda v: F.pad(v, (1, 0, 0, 2)),
    "pad 3": lambda v: F.pad(v, (0, 0, 0, 0, 1, 1)),
    "max_pool": lambda v: F.max_pool2d(v, 2),
    "adaptive_avg_pool": lambda v: F.adaptive_avg_pool2d(v, 2),
    "interpolate": lambda v: F.interpolate(v, scale_factor=2),
    "pixel_shuffle": lambda v: F.pixel_shuffle(v, 2),
    "pixel_unshuffle": lambda v: F.pixel_unshuffle(v, 2),
    "local_response_norm": lambda v: F.local_response_norm(v, 3),
    "layer_norm 1": lambda v: F.layer_norm(v, v.shape[-1:]),
    "layer_norm 2": lambda v: F.layer_norm(v, v.shape[-2:]),
    "group_norm": lambda v: F.group_norm(v, 2),
    "instance_norm": F.instance_norm,
    "normalize 1": lambda v: F.normalize(v, dim=1),
    "normalize -1": lambda v: F.normalize(v, dim=-1),
    "glu": lambda v: F.glu(v, 1),
    "gram": lambda v: v @ v.transpose(-1, -2),
    "attention": lambda v: F.scaled_dot_product_attention(v, v, v),
    "einsum": lambda v: torch.einsum("b...i->b...", v),
    "product with ones": lambda v: v @ torch.ones(v.shape[-1], 3, dtype=v.dtype),
    "cat 0": lambda v: torch.cat([v, v], 0),
    "cat 1": lambda v: torch.cat([v, 2 * v], 1),
    "cat -1": lambda v: torch.cat([v, -v], -1),
    "stack 1": lambda v: torch.stack([v, -v], 1),
    "stack -1": lambda v: torch.stack([v, v], -1),
    "expand": lambda v: v.unsqueeze(2).expand(-1, -1, 3, *[-1] * (v.ndim - 2)),
    "repeat": lambda v: v.repeat(1, 2, *[1] * (v.ndim - 2)),
    "places": lambda v: v + torch.arange(v.shape[-1]),
    "batch size": lambda v: v / v.shape[0],
    "channels": lambda v: v * v.shape[1],
    "new_zeros": lambda v: torch.cat([v, v.new_zeros(v.shape[0], 1, *v.shape[2:])], 1),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "matmul": torch.matmul,
    "cat 1": lambda a, b: torch.cat([a, b], 1),
    "cat -1": lambda a, b: torch.cat([a, b], -1),
    "stack": lambda a, b: torch.stack([a, b], 1),
    "where": lambda a, b: torch.where(a > b, a, b),
    "maximum": torch.maximum,
    "expand_as": lambda a, b: a.expand_as(b),
    "attention": lambda a, b: F.scaled_dot_product_attention(a, b, b),
    "addcmul": lambda a, b: torch.addcmul(a, a, b),
}
Step = tuple[str, str, int, int]


class Random(nn.Module):
    """Values in every layout, and steps on them: the kind, the op, and which values."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.rows, self.mixed = nn.Linear(64, 16), nn.Linear(16, 16)
        self.linears = nn.ModuleDict({str(width): nn.Linear(width, width) for width in (2, 3, 4, 8, 16)})
        self.own = nn.ParameterList(torch.randn(shape) for shape in ((8,), (8, 1, 1), (16,), (3, 16)))

    def first(self, x: Tensor) -> list[Tensor]:
        """Folded, stacked, as matrices, as one batch, woven, weights, and the input."""
        images, rows = self.conv(x), self.rows(x.flatten(2))
        matrices = self.mixed(torch.tanh(rows))
        heads = matrices.view(len(x), 3, 4, 4).transpose(1, 2)
        woven = F.avg_pool3d(images.unsqueeze(1), (3, 1, 1), stride=1, padding=(1, 0, 0)).squeeze(1)
        return [images, rows, matrices, heads, images.mean((2, 3)), woven, *self.own, x]

    def step(self, values: list[Tensor], step: Step) -> Tensor:
        """One more value."""
        kind, op, i, k = step
        if kind == "linear":
            found: Tensor = self.linears[str(values[i].shape[-1])](values[i])
            return found
        return UNARY[op](values[i]) if kind == "unary" else BINARY[op](values[i], values[k])

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        values = self.first(x)
        given = len(values)
        for step in self.steps:
            values.append(self.step(values, step))
        return tuple(values[given:])


def random_model(seed: int) -> Random:
    """Steps that the model can take, with values that are finite and not too many."""
    torch.manual_seed(seed)
    chosen, model = random.Random(seed), Random([])
    with torch.no_grad():
        values = model.first(torch.randn(3, 3, 8, 8))
        for _ in range(LENGTH):
            kind = chosen.choice(["unary"] * 4 + ["binary"] * 2 + ["linear"])
            op = chosen.choice(list(BINARY if kind == "binary" else UNARY))
            late = chosen.randrange(max(6, len(values) - 3), len(values))
            step = (kind, op, chosen.choice([chosen.randrange(6), late]), chosen.randrange(len(values)))
            try:
                found = model.step(values, step)
            except (RuntimeError, IndexError, ValueError, KeyError, TypeError):
                continue  # an op that does not know this shape
            if found.numel() <= LARGEST and bool(torch.isfinite(found).all()):
                values.append(found)
                model.steps.append(step)
    return model


@pytest.mark.parametrize("op", UNARY)
def test_each_op_in_every_layout(op: str) -> None:
    model = Random([])
    with torch.no_grad():
        values = model.first(torch.randn(3, 3, 8, 8))
        for place in range(6):
            try:
                UNARY[op](values[place])
            except (RuntimeError, IndexError, ValueError):
                continue  # an op that does not know this shape
            model.steps.append(("unary", op, place, 0))
    program = gs.trace(model, torch.randn(3, 3, 8, 8))
    certificate = certify_fused(fuse([program] * 3))
    assert certificate.ok, (model.steps, certificate)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_random_ops_are_fused(seed: int, own: bool) -> None:
    model = random_model(seed)
    assert model.steps
    program = gs.trace(model, torch.randn(3, 3, 8, 8))
    fused = fuse([program] * 3, own_inputs=own)
    check(fused.program)
    certificate = certify_fused(fused)
    assert certificate.ok, (model.steps, certificate)
