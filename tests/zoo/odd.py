"""Models with unusual structure: shared modules, several inputs or outputs, views, constants, gates."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from zoo.entry import Entry, dense, entry, images, integers, normal

CLASSES = 8


# ---------------------------------------------------------------------------------------------------------
# Sharing, several inputs, several outputs


class SharedModule(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 32)
        self.shared = nn.Linear(32, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for _ in range(2):
            x = torch.relu(self.shared(x))
        return self.head(x)


class TiedAutoencoder(nn.Module):
    """An autoencoder whose decoder uses the transposed weight of the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 32) * 0.2)
        self.bias = nn.Parameter(torch.zeros(16))
        self.out_bias = nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.sigmoid(F.linear(x, self.weight, self.bias))
        return F.linear(code, self.weight.t(), self.out_bias)


class TwoInTwoOut(nn.Module):
    """Two inputs of different kinds, and two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(16, 32)
        self.right = nn.Linear(24, 32)
        self.join = nn.Linear(64, 32)
        self.score = nn.Linear(32, 1)
        self.label = nn.Linear(32, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        joined = torch.cat([F.relu(self.left(left)), F.gelu(self.right(right))], dim=-1)
        hidden = F.relu(self.join(joined))
        return {"label": self.label(hidden), "score": self.score(hidden).squeeze(-1)}


@dataclass
class Detection:
    """The output of DataclassOutput."""

    logits: Tensor
    boxes: Tensor


torch.export.register_dataclass(Detection, serialized_type_name="zoo.odd.Detection")


class DataclassOutput(nn.Module):
    """A model that returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.classes = nn.Linear(32, CLASSES)
        self.boxes = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Detection:
        hidden = self.backbone(x)
        return Detection(logits=self.classes(hidden), boxes=self.boxes(hidden).sigmoid())


class Siamese(nn.Module):
    """Two inputs through one tower, compared by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 32),
        )
        self.out = nn.Linear(32, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.tower(first), self.tower(second)
        return torch.sigmoid(self.out(torch.abs(a - b)))


class TwoTowers(nn.Module):
    """Two towers compared by the cosine of their codes, with a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.key = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))
        self.log_temperature = nn.Parameter(torch.tensor(1.2))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        q = F.normalize(self.query(query), dim=-1)
        k = F.normalize(self.key(key), dim=-1)
        return self.log_temperature.exp() * q @ k.t()


class AuxiliaryHead(nn.Module):
    """Two outputs in training, one in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.aux = nn.Linear(16, CLASSES)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.conv1(x))
        aux = self.aux(x.mean((2, 3))) if self.training else None
        x = F.relu(self.conv2(x))
        out = self.fc(x.mean((2, 3)))
        if aux is not None:
            return out, aux
        return out


class HiddenOutput(nn.Module):
    """A backbone without a head: its output is the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = F.relu(self.bn1(self.conv1(x)))
        return first, F.relu(self.bn2(self.conv2(first)))


class ActorCritic(nn.Module):
    """A policy and a value on one trunk; the value is dueling."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.policy = nn.Linear(32, 4)
        self.value = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
        self.advantage = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
        self.log_std = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.trunk(x)
        advantage = self.advantage(hidden)
        q = self.value(hidden) + (advantage - advantage.mean(dim=-1, keepdim=True))
        return self.policy(hidden), self.log_std.exp().expand(x.shape[0], -1), q


class OptionalInput(nn.Module):
    """Inputs by keyword, one of which stays None."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(16, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor, context: Tensor | None = None, scale: float = 1.0) -> Tensor:
        hidden = self.first(x) * scale
        if context is not None:
            hidden = hidden + self.second(context)
        return self.head(F.relu(hidden))


class NestedInput(nn.Module):
    """A list of tensors and a dict of tensors in, a nested result out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 32) for _ in range(2)])
        self.out = nn.ModuleDict({"a": nn.Linear(32, 4), "b": nn.Linear(32, 12)})

    def forward(self, xs: list[Tensor], extra: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        hidden = sum(F.relu(layer(x)) for layer, x in zip(self.layers, xs, strict=True))
        hidden = hidden * extra["mask"].unsqueeze(-1)
        return {"outs": (self.out["a"](hidden), self.out["b"](hidden))}


# ---------------------------------------------------------------------------------------------------------
# Activations, gates, scalars


def prelu(by_channel: bool) -> nn.Module:
    """Return a network with PReLU of one slope, or of one slope for each channel."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.PReLU(16 if by_channel else 1, init=0.3),
        nn.AvgPool2d(4),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.PReLU(32 if by_channel else 1),
        nn.Flatten(),
        nn.Linear(32 * 64, CLASSES),
    )


