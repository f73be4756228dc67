"""What engines of modules share: threads, a float format, and that no Q/DQ graph reaches them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Profile, Space
from hasten.engines import settings
from hasten.engines.settings import Precision

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class ModuleEngine(ABC):
    """Packs modules and computes in their number format.

    Args:
        threads: of one operator; 0 for all cores.
    """

    takes: ClassVar[Kind] = "module"
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed"})
    threads: int = 0

    def __post_init__(self) -> None:
        settings.check(self.threads)

    @property
    def lossless(self) -> bool:
        """Whether it computes in the number format of the network."""
        return True

    @property
    def profile(self) -> Profile:
        """It takes modules; Q/DQ graphs do not reach it."""
        return Profile()

    @abstractmethod
    def available(self) -> str | None:
        """None if it runs here, else why not and what to install."""

    def space(self) -> Space:
        """Settings worth a try on this machine."""
        return {"threads": settings.thread_choices()}

    @abstractmethod
    def pack(self, network: Network, folder: Path) -> None:
        """Writes the network and `load.py` into the existing `folder`. Raises Unsupported."""


@dataclass(frozen=True, kw_only=True)
class FloatEngine(ModuleEngine):
    """The same in PyTorch, in a float format of one's choice.

    Args:
        threads: of one operator; 0 for all cores.
        precision: "bf16" turns weights, inputs and sums into bfloat16.
    """

    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        settings.check(self.threads, self.precision)

    @property
    def lossless(self) -> bool:
        """Whether it computes in the number format of the network."""
        return self.precision == "fp32"

    def available(self) -> str | None:
        """None if it runs here, else why not and what to install."""
        return settings.missing("torch", self.precision)

    def space(self) -> Space:
        """Threads and float formats worth a try on this machine."""
        return {**super().space(), "precision": settings.precision_choices()}

    def in_format(self, module: nn.Module) -> nn.Module:
        """The module, or a copy of it in bfloat16."""
        return copy.deepcopy(module).bfloat16() if self.precision == "bf16" else module

    def filled(self, template: str) -> str:
        """The text of a `load.py`: how an input goes in and an output comes out depends on the float format."""
        low = self.precision == "bf16"
        cast = ".bfloat16() if x.dtype.kind == 'f' else torch.from_numpy(x)" if low else ""
        output = "(o.float() if o.is_floating_point() else o).numpy()" if low else "o.numpy()"
        return template.format(threads=settings.resolve(self.threads), input=f"torch.from_numpy(x){cast}", output=output)
