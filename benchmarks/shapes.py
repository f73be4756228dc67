"""Networks in the shapes that everyone knows, of ordinary layers, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A residual block of 1×1, 3×3 and 1×1 convolutions (He et al., 2015, arXiv 1512.03385)."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.body = nn.Sequential(*_conv(before, width, 1), nn.ReLU(), *_conv(width, width, 3, stride), nn.ReLU(), *_conv(width, after, 1))
        self.short = nn.Identity() if before == after and stride == 1 else nn.Sequential(*_conv(before, after, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.short(x))


def resnet50(channels: int = 3, classes: int = 1000) -> nn.Module:
    """ResNet-50: (batch, channels, height, width) → (batch, classes)."""
    layers: list[nn.Module] = [*_conv(channels, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    before = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for at in range(blocks):
            layers.append(Bottleneck(before, width, stride if at == 0 else 1))
            before = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class Inverted(nn.Module):
    """An inverted residual block with a depthwise convolution (Sandler et al., 2018, arXiv 1801.04381)."""

    def __init__(self, before: int, after: int, stride: int, widen: int) -> None:
        super().__init__()
        wide = before * widen
        self.body = nn.Sequential(
            *_conv(before, wide, 1), nn.ReLU6(), *_conv(wide, wide, 3, stride, wide), nn.ReLU6(), *_conv(wide, after, 1)
        )
        self.short = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.short else y


class Block(nn.Module):
    """A transformer's encoder layer, written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Any:  # (batch, tokens, width)
        n, tokens, width = x.shape
        q, k, v = (f(x).view(n, tokens, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        shares = torch.softmax(q @ k.transpose(-1, -2) / (width / self.heads) ** 0.5, dim=-1)
        x = self.first(x + self.out((shares @ v).transpose(1, 2).reshape(n, tokens, width)))
        return self.second(x + self.feed(x))


class Tokens(nn.Module):
    """Encoder layers between an embedding of the `side` rows of an image and a classifier."""

    def __init__(self, width: int, heads: int, layers: int, side: int) -> None:
        super().__init__()
        self.embed, self.last = nn.Linear(side, width), nn.Linear(width, 10)
        self.body = nn.Sequential(*(Block(width, heads) for _ in range(layers)))

    def forward(self, x: Tensor) -> Any:  # (batch, 1, side, side)
        return self.last(self.body(self.embed(x.flatten(1, 2))).mean(1))


def _conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(after)


def mobilenet_v2(first: int, plan: tuple[tuple[int, int, int, int], ...], last: int) -> nn.Module:
    """A MobileNetV2: (widening, channels, blocks, stride) per stage."""
    layers: list[nn.Module] = [*_conv(1, first, 3, 2 if last > 500 else 1), nn.ReLU6()]
    width = first
    for widen, channels, blocks, stride in plan:
        layers += [Inverted(channels if i else width, channels, 1 if i else stride, widen) for i in range(blocks)]
        width = channels
    return nn.Sequential(*layers, *_conv(width, last, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))


SMALL = ((4, 24, 2, 2), (4, 32, 2, 2), (4, 64, 2, 1))
V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
