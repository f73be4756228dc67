"""Audio front ends: Fourier transforms, windows, the mel matrix. Complex numbers are pairs along the last axis."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.errors import Unsupported
from hasten.load.importer.table import Call, Either, Known, bounded, constants, operator
from hasten.load.importer.types import kind


@operator("DFT")
def _dft(
    x: Tensor,
    length: Known | None = None,
    axis_: Known | None = None,
    *,
    call: Call,
    axis: int | None = None,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """Along one axis; the half spectrum of real values, or back from it."""
    default = 1 if call.opset < 20 else -2
    over = int(axis_.reshape(-1)[0]) if axis_ is not None else default if axis is None else axis
    over = over % x.dim()
    size = None if length is None else constants(length, "lengths")[0]
    real = x.shape[-1] == 1
    if inverse and onesided:
        count = size or 2 * (x.shape[over] - 1)
        whole: Tensor = torch.fft.irfft(torch.view_as_complex(x.contiguous()), count, over)
        return whole.unsqueeze(-1)
    if onesided:
        if not real:
            raise Unsupported("expected real values for half a spectrum, got complex ones")
        return torch.view_as_real(torch.fft.rfft(x.squeeze(-1), size, over))
    values = x.squeeze(-1) if real else torch.view_as_complex(x.contiguous())
    return torch.view_as_real((torch.fft.ifft if inverse else torch.fft.fft)(values, size, over))


@operator("STFT")
def _stft(signal: Tensor, step: Known, window: Either = None, length: Known | None = None, *, call: Call, onesided: int = 1) -> Tensor:
    """Frames times the window, as one product with a constant matrix of sines and cosines."""
    hop = constants(step, "steps")[0]
    size = constants(length, "lengths")[0] if length is not None else int(window.shape[0])
    x = signal if signal.dim() == 2 else signal.squeeze(-1) if signal.shape[-1] == 1 else torch.view_as_complex(signal.contiguous())
    frames = x.unfold(1, size, hop)
    if window is not None:
        weights = call.tensor(window)
        gap = size - int(weights.shape[0])
        frames = frames * (F.pad(weights, [gap // 2, gap - gap // 2]) if gap else weights)
    found = torch.fft.rfft(frames) if onesided and not frames.is_complex() else torch.fft.fft(frames)
    return torch.view_as_real(found[..., : size // 2 + 1] if onesided else found)


def _window(name: str, *terms: float) -> None:
    def window(size: Known, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
        count = constants(size, "sizes")[0]
        bounded([count])
        turn = 2 * np.pi * np.arange(count) / max(count if periodic else count - 1, 1)
        found = sum((-1) ** i * a * np.cos(i * turn) for i, a in enumerate(terms))
        return torch.tensor(np.asarray(found).tolist(), dtype=torch.float64).to(kind(output_datatype))

    operator(name)(window)


_window("HannWindow", 0.5, 0.5)
_window("HammingWindow", 25 / 46, 21 / 46)
_window("BlackmanWindow", 0.42, 0.5, 0.08)


@operator("MelWeightMatrix")
def _mel(bins: Known, length: Known, rate: Known, low: Known, high: Known, *, output_datatype: int = 1) -> Tensor:
    """Triangles on the mel scale: (frequencies, bins)."""
    count, size = int(bins.reshape(-1)[0]), int(length.reshape(-1)[0])
    bounded([count, size])
    ends = [2595 * math.log10(1 + float(v.reshape(-1)[0]) / 700) for v in (low, high)]
    mels = np.arange(count + 2) * (ends[1] - ends[0]) / (count + 2) + ends[0]
    edges = np.floor((size + 1) * 700 * (10 ** (mels / 2595) - 1) / int(rate.reshape(-1)[0])).astype(int)
    made = np.zeros((size // 2 + 1, count))
    for i, (a, b, c) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        if a == b:
            made[b, i] = 1
        else:
            made[a : b + 1, i] = (np.arange(a, b + 1) - a) / (b - a)
        if c > b:
            made[b:c, i] = (c - np.arange(b, c)) / (c - b)
    return torch.tensor(made.tolist(), dtype=torch.float64).to(kind(output_datatype))
