"""The same rules on tensors, where no kernel is: any device, any floating type. On a CPU in pieces that stay in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from hasten.train.optim.source import BLOCK, LEAST_SCALE, LEVELS, ODD, Form

PIECE = 1 << 16  # elements; 256 kB in float32, a multiple of BLOCK
_MASK = 0xFFFFFFFF


def run(form: Form, arrays: Sequence[Tensor], numbers: Sequence[float], seed: int, sums: dict[str, float]) -> None:
    """One step of one tensor. `arrays` are flat and in the order of `form`, the scales behind; adds to `sums`."""
    flags = {name: value for name, value in form.flags if name != "maximize"}
    h = SimpleNamespace(**dict(zip(form.numbers, numbers, strict=True)), **flags)
    count = arrays[0].numel()
    piece = PIECE if arrays[0].device.type == "cpu" else max(count, 1)
    scales, storages = iter(arrays[len(form.arrays) :]), [storage for _, storage in form.arrays]
    stored = [
        _Array(storage, a, next(scales) if storage in LEVELS else None)
        for storage, a in zip(storages, arrays[: len(storages)], strict=True)
    ]
    for start in range(0, count, piece):
        x = SimpleNamespace(sums={})
        given = {}
        for (name, _), a in zip(form.arrays, stored, strict=True):
            given[name] = a.load(slice(start, start + piece))
        if dict(form.flags).get("maximize"):
            given["g"] = -given["g"]
        x.__dict__.update(given)
        form.rule(x, h)
        for order, ((name, storage), a) in enumerate(zip(form.arrays, stored, strict=True)):
            value = getattr(x, name)
            if value is not given[name] or storage in LEVELS:
                a.store(slice(start, start + piece), value, None if name == "p" else (order, seed))
        for name, value in x.sums.items():
            sums[name] = sums.get(name, 0.0) + value.sum(dtype=torch.float64).item()


class _Array:
    """A flat tensor as it is stored, read and written in single precision (double where it is double)."""

    def __init__(self, storage: str, data: Tensor, scale: Tensor | None) -> None:
        self.storage, self.data, self.scale = storage, data, scale

    def load(self, where: slice) -> Tensor:
        data = self.data[where]
        if self.scale is None:
            return data.float() if data.dtype in (torch.bfloat16, torch.float16) else data
        value = data.float() * _spread(self._scales(where) / LEVELS[self.storage], len(data))
        return value if self.storage == "signed" else value * value

    def store(self, where: slice, value: Tensor, noise: tuple[int, int] | None) -> None:
        if self.scale is not None:
            assert noise is not None
            self._pack(where, value, noise)
        elif self.storage == "bfloat16" and noise is not None:
            bits = value.float().view(torch.int32).long() & _MASK
            more = _noise(where.start, len(value), *noise, value.device)
            narrow = (((bits + more) & 0xFFFF0000) ^ 0x80000000) - 0x80000000
            rounded = narrow.to(torch.int32).view(torch.float32)
            self.data[where].copy_(torch.where(value.isfinite(), rounded, value))
        else:
            self.data[where].copy_(value)

    def _scales(self, where: slice) -> Tensor:
        assert self.scale is not None
        return self.scale[where.start // BLOCK : -(-min(where.stop, len(self.data)) // BLOCK)]

    def _pack(self, where: slice, value: Tensor, noise: tuple[int, int]) -> None:
        levels = LEVELS[self.storage]
        blocks = torch.nn.functional.pad(value.abs(), (0, -len(value) % BLOCK)).view(-1, BLOCK)
        peak = blocks.amax(dim=1)
        scale = (peak.sqrt() if self.storage == "square" else peak) + (blocks * 0).sum(dim=1)
        grid = _spread(torch.where(scale > LEAST_SCALE, levels / scale, 0.0), len(value))
        u = _noise(where.start, len(value), *noise, value.device) / 65536.0
        level = torch.floor((value.sqrt() if self.storage == "square" else value) * grid + u.to(value.dtype))
        least = (value > 0).to(value.dtype) if self.storage == "square" else torch.full_like(value, -127.0)
        level = torch.minimum(torch.maximum(level, least), torch.full_like(value, levels))
        self._scales(where).copy_(scale)
        self.data[where].copy_(torch.nan_to_num(level))


def _spread(scales: Tensor, count: int) -> Tensor:
    return scales.repeat_interleave(BLOCK)[:count]


def _noise(start: int, count: int, order: int, seed: int, device: torch.device) -> Tensor:
    """16 random bits for each element, as `source.py` writes them."""
    return ((torch.arange(start, start + count, device=device) * ODD[order % 4] + seed) & _MASK) >> 16