class LearnedTemperature(nn.Module):
    """A classifier whose logits are divided by a learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, CLASSES))
        self.temperature = nn.Parameter(torch.ones(1) * 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) / self.temperature.clamp(min=0.1)


class ReZero(nn.Module):
    """Residual branches that are scaled by one learned number each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
        self.alphas = nn.ParameterList([nn.Parameter(torch.tensor(0.1 * i + 0.1)) for i in range(3)])
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer, alpha in zip(self.layers, self.alphas, strict=True):
            x = x + alpha * F.silu(layer(x))
        return self.head(x)


class GLU(nn.Module):
    """Gated linear units: the module, the function, and a product of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 64)
        self.glu = nn.GLU(dim=-1)
        self.fc2 = nn.Linear(32, 64)
        self.gate = nn.Linear(32, 48)
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.glu(self.fc1(x))
        value, gate = self.fc2(x).chunk(2, dim=-1)
        x = value * torch.sigmoid(gate)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Highway(nn.Module):
    """Highway layers: a gate between the input and its transform."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 32)
        self.transforms = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])
        self.gates = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for transform, gate in zip(self.transforms, self.gates, strict=True):
            t = torch.sigmoid(gate(x))
            x = t * F.relu(transform(x)) + (1 - t) * x
        return self.head(x)


class FiLM(nn.Module):
    """Features that are scaled and shifted by a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.film = nn.Linear(12, 32)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        gamma, beta = torch.split(self.film(condition), 16, dim=1)
        x = self.conv2(x) * (1 + gamma[:, :, None, None]) + beta[:, :, None, None]
        return self.fc(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))


class SpatialGate(nn.Module):
    """Features gated by one channel, which comes from all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.squeeze = nn.Conv2d(16, 1, kernel_size=1, bias=False)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        gate = torch.sigmoid(self.squeeze(x))
        x = F.relu(self.conv2(x * gate))
        return self.fc(x.mean(dim=(2, 3)))


class CBAM(nn.Module):
    """A channel gate from mean and maximum, and a spatial gate from mean and maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.mlp = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        gate = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))
        x = x * gate.unsqueeze(-1).unsqueeze(-1)
        pooled = torch.cat([torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)], dim=1)
        x = x * torch.sigmoid(self.spatial(pooled))
        return self.fc(x.mean((2, 3)))


class Maxout(nn.Module):
    """Layers that keep the largest of two pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 64)
        self.fc2 = nn.Linear(32, 64)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x).view(-1, 32, 2).max(dim=-1).values
        a, b = self.fc2(x).chunk(2, dim=1)
        return self.head(torch.maximum(a, b))


class SoftExperts(nn.Module):
    """A mixture of experts that all run."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(4)]
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.gate(x), dim=-1)
        outs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.head((weights.unsqueeze(-1) * outs).sum(dim=1))


class Siren(nn.Module):
    """A coordinate network with sines and a skip of its encoded input."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(18, 32)
        self.fc2 = nn.Linear(32, 32)
        self.fc3 = nn.Linear(50, 32)
        self.density = nn.Linear(32, 1)
        self.color = nn.Linear(32, 3)
        self.register_buffer("frequencies", 2.0 ** torch.arange(3), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angles = x[..., None] * self.frequencies
        code = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
        hidden = torch.sin(30.0 * self.fc1(code))
        hidden = torch.sin(self.fc2(hidden))
        hidden = F.relu(self.fc3(torch.cat([hidden, code], dim=-1)))
        return F.softplus(self.density(hidden)), torch.sigmoid(self.color(hidden))


# ---------------------------------------------------------------------------------------------------------
# Weights that are computed


def weight_normed() -> nn.Module:
    """Return a network whose weights are parametrized by weight norm."""
    return nn.Sequential(
        OrderedDict(
            [
                ("conv", weight_norm(nn.Conv1d(8, 16, 3, padding=1))),
                ("relu1", nn.ReLU()),
                ("flatten", nn.Flatten()),
                ("fc1", weight_norm(nn.Linear(16 * 10, 32))),
                ("relu2", nn.ReLU()),
                ("fc2", weight_norm(nn.Linear(32, CLASSES))),
            ]
        )
    )


class CosineHead(nn.Module):
    """A classifier on the cosine of features and class weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32))
        self.weight = nn.Parameter(torch.randn(CLASSES, 32))
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(self.body(x)), F.normalize(self.weight, dim=1))


class WeightStandardization(nn.Module):
    """Convolutions with standardized weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc = nn.Linear(32, CLASSES)

    @staticmethod
    def _standard(weight: Tensor) -> Tensor:
        mean = weight.mean(dim=(1, 2, 3), keepdim=True)
        std = weight.std(dim=(1, 2, 3), keepdim=True)
        return (weight - mean) / (std + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self._standard(self.conv1.weight), self.conv1.bias, padding=1))
        x = F.max_pool2d(x, 4)
        x = F.relu(F.conv2d(x, self._standard(self.conv2.weight), self.conv2.bias, padding=1))
        return self.fc(x.mean((2, 3)))


