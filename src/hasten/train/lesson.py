"""What a training learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hasten.train.objective import Objective
from hasten.train.outputs import Tensors
from hasten.train.source import Source

Look = Callable[[], tuple[float, float | None]]
"""Loss and accuracy on the validation data."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """What a run learns from.

    Args:
        source: of the batches.
        aim: the loss.
        generator: of every draw that is ours; the source shares it.
        example: a few rows of the inputs.
        look: at the validation data, or None without.
        examples: in the data, 0 where that is not known.
    """

    source: Source
    aim: Objective
    generator: torch.Generator
    example: Tensors
    look: Look | None = None
    examples: int = 0
