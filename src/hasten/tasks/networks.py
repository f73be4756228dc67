"""Small networks of ordinary layers for the built-in tasks: images (batch, 1, 28, 28) → logits (batch, classes).

Their weights are drawn from torch's global generator: call `torch.manual_seed` first.
"""

from __future__ import annotations

from torch import Tensor, nn


def mlp(classes: int = 10) -> nn.Module:
    """784-128-64-classes with ReLU, 109,386 parameters for 10 classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, classes))


def small_cnn(classes: int = 10) -> nn.Module:
    """Four 3×3 convolutions with BatchNorm and ReLU, 98,762 parameters for 10 classes."""
    return nn.Sequential(
        *_conv(1, 32),
        *_conv(32, 32),
        nn.MaxPool2d(2),  # (batch, 32, 14, 14)
        *_conv(32, 64),
        nn.MaxPool2d(2),  # (batch, 64, 7, 7)
        *_conv(64, 120),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(120, classes),
    )


def resnet20(classes: int = 10) -> nn.Module:
    """ResNet-20 for small images, with a 1×1 convolution where the shape changes.

    He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2015, arXiv 1512.03385, section 4.2.
    """
    blocks = [
        Residual(before, after)
        for before, after in zip((16, 16, 16, 16, 32, 32, 32, 64, 64), (16, 16, 16, 32, 32, 32, 64, 64, 64), strict=True)
    ]
    return nn.Sequential(*_conv(1, 16), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


class Residual(nn.Module):
    """Two convolutions beside a short cut; half the height and width where the channels grow."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 1 if before == after else 2
        self.body = nn.Sequential(*_conv(before, after, stride), nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after))
        self.short: nn.Module = nn.Identity()
        if stride == 2:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.body(x) + self.short(x))
        return result


def _conv(before: int, after: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