class LoRA(nn.Module):
    """Frozen layers with a trained update of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32).requires_grad_(False)
        self.fc2 = nn.Linear(32, 32).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, 32) * 0.1)
        self.up = nn.Parameter(torch.zeros(32, 4))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x) + (x @ self.down.t()) @ self.up.t() * 2.0)
        return self.head(x)


# ---------------------------------------------------------------------------------------------------------
# Views, constants, buffers, gradients


class InplaceView(nn.Module):
    """Writes into views of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x[:, :4] += 1
        x[:, 8:16].mul_(0.5)
        x = x.relu_()
        return self.fc2(x)


class NoGradRegion(nn.Module):
    """A branch that is computed without gradients, and one that is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(x))
        with torch.no_grad():
            scale = hidden.abs().mean(dim=1, keepdim=True) + 1.0
        return self.fc2(hidden / scale + 0.1 * hidden.detach())


class LiftedConstant(nn.Module):
    """Constants that are made in the forward pass, and one that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.fc = nn.Linear(16, CLASSES)
        self.offset = torch.linspace(-1.0, 1.0, 16)

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225])[None, :, None, None]
        x = F.relu(self.conv((x - mean) / std))
        x = x.mean((2, 3)) + self.offset
        return self.fc(x * torch.arange(1, 17, device=x.device) / 16)


class MaskBuffers(nn.Module):
    """Masks in buffers that are not saved: over features, over weights, over positions."""

    feature_mask: Tensor
    weight_mask: Tensor
    causal: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 32)
        self.head = nn.Linear(32, CLASSES)
        self.register_buffer("feature_mask", (torch.arange(32) % 3 != 0).float(), persistent=False)
        self.register_buffer("weight_mask", torch.tril(torch.ones(32, 32)), persistent=False)
        self.register_buffer("causal", torch.tril(torch.ones(6, 6, dtype=torch.bool)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(x)) * self.feature_mask
        x = F.relu(F.linear(x, self.fc2.weight * self.weight_mask, self.fc2.bias))
        scores = (x @ x.transpose(-2, -1)).masked_fill(~self.causal, float("-inf"))
        return self.head(scores.softmax(-1) @ x)


class RunningStatistic(nn.Module):
    """A buffer that is updated in training."""

    average: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, CLASSES)
        self.register_buffer("average", torch.linspace(0.5, 1.5, 32))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.fc1(x))
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
                self.steps += 1
        return self.fc2(hidden / (self.average + 1.0))


class ChannelSlices(nn.Module):
    """Channels taken by slice, by index, by flip, in uneven parts, and joined again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv4 = nn.Conv2d(24, 24, 3, padding=1)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        a, b = torch.split(x, [8, 16], dim=1)
        x = torch.cat([self.conv2(a), self.conv3(b)], dim=1)
        x = F.relu(x[:, [*range(12, 24), *range(12)]])
        x = F.relu(self.conv4(torch.flip(x, [1]))) + F.pad(x[:, ::2], (0, 0, 0, 0, 0, 12))
        return self.fc(x.mean((2, 3)))


class Where(nn.Module):
    """Selections by comparison, clamps and a fill."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 32)
        self.fc3 = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        a = self.fc1(x)
        b = self.fc2(torch.where(a > 0, a, 0.1 * torch.expm1(a)))
        c = torch.where(b > a, b, a).clamp(-2, 2)
        return self.fc3(c.masked_fill(c == 0, 0.5))


# ---------------------------------------------------------------------------------------------------------
# Other heads and other dimensions


