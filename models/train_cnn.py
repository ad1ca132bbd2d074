"""A small convolutional network that names the digit in the middle of a cluttered 16x16 picture.

A 3x3 stem, then three inverted residual blocks (1x1 widening, 3x3 depthwise, 1x1 narrowing, plus the block's input)
with 3x3 convolutions of stride 2 between them, a 1x1 convolution, the mean over the last 4x4 map and a linear head.
Every convolution has its BatchNormalization behind it, not folded in the file; ReLU6 follows all but the narrowing
ones. Normalization gains start widely spread, so channels differ in range as they do in large mobile networks.

`python -m models.train_cnn` makes the file and this card anew.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from models.training import Plan, prepare_torch, publish, train

NAME = "cnn_digits"
PLAN = Plan(epochs=16, peak_rate=4e-3, batch=128)


def conv(inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1, relu6: bool = True) -> nn.Sequential:
    """Convolution without bias, BatchNormalization and, if asked, ReLU6."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)),
        ("bn", nn.BatchNorm2d(outputs)),
    ]
    return nn.Sequential(OrderedDict([*layers, ("act", nn.ReLU6())] if relu6 else layers))


class InvertedResidual(nn.Module):
    """Widen 1x1, depthwise 3x3, narrow 1x1, plus the input: [N, width, H, W] to the same."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.widen = conv(width, hidden, 1)
        self.depthwise = conv(hidden, hidden, 3, groups=hidden)
        self.narrow = conv(hidden, width, 1, relu6=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(self.depthwise(self.widen(x)))


class ConvolutionalNetwork(nn.Module):
    """Logits [N, 10] of pictures x [N, 1, 16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 16, 3)
        self.block1 = InvertedResidual(16, 64)
        self.down1 = conv(16, 32, 3, stride=2)
        self.block2 = InvertedResidual(32, 128)
        self.down2 = conv(32, 64, 3, stride=2)
        self.block3 = InvertedResidual(64, 192)
        self.top = conv(64, 128, 1)
        self.pool = nn.AvgPool2d(4)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block1(self.stem(x))
        x = self.block2(self.down1(x))
        x = self.top(self.block3(self.down2(x)))
        return self.head(self.pool(x).flatten(1))


def main() -> None:
    prepare_torch(PLAN)
    publish(train(ConvolutionalNetwork(), PLAN), PLAN, name=NAME, text=__doc__)


if __name__ == "__main__":
    main()
