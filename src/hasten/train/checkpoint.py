"""Putting a training on disk in the middle, and taking it up again to the same bytes.

A checkpoint is a folder `step-000000123` with `state.pt` and a manifest of SHA-256 digests; it appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten.core import folder as disk
from hasten.core.data import View
from hasten.core.errors import StorageError, UsageError
from hasten.train.settings import Fit

_STATE = "state.pt"


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often a training is put on disk.

    The same training started again goes on from the newest whole checkpoint; one that is finished comes back at once.

    Args:
        folder: of this training alone.
        steps: between two checkpoints, >= 1, or None to go by the clock alone.
        seconds: between two checkpoints, >= 0.
        last: how many are kept, >= 2, so that a damaged one has one before it.

    Raises:
        UsageError: on a value outside its range.
    """

    folder: Path | str
    steps: int | None = None
    seconds: float = 60.0
    last: int = 2

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"steps must be at least 1 or None, got {self.steps}")
        if not self.seconds >= 0:
            raise UsageError(f"seconds must be at least 0, got {self.seconds}")
        if self.last < 2:
            raise UsageError(f"last must be at least 2, got {self.last}")

    def due(self, step: int, waited: float) -> bool:
        """Whether one is due, `waited` seconds after the last."""
        return waited >= self.seconds or (self.steps is not None and step % self.steps == 0)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes one and removes those that are too old."""
        with disk.new_folder(self._place / f"step-{step:09}") as fresh:
            torch.save(state, fresh / _STATE)
        for old in self._found()[: -self.last]:
            shutil.rmtree(old, ignore_errors=True)

    def forget(self, *, after: int) -> None:
        """Removes those of steps behind this one: the training went back and goes another way."""
        for place in self._found():
            if int(place.name.removeprefix("step-")) > after:
                shutil.rmtree(place, ignore_errors=True)

    def newest(self) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
        """The newest state that is whole, or None, and a sentence on each damaged one that was passed over.

        Raises:
            StorageError: there are checkpoints, and every one of them is damaged.
        """
        told: list[str] = []
        for place in reversed(self._found()):
            if disk.intact(place):
                state: dict[str, Any] = torch.load(place / _STATE, map_location="cpu", weights_only=True)
                return state, tuple(told)
            told.append(f"the checkpoint {place.name} is damaged and was passed over for the one before")
        if told:
            raise StorageError(f"every checkpoint in {self._place} is damaged; remove the folder to start anew")
        return None, ()

    def lock(self) -> disk.Lock:
        """Holds the folder and removes what a killed process left half saved. Raises RunLocked where another process holds it."""
        held = disk.Lock(self._place)
        for half in self._place.glob(".step-*.part"):
            shutil.rmtree(half, ignore_errors=True)
        return held

    @property
    def _place(self) -> Path:
        return Path(self.folder)

    def _found(self) -> list[Path]:
        return sorted(p for p in self._place.glob("step-*") if p.is_dir())


def identity(settings: Fit, module: nn.Module, data: Any) -> str:
    """A digest of all that decides the result of a training but the first weights."""
    shapes = [(name, tuple(value.shape), str(value.dtype)) for name, value in module.state_dict().items()]
    plan = re.sub(r" at 0x[0-9a-f]+", "", str(settings))  # functions show where they lie in memory
    of = data.fingerprint() if isinstance(data, View) else type(data).__qualname__
    return hashlib.sha256(f"{plan}{shapes}{of}".encode()).hexdigest()
