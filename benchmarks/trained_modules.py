"""The classes of trained networks whose packages bring the weights, for `benchmarks/trained_networks.py` (`trained_modules.py:NAME`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Crepe(nn.Module):
    """Pitch from 1,024 samples: (batch, 1024) → (batch, 360).

    J. W. Kim et al.: CREPE: A Convolutional Representation for Pitch Estimation, 2018, arXiv 1802.06182.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        for i, (before, after) in enumerate(zip((1, *widths), widths, strict=False), start=1):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, (512 if i == 1 else 64, 1), (4 if i == 1 else 1, 1)))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(after, eps=0.0010000000474974513))
        self.classifier = nn.Linear(widths[-1] * 4, 360)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(F.relu(getattr(self, f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def crepe_tiny() -> Crepe:
    """0.49 million parameters."""
    return Crepe((128, 16, 16, 16, 32, 64))


def crepe_full() -> Crepe:
    """22 million parameters."""
    return Crepe((1024, 128, 128, 128, 256, 512))


class VoiceEncoder(nn.Module):
    """A voice from its mel spectrum: (batch, frames, 40) → (batch, 256).

    L. Wan et al.: Generalized End-to-End Loss for Speaker Verification, 2018, arXiv 1710.10467.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        found = F.relu(self.linear(self.lstm(mels)[1][0][-1]))
        return found / found.norm(dim=1, keepdim=True)


class Voice(nn.Module):
    """Whether 512 samples behind 64 older ones are speech: (batch, 576), state (batch, 2, 128) → (batch, 1), state."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1, self.conv2 = nn.Conv1d(129, 128, 3, padding=1), nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3, self.conv4 = nn.Conv1d(64, 64, 3, 2, 1), nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell, self.final_conv = nn.LSTMCell(128, 128), nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        real, imaginary = self.stft_conv(F.pad(x[:, None], (0, 64), mode="reflect")).chunk(2, 1)
        x = (real**2 + imaginary**2).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(conv(x))
        h, c = self.lstm_cell(x.squeeze(-1), (state[:, 0], state[:, 1]))
        return torch.sigmoid(self.final_conv(F.relu(h[..., None]))).squeeze(-1), torch.stack([h, c], 1)


def efficientnet_lite0() -> nn.Module:
    """4.65 million parameters, (batch, 3, 224, 224) → (batch, 1000). Needs the package efficientnet_lite_pytorch."""
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    return network
