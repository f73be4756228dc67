"""Rounding that can be trained through: weights and activations on the grids of `QuantizeStatic`, with learnt steps.

Each step is s = s₀·exp(p) with a learnt p that begins at 0, so that an optimizer moves it by shares of itself whatever its
size. Gradients pass straight through the rounding; that of a step is ∂v̂/∂s = round(v/s) − v/s inside the range and the integer
itself outside, times 1/√(count · largest integer).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
_LEAST = 2.0**-60  # below it values count as zero, as in `insert`
_SHARES = torch.linspace(1.0, 0.2, 41)


def straight(v: Tensor) -> Tensor:
    """round(v), with the gradient of v."""
    return v + (v.round() - v).detach()


def round_symmetric(v: Tensor, step: Tensor, top: int) -> Tensor:
    """step · clamp(round(v / step), −top, top); gradients reach v inside the range and the step everywhere."""
    return straight((v / step).clamp(-top, top)) * step


def best_step(weight: Tensor, top: int) -> Tensor:
    """For each row of `weight` (channels, others): the step with the least squared error of rounding to −top … top."""
    largest = weight.abs().amax(1)
    best, least = largest / top, torch.full_like(largest, math.inf)
    for share in _SHARES.to(weight):
        step = (share * largest / top).clamp_min(_LEAST)
        error = (round_symmetric(weight, step[:, None], top) - weight).square().sum(1)
        best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return best


class RoundedLayer(nn.Module):
    """A layer whose weights are rounded, one learnt step for each output channel.

    A step never grows so far that no weight of its channel reaches the largest integer. So the rounded weights have the range
    −top·s … top·s exactly, and rounding them by their largest value, as `QuantizeStatic` does, gives the same integers.
    """

    first: Tensor

    def __init__(self, layer: nn.Module, *, bits: int) -> None:
        super().__init__()
        self.layer, self.top = layer, 2 ** (bits - 1) - 1
        self.axis = 1 if isinstance(layer, TRANSPOSED) else 0  # ConvTranspose: (in, out / groups, …)
        first = best_step(self._rows(), self.top).detach()
        self.register_buffer("first", first)
        self.growth = nn.Parameter(torch.zeros_like(first))

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the layer gives with rounded weights."""
        made: Tensor = torch.func.functional_call(self.layer, {"weight": self.weight()}, inputs)
        return made

    def weight(self) -> Tensor:
        """The rounded weights."""
        rows = self._rows()
        rounded = round_symmetric(rows, self._step(rows)[:, None], self.top)
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return rounded.view(weight.movedim(self.axis, 0).shape).movedim(0, self.axis)

    def _rows(self) -> Tensor:
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return weight.movedim(self.axis, 0).flatten(1)

    def _step(self, rows: Tensor) -> Tensor:
        growth = _slowed(self.growth, rows[0].numel() * self.top)
        step = self.first * growth.exp()
        most = rows.detach().abs().amax(1) / (self.top - 0.49)
        held = torch.where(most > _LEAST, torch.minimum(step, most), torch.ones_like(step))
        return step + (held - step).detach()


class RoundedRange(nn.Module):
    """Rounds a tensor to 8 bits between learnt bounds, on the grid of `insert.scale_and_zero_point`.

    First it watches: it lets values through and remembers their range. From `start` on it rounds. A bound that is 0 stays 0.

    Args:
        symmetric: the zero point must be 0.
    """

    low: Tensor
    high: Tensor

    def __init__(self, *, symmetric: bool) -> None:
        super().__init__()
        self.symmetric, self.watching = symmetric, True
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.growth = nn.Parameter(torch.zeros(2))

    def start(self) -> bool:
        """Begins to round. False where only zeros were seen: then it lets everything through for good."""
        self.watching = not float(self.high - self.low) > _LEAST
        return not self.watching

    def bounds(self) -> tuple[float, float]:
        """(low, high) as learnt so far."""
        low, high = self._bounds(1)
        return float(low.detach()), float(high.detach())

    def forward(self, v: Tensor) -> Tensor:
        """The values, rounded."""
        if self.watching:
            self.low = torch.minimum(self.low, v.detach().amin())
            self.high = torch.maximum(self.high, v.detach().amax())
            return v
        low, high = self._bounds(v.numel() * 127)
        if self.symmetric and self.low < 0:
            return round_symmetric(v, high / 127, 127)
        step = (high - low) / 255
        zero = straight(-low / step)
        return ((straight(v / step) + zero).clamp(0, 255) - zero) * step

    def _bounds(self, count: int) -> tuple[Tensor, Tensor]:
        low_growth, high_growth = _slowed(self.growth, count).exp()
        if self.symmetric and self.low < 0:
            top = torch.maximum(-self.low, self.high) * high_growth
            return -top, top
        return self.low * low_growth, self.high * high_growth


def _slowed(growth: Tensor, count: int) -> Tensor:
    """The same value with its gradient ÷ √count."""
    share = 1 / math.sqrt(count)
    return growth * share + (growth * (1 - share)).detach()
