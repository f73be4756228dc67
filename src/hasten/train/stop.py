"""When a training ends, beside the end of its epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hasten.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The first of these that holds ends the training; None and 0 ask for nothing.

    Args:
        steps: of the optimizer, >= 1; the schedule is planned for them in the place of `epochs`.
        seconds: on the clock, > 0, resumed time included; looked at after each step.
        loss: the mean training loss of a whole pass is at most this.
        change: the mean training loss of a pass differs from that of the pass before by at most this share of it, >= 0.
        patience: so many looks at the validation data in a row brought no smaller loss, >= 1. The weights of the best look
            come back, also where another reason ended the training.
        every: passes between two looks, > 0.

    Raises:
        UsageError: on a value outside its range.
    """

    steps: int | None = None
    seconds: float | None = None
    loss: float | None = None
    change: float | None = None
    patience: int | None = None
    every: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "patience"):
            value = getattr(self, name)
            if value is not None and (value < 1 or value != int(value)):
                raise UsageError(f"{name} must be a whole number of at least 1, got {value}")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise UsageError(f"seconds must be a finite number above 0, got {self.seconds}")
        if self.loss is not None and not math.isfinite(self.loss):
            raise UsageError(f"loss must be a finite number, got {self.loss}")
        if self.change is not None and not 0 <= self.change < math.inf:
            raise UsageError(f"change must be a finite number of at least 0, got {self.change}")
        if not 0 < self.every < math.inf:
            raise UsageError(f"every must be a finite number of passes above 0, got {self.every}")

    def after_pass(self, means: list[float]) -> str | None:
        """Why the training ends, given the mean loss of every finished pass, or None.

        >>> Stop(loss=0.1).after_pass([0.5, 0.09])
        'the mean loss of a pass, 0.09, reached 0.1'
        """
        if self.loss is not None and means[-1] <= self.loss:
            return f"the mean loss of a pass, {means[-1]:.4g}, reached {self.loss:g}"
        if self.change is not None and len(means) > 1 and abs(means[-2] - means[-1]) <= self.change * abs(means[-2]):
            return f"the mean loss of a pass changed by at most {self.change:g} of itself, to {means[-1]:.4g}"
        return None

    def after_look(self, losses: list[float]) -> str | None:
        """Why the training ends, given the loss at every look at the validation data, or None."""
        waited = len(losses) - 1 - losses.index(min(losses))
        if self.patience is not None and waited >= self.patience:
            return f"{waited} looks at the validation data brought nothing better than {min(losses):.4g}"
        return None