class PixelShuffle(nn.Module):
    """Super-resolution by pixel shuffle, with a long skip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 12, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.interpolate(x, scale_factor=4, mode="bicubic", align_corners=False)
        x = torch.tanh(self.conv1(x))
        x = x + torch.relu(self.conv2(x))
        x = F.leaky_relu(self.shuffle(self.up(x)), 0.2)
        return self.shuffle(self.conv3(x)) + skip


class PatchMerging(nn.Module):
    """Space to depth by pixel unshuffle, by strided slices, and by unfold."""

    def __init__(self) -> None:
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(2)
        self.conv1 = nn.Conv2d(12, 16, 3, padding=1)
        self.reduction = nn.Linear(64, 32)
        self.project = nn.Linear(32 * 4, 32)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(self.unshuffle(x))).permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
        x = F.gelu(self.reduction(x)).permute(0, 3, 1, 2)
        x = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)
        return self.fc(F.relu(self.project(x)).mean(1))


def classifier_with_closing(closing: Callable[[], nn.Module], outputs: int) -> Callable[[], nn.Module]:
    """Return the maker of a small classifier that ends in this activation."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(32, outputs),
            closing(),
        )

    return make


class Conv3d(nn.Module):
    """A network on video, with factorized convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm3d(16)
        self.spatial = nn.Conv3d(16, 24, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.temporal = nn.Conv3d(24, 32, (3, 1, 1), padding=(1, 0, 0))
        self.pool = nn.MaxPool3d((1, 2, 2))
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.temporal(F.relu(self.spatial(x))))
        x = F.adaptive_avg_pool3d(x, 1)
        return self.fc(x.view(x.size(0), -1))


class Recommender(nn.Module):
    """Embeddings of users and items beside dense features, with their dot products."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(20, 16)
        self.items = nn.Embedding(30, 16)
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 9, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, users: Tensor, items: Tensor, features: Tensor) -> Tensor:
        dense_code = self.bottom(features)
        codes = torch.stack([dense_code, self.users(users), self.items(items)], dim=1)
        products = torch.bmm(codes, codes.transpose(1, 2)).flatten(1)
        return torch.sigmoid(self.top(torch.cat([dense_code, products], dim=1))).squeeze(1)


class GraphConvolution(nn.Module):
    """Graph convolutions with a dense adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.randn(16, 32) * 0.2)
        self.bias1 = nn.Parameter(torch.zeros(32))
        self.fc2 = nn.Linear(32, CLASSES, bias=False)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        adjacency = adjacency / adjacency.sum(dim=-1, keepdim=True)
        x = F.relu(torch.matmul(adjacency, torch.matmul(x, self.weight1)) + self.bias1)
        x = F.dropout(x, 0.5, training=self.training)
        return F.log_softmax(adjacency @ self.fc2(x), dim=-1)


class DeepSets(nn.Module):
    """A network on point sets, with a maximum over the points and the result joined to each point."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 16, 1)
        self.bn1 = nn.BatchNorm1d(16)
        self.conv2 = nn.Conv1d(16, 32, 1)
        self.conv3 = nn.Conv1d(48, 16, 1)
        self.conv4 = nn.Conv1d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        local = F.relu(self.bn1(self.conv1(x)))
        whole = torch.max(self.conv2(local), 2, keepdim=True)[0]
        joined = torch.cat([local, whole.repeat(1, 1, x.size(2))], 1)
        return self.conv4(F.relu(self.conv3(joined)))


class Bilinear(nn.Module):
    """A bilinear layer, and second-order pooling of features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(64, 16)
        self.fc2 = nn.Linear(64, 12)
        self.bilinear = nn.Bilinear(16, 12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).flatten(2)
        gram = torch.bmm(x, x.transpose(1, 2)).flatten(1) / x.size(2)
        gram = torch.sign(gram) * torch.sqrt(gram.abs() + 1e-5)
        return self.bilinear(F.relu(self.fc1(gram)), F.relu(self.fc2(gram)))


class FrozenBackbone(nn.Module):
    """A backbone that does not train, with its norms always in evaluation, below a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
        )
        for parameter in self.backbone.parameters():
            parameter.requires_grad = False
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def train(self, mode: bool = True) -> "FrozenBackbone":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean((2, 3)))


