"""Hand-written image models, in the style of the usual model collections."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, dense, entry, images

CLASSES = 8


# ---------------------------------------------------------------------------------------------------------
# LeNet, perceptrons, VGG


class LeNet(nn.Module):
    """LeNet with 431,080 parameters on 28x28 digits."""

    def __init__(self, log_probabilities: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)
        self.log_probabilities = log_probabilities

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        x = x.view(-1, 800)
        x = F.relu(self.fc1(x))
        x = self.fc2(x)
        return F.log_softmax(x, dim=1) if self.log_probabilities else x


def mlp() -> nn.Module:
    """Return a plain perceptron."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, CLASSES)
    )


class RegularizedMLP(nn.Module):
    """A perceptron with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 32)
        self.bn1 = nn.BatchNorm1d(32)
        self.fc2 = nn.Linear(32, 32)
        self.bn2 = nn.BatchNorm1d(32)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.bn1(self.fc1(x))))
        x = F.dropout(F.leaky_relu(self.bn2(self.fc2(x)), 0.1), p=0.2, training=self.training)
        return self.head(x)


class VGG(nn.Module):
    """VGG with batch norm and a classifier with dropout."""

    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (16, 0, 32, 32, 0, 48, 0):
            if width == 0:
                layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
                continue
            layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(channels * 4, 64),
            nn.ReLU(True),
            nn.Dropout(p=0.5),
            nn.Linear(64, 64),
            nn.ReLU(True),
            nn.Dropout(p=0.5),
            nn.Linear(64, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


# ---------------------------------------------------------------------------------------------------------
# Residual networks


def conv3x3(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution with padding."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution."""
    return nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """The residual block of two 3x3 convolutions."""

    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None, groups: int, width: int
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """The residual block of 1x1, 3x3 and 1x1 convolutions."""

    expansion = 2

    def __init__(
        self, inplanes: int, planes: int, stride: int, downsample: nn.Module | None, groups: int, width: int
    ) -> None:
        super().__init__()
        inner = width * groups if groups > 1 else planes
        self.conv1 = conv1x1(inplanes, inner)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, stride, groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """A residual network."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, ...] = (2, 2, 1),
        groups: int = 1,
        width: int = 4,
    ) -> None:
        super().__init__()
        self.inplanes = 16
        self.groups, self.width = groups, width
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 16, layers[0], 1)
        self.layer2 = self._make_layer(block, 32, layers[1], 2)
        self.layer3 = self._make_layer(block, 48, layers[2], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(48 * block.expansion, CLASSES)

    def _make_layer(
        self, block: type[BasicBlock] | type[Bottleneck], planes: int, blocks: int, stride: int
    ) -> nn.Sequential:
        downsample = None
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, planes * block.expansion, stride),
                nn.BatchNorm2d(planes * block.expansion),
            )
        layers = [block(self.inplanes, planes, stride, downsample, self.groups, self.width)]
        self.inplanes = planes * block.expansion
        layers += [block(self.inplanes, planes, 1, None, self.groups, self.width) for _ in range(1, blocks)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


class PreActBlock(nn.Module):
    """The residual block whose norms stand before the convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv1x1(inputs, outputs, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        return out + shortcut


class PadShortcut(nn.Module):
    """The parameter-free shortcut that strides and pads channels with zeros."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))


def preact_resnet() -> nn.Module:
    """Return a pre-activation residual network."""
    return nn.Sequential(
        conv3x3(3, 16),
        PreActBlock(16, 16),
        PreActBlock(16, 32, 2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AvgPool2d(16),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def pad_resnet() -> nn.Module:
    """Return the residual network whose shortcuts pad channels with zeros."""
    return nn.Sequential(
        conv3x3(3, 16),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        BasicBlock(16, 16, 1, None, 1, 4),
        BasicBlock(16, 32, 2, PadShortcut(16), 1, 4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


# ---------------------------------------------------------------------------------------------------------
# DenseNet and Inception


class DenseLayer(nn.Module):
    """The layer of a dense block, on the list of all features before it."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv1x1(inputs, 2 * growth)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(2 * growth, growth)

    def forward(self, features: list[Tensor]) -> Tensor:
        bottleneck = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        out = self.conv2(self.relu2(self.norm2(bottleneck)))
        return F.dropout(out, p=0.1, training=self.training)


class DenseBlock(nn.ModuleDict):
    """A block of dense layers."""

    def __init__(self, layers: int, inputs: int, growth: int) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(inputs + i * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """A densely connected network."""

    def __init__(self, growth: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            OrderedDict(
                [
                    ("conv0", nn.Conv2d(3, 16, kernel_size=7, stride=2, padding=3, bias=False)),
                    ("norm0", nn.BatchNorm2d(16)),
                    ("relu0", nn.ReLU(inplace=True)),
                    ("pool0", nn.MaxPool2d(kernel_size=3, stride=2, padding=1)),
                ]
            )
        )
        channels = 16
        for i, layers in enumerate((2, 3)):
            self.features.add_module(f"denseblock{i + 1}", DenseBlock(layers, channels, growth))
            channels += layers * growth
            if i == 0:
                transition = nn.Sequential(
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                    conv1x1(channels, channels // 2),
                    nn.AvgPool2d(kernel_size=2, stride=2),
                )
                self.features.add_module("transition", transition)
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        return self.classifier(torch.flatten(out, 1))


class BasicConv2d(nn.Module):
    """Convolution, batch norm and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Four branches joined along the channels."""

    def __init__(self, inputs: int, a: int, b0: int, b: int, c0: int, c: int, pool: int) -> None:
        super().__init__()
        self.branch1 = BasicConv2d(inputs, a, 1)
        self.branch2 = nn.Sequential(BasicConv2d(inputs, b0, 1), BasicConv2d(b0, b, 3, padding=1))
        self.branch3 = nn.Sequential(BasicConv2d(inputs, c0, 1), BasicConv2d(c0, c, 3, padding=1))
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True), BasicConv2d(inputs, pool, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """A network of two inception blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = BasicConv2d(3, 16, 7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception1 = Inception(16, 8, 8, 16, 4, 8, 8)
        self.maxpool2 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.inception2 = Inception(40, 12, 8, 16, 8, 12, 8)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool1(self.conv1(x))
        x = self.maxpool2(self.inception1(x))
        x = self.avgpool(self.inception2(x))
        return self.fc(self.dropout(torch.flatten(x, 1)))


class Fire(nn.Module):
    """The squeeze and two-way expand module of SqueezeNet."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, kernel_size=1)
        self.squeeze_activation = nn.ReLU(inplace=True)
        self.expand1x1 = nn.Conv2d(squeeze, expand, kernel_size=1)
        self.expand1x1_activation = nn.ReLU(inplace=True)
        self.expand3x3 = nn.Conv2d(squeeze, expand, kernel_size=3, padding=1)
        self.expand3x3_activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat(
            [self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1
        )


def squeezenet() -> nn.Module:
    """Return a small SqueezeNet, which ends in a convolution and a pooling."""
    return nn.Sequential(
        nn.Conv2d(3, 16, kernel_size=3, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True),
        Fire(16, 8, 16),
        Fire(32, 8, 24),
        nn.Dropout(0.5),
        nn.Conv2d(48, CLASSES, kernel_size=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
    )


# ---------------------------------------------------------------------------------------------------------
# Mobile networks


def conv_norm(
    inputs: int,
    outputs: int,
    kernel_size: int = 3,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = nn.ReLU6,
) -> nn.Sequential:
    """Return convolution, batch norm and an in-place activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel_size, stride, (kernel_size - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if activation is not None:
        layers.append(activation(inplace=True))
    return nn.Sequential(*layers)


class InvertedResidual(nn.Module):
    """The inverted residual block of MobileNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.use_res_connect = stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(conv_norm(inputs, hidden, 1))
        layers += [
            conv_norm(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, 1, 0, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class MobileNetV2(nn.Module):
    """A network of inverted residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm(3, 16, stride=2),
            InvertedResidual(16, 8, 1, 1),
            InvertedResidual(8, 16, 2, 4),
            InvertedResidual(16, 16, 1, 4),
            conv_norm(16, 64, 1),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))


class SqueezeExcitation(nn.Module):
    """A gate on each channel, from the mean of all channels."""

    def __init__(
        self,
        channels: int,
        squeeze: int,
        activation: Callable[..., nn.Module] = nn.ReLU,
        scale_activation: Callable[..., nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.activation = activation()
        self.scale_activation = scale_activation()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.avgpool(x)
        scale = self.activation(self.fc1(scale))
        scale = self.scale_activation(self.fc2(scale))
        return scale * x


class MobileNetV3Block(nn.Module):
    """The inverted residual block of MobileNetV3."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, stride: int, se: bool, hardswish: bool
    ) -> None:
        super().__init__()
        activation = nn.Hardswish if hardswish else nn.ReLU
        layers: list[nn.Module] = []
        if hidden != inputs:
            layers.append(conv_norm(inputs, hidden, 1, activation=activation))
        layers.append(conv_norm(hidden, hidden, 3, stride, groups=hidden, activation=activation))
        if se:
            layers.append(SqueezeExcitation(hidden, 8, scale_activation=nn.Hardsigmoid))
        layers.append(conv_norm(hidden, outputs, 1, activation=None))
        self.block = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result += x
        return result


class MobileNetV3(nn.Module):
    """A network with squeeze-excitation and hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm(3, 16, stride=2, activation=nn.Hardswish),
            MobileNetV3Block(16, 16, 16, 1, se=True, hardswish=False),
            MobileNetV3Block(16, 48, 24, 2, se=False, hardswish=False),
            MobileNetV3Block(24, 64, 24, 1, se=True, hardswish=True),
            conv_norm(24, 64, 1, activation=nn.Hardswish),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(64, 48),
            nn.Hardswish(inplace=True),
            nn.Dropout(0.2, inplace=True),
            nn.Linear(48, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Return the channels with those of the groups interleaved."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, channels, height, width)


class ShuffleBlock(nn.Module):
    """The block of ShuffleNetV2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        half = outputs // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
                nn.BatchNorm2d(inputs),
                nn.Conv2d(inputs, half, 1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(inplace=True),
            )
        self.branch2 = nn.Sequential(
            nn.Conv2d(inputs if stride > 1 else half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNetV2(nn.Module):
    """A network of shuffled halves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_norm(3, 16, stride=2, activation=nn.ReLU)
        self.stage2 = nn.Sequential(ShuffleBlock(16, 32, 2), ShuffleBlock(32, 32, 1), ShuffleBlock(32, 32, 1))
        self.conv5 = conv_norm(32, 64, 1, activation=nn.ReLU)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5(self.stage2(self.conv1(x)))
        x = x.mean([2, 3])
        return self.fc(x)


# ---------------------------------------------------------------------------------------------------------
# RegNet, ConvNeXt, EfficientNet


class RegNetBlock(nn.Module):
    """The residual bottleneck of RegNet, with group convolution and squeeze-excitation."""

    def __init__(self, inputs: int, outputs: int, stride: int, group_width: int) -> None:
        super().__init__()
        self.proj = None
        if inputs != outputs or stride != 1:
            self.proj = conv_norm(inputs, outputs, 1, stride, activation=None)
        self.a = conv_norm(inputs, outputs, 1, activation=nn.ReLU)
        self.b = conv_norm(outputs, outputs, 3, stride, groups=outputs // group_width, activation=nn.ReLU)
        self.se = SqueezeExcitation(outputs, outputs // 4)
        self.c = conv_norm(outputs, outputs, 1, activation=None)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.proj is None else self.proj(x)
        return self.activation(skip + self.c(self.se(self.b(self.a(x)))))


def regnet() -> nn.Module:
    """Return a RegNet."""
    return nn.Sequential(
        OrderedDict(
            [
                ("stem", conv_norm(3, 16, stride=2, activation=nn.ReLU)),
                ("block1", RegNetBlock(16, 32, 2, 8)),
                ("block2", RegNetBlock(32, 32, 1, 8)),
                ("block3", RegNetBlock(32, 64, 2, 8)),
                ("avgpool", nn.AdaptiveAvgPool2d((1, 1))),
                ("flatten", nn.Flatten(start_dim=1)),
                ("fc", nn.Linear(64, CLASSES)),
            ]
        )
    )


def stochastic_depth(x: Tensor, p: float, training: bool) -> Tensor:
    """Drop whole rows of the batch in training."""
    if not training or p == 0.0:
        return x
    survival = 1.0 - p
    noise = torch.empty([x.shape[0]] + [1] * (x.ndim - 1), dtype=x.dtype, device=x.device)
    noise = noise.bernoulli_(survival)
    noise.div_(survival)
    return x * noise


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Permute(nn.Module):
    """A permutation of the dimensions."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.dims)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution and a channels-last perceptron, scaled by layer."""

    def __init__(self, dim: int, p: float) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim, bias=True),
            Permute((0, 2, 3, 1)),
            nn.LayerNorm(dim, eps=1e-6),
            nn.Linear(dim, 4 * dim),
            nn.GELU(),
            nn.Linear(4 * dim, dim),
            Permute((0, 3, 1, 2)),
        )
        self.gamma = nn.Parameter(torch.full((dim, 1, 1), 0.5))
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        result = self.gamma * self.block(x)
        return x + stochastic_depth(result, self.p, self.training)


class ConvNeXt(nn.Module):
    """A convolutional network in the style of transformers."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 16, kernel_size=4, stride=4), LayerNorm2d(16, eps=1e-6)),
            nn.Sequential(ConvNeXtBlock(16, p), ConvNeXtBlock(16, p)),
            nn.Sequential(LayerNorm2d(16, eps=1e-6), nn.Conv2d(16, 32, kernel_size=2, stride=2)),
            nn.Sequential(ConvNeXtBlock(32, p)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(LayerNorm2d(32, eps=1e-6), nn.Flatten(1), nn.Linear(32, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)))


class MBConv(nn.Module):
    """The inverted residual block of EfficientNet."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int, p: float) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(conv_norm(inputs, hidden, 1, activation=nn.SiLU))
        layers.append(conv_norm(hidden, hidden, 3, stride, groups=hidden, activation=nn.SiLU))
        layers.append(SqueezeExcitation(hidden, 8, activation=partial(nn.SiLU, inplace=True)))
        layers.append(conv_norm(hidden, outputs, 1, activation=None))
        self.block = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and inputs == outputs
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result = stochastic_depth(result, self.p, self.training)
            result += x
        return result


class EfficientNet(nn.Module):
    """A network of inverted residual blocks with squeeze-excitation and stochastic depth."""

    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm(3, 16, stride=2, activation=nn.SiLU),
            MBConv(16, 16, 1, 1, p),
            MBConv(16, 24, 2, 4, p),
            MBConv(24, 24, 1, 4, p),
            conv_norm(24, 64, 1, activation=nn.SiLU),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(p=0.2, inplace=True), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


# ---------------------------------------------------------------------------------------------------------
# Dense prediction


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    """Return two convolutions with batch norm and ReLU."""
    return nn.Sequential(
        conv3x3(inputs, outputs),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        conv3x3(outputs, outputs),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class Up(nn.Module):
    """An upsampling step of a U-Net, with the features of the way down joined."""

    def __init__(self, inputs: int, outputs: int, bilinear: bool) -> None:
        super().__init__()
        if bilinear:
            self.up: nn.Module = nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                nn.Conv2d(inputs, outputs, kernel_size=1),
            )
        else:
            self.up = nn.ConvTranspose2d(inputs, outputs, kernel_size=2, stride=2)
        self.conv = double_conv(2 * outputs, outputs)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        dy = x2.size()[2] - x1.size()[2]
        dx = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class UNet(nn.Module):
    """A U-Net."""

    def __init__(self, bilinear: bool = False) -> None:
        super().__init__()
        self.inc = double_conv(3, 8)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), double_conv(8, 16))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), double_conv(16, 32))
        self.up1 = Up(32, 16, bilinear)
        self.up2 = Up(16, 8, bilinear)
        self.outc = nn.Conv2d(8, 4, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x = self.up1(x3, x2)
        x = self.up2(x, x1)
        return self.outc(x)


class FCN(nn.Module):
    """A segmentation network with dilated convolutions, of outputs by name, with an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {
                "layer1": conv_norm(3, 16, stride=2, activation=nn.ReLU),
                "layer2": conv_norm(16, 32, stride=2, activation=nn.ReLU),
                "layer3": nn.Sequential(
                    nn.Conv2d(32, 32, 3, padding=2, dilation=2), nn.BatchNorm2d(32), nn.ReLU()
                ),
            }
        )
        self.classifier = self._head(32)
        self.aux_classifier = self._head(32)

    @staticmethod
    def _head(inputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, inputs // 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(inputs // 4),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(inputs // 4, 4, 1),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = x.shape[-2:]
        features = {}
        for name, layer in self.backbone.items():
            x = layer(x)
            features[name] = x
        out = self.classifier(features["layer3"])
        aux = self.aux_classifier(features["layer2"])
        return {
            "out": F.interpolate(out, size=size, mode="bilinear", align_corners=False),
            "aux": F.interpolate(aux, size=size, mode="bilinear", align_corners=False),
        }


class ASPP(nn.Module):
    """A segmentation network with pooling at several rates, as in DeepLab."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16, stride=4, activation=nn.ReLU)
        self.convs = nn.ModuleList(
            [nn.Conv2d(16, 8, 3, padding=r, dilation=r, bias=False) for r in (1, 2, 3)]
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU())
        self.project = conv_norm(32, 16, 1, activation=nn.ReLU)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        x = self.stem(x)
        branches = [F.relu(conv(x)) for conv in self.convs]
        branches.append(F.interpolate(self.pool(x), size=x.shape[-2:], mode="nearest"))
        x = self.head(self.project(torch.cat(branches, dim=1)))
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class FPN(nn.Module):
    """A feature pyramid with a head that is shared by the levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [conv_norm(a, b, stride=2, activation=nn.ReLU) for a, b in ((3, 16), (16, 24), (24, 32))]
        )
        self.lateral = nn.ModuleList([nn.Conv2d(c, 16, 1) for c in (16, 24, 32)])
        self.smooth = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)])
        self.head = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        last = self.lateral[-1](features[-1])
        results = [self.smooth[-1](last)]
        for i in (1, 0):
            last = self.lateral[i](features[i]) + F.interpolate(
                last, size=features[i].shape[-2:], mode="nearest"
            )
            results.insert(0, self.smooth[i](last))
        return [self.head(r) for r in results]


class ConvAutoencoder(nn.Module):
    """A convolutional autoencoder with a sigmoid at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 3, 3, stride=2, padding=1, output_padding=1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class VariationalAutoencoder(nn.Module):
    """A variational autoencoder on flat inputs, which samples in training."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 32)
        self.mean = nn.Linear(32, 16)
        self.log_variance = nn.Linear(32, 16)
        self.fc3 = nn.Linear(16, 32)
        self.fc4 = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = F.relu(self.fc1(x.view(-1, 64)))
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean
        if self.training:
            code = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(code)))), mean, log_variance


class DCGenerator(nn.Module):
    """The generator of a DCGAN."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(32, 32, 4, 1, 0, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(True),
            nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z.view(z.size(0), -1, 1, 1))


# ---------------------------------------------------------------------------------------------------------
# Norms


class NormNet(nn.Module):
    """A small network around one kind of norm."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1 = first
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.norm2 = second
        self.fc = nn.Linear(32 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 4)
        return self.fc(x.reshape(x.shape[0], -1))


class AlexNet(nn.Module):
    """AlexNet with local response norm and grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, kernel_size=5, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(5, alpha=1e-2, k=2.0),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(5, alpha=1e-2, k=2.0),
            nn.Conv2d(32, 32, kernel_size=3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(32 * 9, 64), nn.ReLU(inplace=True), nn.Linear(64, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


ENTRIES: tuple[Entry, ...] = (
    entry("lenet", LeNet, images(28, 1), "cnn", (2,)),
    entry("lenet_log_softmax", lambda: LeNet(True), images(28, 1), "cnn", (2,)),
    entry("mlp", mlp, dense(2, 64), "mlp"),
    entry("mlp_batchnorm_dropout", RegularizedMLP, dense(4, 64), "mlp"),
    entry("vgg_bn", VGG, images(), "cnn"),
    entry("vgg", lambda: VGG(False), images(), "cnn"),
    entry("alexnet_lrn", AlexNet, images(), "cnn", (2,)),
    entry("resnet_basic", lambda: ResNet(BasicBlock), images(), "cnn"),
    entry("resnet_bottleneck", lambda: ResNet(Bottleneck), images(), "cnn"),
    entry("resnet_preact", preact_resnet, images(), "cnn"),
    entry("resnet_pad_shortcut", pad_resnet, images(), "cnn"),
    entry("resnext", lambda: ResNet(Bottleneck, groups=8, width=4), images(), "cnn"),
    entry("wide_resnext", lambda: ResNet(Bottleneck, (1, 1, 1), groups=4, width=8), images(), "cnn"),
    entry("densenet", DenseNet, images(), "cnn"),
    entry("googlenet", GoogLeNet, images(), "cnn"),
    entry("squeezenet", squeezenet, images(), "cnn"),
    entry("mobilenet_v2", MobileNetV2, images(), "cnn"),
    entry("mobilenet_v3", MobileNetV3, images(), "cnn"),
    entry("shufflenet_v2", ShuffleNetV2, images(), "cnn"),
    entry("regnet", regnet, images(), "cnn"),
    entry("convnext", ConvNeXt, images(), "cnn"),
    entry("convnext_stochastic_depth", lambda: ConvNeXt(0.3), images(), "cnn"),
    entry("efficientnet", EfficientNet, images(), "cnn"),
    entry("unet", UNet, images(), "dense"),
    entry("unet_bilinear", lambda: UNet(bilinear=True), images(), "dense"),
    entry("fcn", FCN, images(), "dense"),
    entry("aspp", ASPP, images(), "dense"),
    entry("fpn", FPN, images(), "dense"),
    entry("autoencoder", ConvAutoencoder, images(), "dense"),
    entry("vae", VariationalAutoencoder, dense(2, 64), "dense"),
    entry("dcgan_generator", DCGenerator, dense(2, 32), "dense"),
    entry(
        "norm_local_response",
        lambda: NormNet(nn.LocalResponseNorm(3), nn.LocalResponseNorm(5)),
        images(),
        "cnn",
    ),
    entry("norm_group", lambda: NormNet(nn.GroupNorm(4, 16), nn.GroupNorm(8, 32)), images(), "cnn"),
    entry("norm_group_single", lambda: NormNet(nn.GroupNorm(1, 16), nn.GroupNorm(1, 32)), images(), "cnn"),
    entry(
        "norm_instance",
        lambda: NormNet(nn.InstanceNorm2d(16), nn.InstanceNorm2d(32, affine=True, track_running_stats=True)),
        images(),
        "cnn",
    ),
)
