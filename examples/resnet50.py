"""ResNet-50: 25,557,032 parameters, with random weights; nothing is downloaded.

    graphsplit partition examples/resnet50.py -k 2 -o out/resnet50

Needs transformers. Filters and the channels of the residual streams are divided; image and labels are shared.
"""

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification


def model() -> nn.Module:
    """The published architecture with 1000 labels."""
    torch.manual_seed(0)
    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


def example_inputs() -> dict[str, torch.Tensor]:
    """Two images of 224 x 224."""
    return {"pixel_values": torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))}
