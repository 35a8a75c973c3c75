"""Models of the benchmarks: full-size architectures with random weights, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 1x1 convolution, batch norm, ReLU, 3x3 convolution, appended to the input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The input with the new channels behind its own."""
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def densenet(
    blocks: tuple[int, ...] = (6, 12, 24, 16), growth: int = 32, classes: int = 1000
) -> nn.Sequential:
    """DenseNet (Huang et al., arXiv 1608.06993); the default is DenseNet-121."""
    channels = 2 * growth
    layers: list[nn.Module] = [
        nn.Conv2d(3, channels, 7, 2, 3, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    for number, depth in enumerate(blocks):
        for _ in range(depth):
            layers.append(DenseLayer(channels, growth))
            channels += growth
        if number < len(blocks) - 1:
            layers += [
                nn.BatchNorm2d(channels),
                nn.ReLU(),
                nn.Conv2d(channels, channels // 2, 1, bias=False),
                nn.AvgPool2d(2),
            ]
            channels //= 2
    layers += [
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    ]
    return nn.Sequential(*layers)


class Logits(nn.Module):
    """A transformers model that gives its logits as a plain tensor, for tools that cannot take more."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The logits alone."""
        logits: Tensor = self.model(x).logits
        return logits


@dataclass(frozen=True)
class Case:
    """A model of a benchmark; ``head`` names the output layer, which a pruner has to leave alone."""

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    head: str
    heads: dict[str, int] | None = None


def _images() -> Tensor:
    return torch.randn(2, 3, 224, 224)


def _tokens() -> Tensor:
    return torch.randint(0, 30522, (2, 128))


def resnet50() -> nn.Module:
    """ResNet-50 of transformers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return Logits(ResNetForImageClassification(ResNetConfig(num_labels=1000)))


def vit_b16() -> nn.Module:
    """ViT-B/16 of transformers."""
    from transformers import ViTConfig, ViTForImageClassification

    return Logits(ViTForImageClassification(ViTConfig(num_labels=1000)))


def bert_base(layers: int = 12) -> nn.Module:
    """BERT of base width, by default with its twelve layers."""
    from transformers import BertConfig, BertForSequenceClassification

    return Logits(BertForSequenceClassification(BertConfig(num_hidden_layers=layers)))


CASES = (
    Case("ResNet-50", resnet50, _images, "model.classifier.1"),
    Case("DenseNet-121", densenet, _images, "70"),
    Case("ViT-B/16", vit_b16, _images, "model.classifier"),
    Case("BERT-base", bert_base, _tokens, "model.classifier"),
)
