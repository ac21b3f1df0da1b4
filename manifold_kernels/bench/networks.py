"""The layers of residual networks, one after the other: their weights are what a step sees, nobody runs them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def conv(inputs: int, outputs: int, height: int, width: int | None = None) -> nn.Conv2d:
    """A convolution without bias, square where ``width`` is left out."""
    return nn.Conv2d(inputs, outputs, (height, width or height), bias=False)


def resnet18() -> nn.Module:
    """The 20 convolutions of ResNet-18 for ImageNet (He et al. 2016): one 7x7, sixteen 3x3, three 1x1."""
    return nn.Sequential(conv(3, 64, 7), *_basic_blocks([64, 128, 256, 512], blocks=2))


def resnet20() -> nn.Module:
    """ResNet-20 for CIFAR with 1x1 projections in its shortcuts: 65 tensors, batch norms and linear layer included."""
    convolutions = [conv(3, 16, 3), *_basic_blocks([16, 32, 64], blocks=3)]
    normalised = (layer for of in convolutions for layer in (of, nn.BatchNorm2d(of.out_channels)))
    return nn.Sequential(*normalised, nn.Linear(64, 10))


def resnet50() -> nn.Module:
    """The 53 convolutions of ResNet-50 for ImageNet: one 7x7, sixteen 3x3, thirty-six 1x1."""
    layers = [conv(3, 64, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            if block == 0:
                layers.append(conv(inputs, 4 * width, 1))
            layers += [conv(inputs, width, 1), conv(width, width, 3), conv(width, 4 * width, 1)]
            inputs = 4 * width
    return nn.Sequential(*layers)


def _basic_blocks(widths: list[int], blocks: int) -> Iterator[nn.Conv2d]:
    inputs = widths[0]
    for width in widths:
        for _ in range(blocks):
            if inputs != width:
                yield conv(inputs, width, 1)
            yield conv(inputs, width, 3)
            yield conv(width, width, 3)
            inputs = width
