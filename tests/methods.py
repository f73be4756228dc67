"""Stand-ins for methods: steps and engines that do next to nothing, for tests of what is around them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Profile, Space, Stage, Step


@dataclass(frozen=True, kw_only=True)
class Shrink:
    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = False
    amount: float = 0.5
    layers: tuple[str, ...] = ()

    def apply(self, network: Network, context: Context) -> Network:
        return network

    @classmethod
    def space(cls, network: Network) -> Space:
        return {"amount": (0.5, 0.75)}


@dataclass(frozen=True, kw_only=True)
class Mend:
    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.TRAIN
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"score"})
    reads_profile: ClassVar[bool] = False
    epochs: int = 1

    def apply(self, network: Network, context: Context) -> Network:
        return network

    @classmethod
    def space(cls, network: Network) -> Space:
        return {"epochs": (1, 5)}


@dataclass(frozen=True, kw_only=True)
class Round:
    takes: ClassVar[Kind] = "graph"
    stage: ClassVar[Stage] = Stage.NUMBERS
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = True
    bits: int = 8

    def apply(self, network: Network, context: Context) -> Network:
        return network

    @classmethod
    def space(cls, network: Network) -> Space:
        return {"bits": (8, 4)}


@dataclass(frozen=True, kw_only=True)
class Cast(Round):
    """Another number format; its name comes before the other's."""


@dataclass(frozen=True, kw_only=True)
class Gentle(Round):
    """Rounds less of it."""

    instead_of: ClassVar[type[Step]] = Round
    floats: float = 0.1

    @classmethod
    def space(cls, network: Network) -> Space:
        return {"floats": (0.1, 0.3)}


@dataclass(frozen=True, kw_only=True)
class Ready(Mend):
    """Trains for the rounding that follows."""

    reads_profile: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Slow:
    takes: ClassVar[Kind] = "module"
    aims: ClassVar[frozenset[Aim]] = frozenset()
    threads: int = 0

    @property
    def lossless(self) -> bool:
        return True

    @property
    def profile(self) -> Profile:
        return Profile()

    def available(self) -> str | None:
        return None

    def space(self) -> Space:
        return {"threads": (0, 1)}

    def pack(self, network: Network, folder: Path) -> None:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Quick(Slow):
    takes: ClassVar[Kind] = "graph"
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed"})


@dataclass(frozen=True, kw_only=True)
class Quicker(Quick):
    @property
    def profile(self) -> Profile:
        return Profile(integer_ops=frozenset({"Conv"}), weight_bits=7)


@dataclass(frozen=True, kw_only=True)
class Crashing(Quick):
    def pack(self, network: Network, folder: Path) -> None:
        (folder / "load.py").write_text("import os\n\ndef load(folder):\n    os.abort()\n")


@dataclass(frozen=True, kw_only=True)
class Hanging(Quick):
    """Answers nothing within any deadline."""

    def pack(self, network: Network, folder: Path) -> None:
        (folder / "load.py").write_text("import time\n\ndef load(folder):\n    time.sleep(3600)\n")


@dataclass(frozen=True, kw_only=True)
class Guessing(Quick):
    """The fastest engine there is: its answers have the right shape and nothing else."""

    def pack(self, network: Network, folder: Path) -> None:
        (folder / "load.py").write_text("import numpy\n\ndef load(folder):\n    return lambda x: (numpy.ones((len(x), 10), 'f'),)\n")


@dataclass(frozen=True, kw_only=True)
class Short(Quick):
    """Gives too few numbers."""

    def pack(self, network: Network, folder: Path) -> None:
        (folder / "load.py").write_text("import numpy\n\ndef load(folder):\n    return lambda x: (numpy.ones((len(x), 9), 'f'),)\n")
