"""The score: what must not be lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from hasten.core.data import Array, Views
from hasten.core.network import Arrays, Network


@runtime_checkable
class Score(Protocol):
    """A metric, higher is better. A frozen dataclass, like every method.

    Facts:
        name: as a person says it ("accuracy").
        unit: "pt" where the score is a share and a drop of 0.01 is one point, "" where it is not.
        target: what outputs are held against: the "labels", or the outputs of the "original" network.
        zero_one: every per-example value is 0 or 1.
    """

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def target(self) -> Literal["labels", "original"]: ...
    @property
    def zero_one(self) -> bool: ...

    def per_example(self, outputs: Arrays, target: Array) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """(n,) values whose mean is the score, or None for a set function."""
        ...

    def value(self, outputs: Arrays, target: Array) -> float:
        """The score of the whole set."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What the user brings: a network, data cut into views, and the score that must not be lost."""

    network: Network
    views: Views
    score: Score
