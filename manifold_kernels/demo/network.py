"""The residual network of He et al. (2016) for CIFAR, narrowed: three stages, each twice as wide on half the pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class Block(nn.Module):
    """Two convolutions with batch norm around a shortcut, which skips pixels and pads channels where sizes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = functional.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.padding))
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return torch.relu(x + shortcut)


class ResNet(nn.Module):
    """``6 blocks + 2`` layers: with three blocks a stage the shape of ResNet-20.

    Args:
        blocks: blocks in each of the three stages.
        width: channels of the first stage.
        classes: outputs.
    """

    def __init__(self, blocks: int = 3, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.bn = conv(1, width, stride=2), nn.BatchNorm2d(width)
        widths = [width * 2**stage for stage in range(3) for _ in range(blocks)]
        # Half the pixels wherever there are twice the channels.
        self.blocks = nn.Sequential(
            *(Block(a, b, stride=b // a) for a, b in zip([width, *widths[:-1]], widths, strict=True))
        )
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.linear(self.blocks(x).mean((2, 3)))  # type: ignore[no-any-return]
