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


def resnet20(classes: int = 10, width: int = 16) -> nn.Module:
    """ResNet-20 for small images, of `width` to 4·width channels, with a 1×1 convolution where the shape changes.

    He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2015, arXiv 1512.03385, section 4.2.
    """
    plan = ((1, 1), (1, 1), (1, 1), (1, 2), (2, 2), (2, 2), (2, 4), (4, 4), (4, 4))  # (before, after) in widths
    blocks = [Residual(before * width, after * width) for before, after in plan]
    return nn.Sequential(*_conv(1, width), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def resnet18(classes: int = 10, width: int = 64) -> nn.Module:
    """ResNet-18 for small images: four stages of two blocks, of `width`, 2·width, 4·width and 8·width channels; no pooling in front.

    He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2015, arXiv 1512.03385.
    """
    widths = [width * 2**stage for stage in range(4)]
    before = [width, *(w for stage in widths for w in (stage, stage))][:-1]
    blocks = [Residual(a, b) for a, b in zip(before, [w for stage in widths for w in (stage, stage)], strict=True)]
    return nn.Sequential(*_conv(1, width), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def mobilenet(classes: int = 10, width: int = 16) -> nn.Module:
    """Inverted residual blocks with depthwise convolutions and squeeze-and-excite, of `width` to 4·width channels.

    Howard et al.: Searching for MobileNetV3, 2019, arXiv 1905.02244.
    """
    plan = ((1, 1), (1, 2), (2, 2), (2, 2), (2, 4), (4, 4))  # (before, after) in widths; it halves the image where it grows
    blocks = [Inverted(a * width, b * width) for a, b in plan]
    last = nn.Sequential(nn.Conv2d(4 * width, 12 * width, 1, bias=False), nn.BatchNorm2d(12 * width), nn.Hardswish())
    return nn.Sequential(*_conv(1, width), *blocks, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12 * width, classes))


def lstm(classes: int = 10, hidden: int = 128) -> nn.Module:
    """Two LSTM layers that read an image row by row, and a linear layer on the last state."""
    return Rows(classes, hidden)


class Rows(nn.Module):
    """An image as a sequence of its rows: (batch, 1, 28, 28) → (batch, 28, 28)."""

    def __init__(self, classes: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(28, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(x.flatten(1, 2))
        result: Tensor = self.head(states[:, -1])
        return result


class Inverted(nn.Module):
    """Widen, filter each channel, weigh the channels, narrow; a short cut where the shape stays."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        wide, stride = 3 * before, 1 if before == after else 2
        self.widen = nn.Sequential(nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish())
        depthwise = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        self.filter = nn.Sequential(depthwise, nn.BatchNorm2d(wide), nn.Hardswish())
        squeeze = max(8, wide // 4)
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, squeeze, 1), nn.ReLU(), nn.Conv2d(squeeze, wide, 1), nn.Hardsigmoid()
        )
        self.narrow = nn.Sequential(nn.Conv2d(wide, after, 1, bias=False), nn.BatchNorm2d(after))
        self.same = before == after

    def forward(self, x: Tensor) -> Tensor:
        y = self.filter(self.widen(x))
        narrowed: Tensor = self.narrow(y * self.weigh(y))
        return x + narrowed if self.same else narrowed


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