def no_bias() -> nn.Module:
    """Return a perceptron without biases."""
    return nn.Sequential(
        nn.Linear(16, 32, bias=False),
        nn.ELU(),
        nn.Linear(32, 32, bias=False),
        nn.Mish(),
        nn.Linear(32, 4, bias=False),
    )


FAMILY = "odd"

ENTRIES: tuple[Entry, ...] = (
    entry("shared_module", SharedModule, dense(2, 16), FAMILY),
    entry("tied_autoencoder", TiedAutoencoder, dense(2, 32), FAMILY),
    entry("two_in_two_out", TwoInTwoOut, lambda: (normal(2, 16), normal(2, 24, seed=2)), FAMILY),
    entry("dataclass_output", DataclassOutput, dense(2, 16), FAMILY),
    entry("siamese", Siamese, lambda: (normal(2, 1, 16, 16), normal(2, 1, 16, 16, seed=2)), FAMILY),
    entry("two_towers", TwoTowers, lambda: (normal(3, 16), normal(3, 24, seed=2)), FAMILY),
    entry("auxiliary_head", AuxiliaryHead, images(), FAMILY),
    entry("hidden_output", HiddenOutput, images(), FAMILY),
    entry("actor_critic", ActorCritic, dense(2, 16), FAMILY),
    entry("optional_input", OptionalInput, lambda: {"x": normal(2, 16)}, FAMILY),
    entry(
        "nested_input",
        NestedInput,
        lambda: ([normal(2, 16), normal(2, 16, seed=2)], {"mask": torch.tensor([0.5, 2.0])}),
        FAMILY,
    ),
    entry("prelu_one_slope", lambda: prelu(False), images(), FAMILY),
    entry("prelu_channels", lambda: prelu(True), images(), FAMILY),
    entry("learned_temperature", LearnedTemperature, dense(2, 16), FAMILY),
    entry("rezero", ReZero, dense(2, 16), FAMILY),
    entry("glu", GLU, dense(2, 16), FAMILY),
    entry("highway", Highway, dense(2, 16), FAMILY),
    entry("film", FiLM, lambda: (normal(2, 3, 16, 16), normal(2, 12, seed=2)), FAMILY),
    entry("spatial_gate", SpatialGate, images(), FAMILY),
    entry("cbam", CBAM, images(), FAMILY),
    entry("maxout", Maxout, dense(2, 16), FAMILY),
    entry("soft_experts", SoftExperts, dense(2, 16), FAMILY),
    entry("siren", Siren, dense(5, 3), FAMILY),
    entry("weight_norm", weight_normed, dense(2, 8, 10), FAMILY),
    entry("cosine_head", CosineHead, dense(2, 16), FAMILY),
    entry("weight_standardization", WeightStandardization, images(), FAMILY),
    entry("lora", LoRA, dense(2, 16), FAMILY),
    entry("inplace_view", InplaceView, dense(2, 16), FAMILY),
    entry("no_grad_region", NoGradRegion, dense(2, 16), FAMILY),
    entry("lifted_constant", LiftedConstant, images(), FAMILY),
    entry("mask_buffers", MaskBuffers, dense(2, 6, 16), FAMILY),
    entry("running_statistic", RunningStatistic, dense(2, 16), FAMILY),
    entry("channel_slices", ChannelSlices, images(), FAMILY),
    entry("where", Where, dense(2, 16), FAMILY),
    entry("pixel_shuffle", PixelShuffle, images(16), FAMILY),
    entry("patch_merging", PatchMerging, images(), FAMILY),
    entry("softmax_closing", classifier_with_closing(partial(nn.Softmax, dim=1), CLASSES), images(), FAMILY),
    entry("sigmoid_closing", classifier_with_closing(nn.Sigmoid, 1), images(), FAMILY),
    entry("conv3d", Conv3d, dense(2, 3, 4, 16, 16), FAMILY),
    entry(
        "recommender",
        Recommender,
        lambda: (integers(4, high=20), integers(4, high=30, seed=2), normal(4, 8)),
        FAMILY,
    ),
    entry(
        "graph_convolution",
        GraphConvolution,
        lambda: (normal(7, 16), torch.eye(7) + (normal(7, 7, seed=2) > 0.5)),
        FAMILY,
    ),
    entry("deep_sets", DeepSets, dense(2, 3, 10), FAMILY),
    entry("bilinear", Bilinear, images(), FAMILY),
    entry("frozen_backbone", FrozenBackbone, images(), FAMILY),
    entry("no_bias", no_bias, dense(2, 16), FAMILY),
)
