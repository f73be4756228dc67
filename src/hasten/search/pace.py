"""How fast a training gets on: told by its progress, so that one which cannot end in time is stopped when that is plain."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from hasten.core.errors import ChildFailed
from hasten.core.recipe import Step

_LOOK_S = 4.0  # before the pace is believed
_LATE = 1.25  # times the time there is


def trains(step: Step) -> bool:
    """Whether a step wins score back by passes over the data."""
    return hasattr(step, "epochs") and step.aims == {"score"}


class Pace:
    """Passes progress on and takes its pace; where several steps of a recipe report, that of the last one.

    Args:
        tell: is told the progress.
        deadline_s: from now, for all of it.
        clock: seconds.
    """

    def __init__(
        self, tell: Callable[[float, str], None] | None, *, deadline_s: float = math.inf, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.whole_s: float | None = None
        self._tell, self._clock, self._deadline_s = tell, clock, deadline_s
        self._begin = clock()
        self._first = (0.0, math.inf)  # when the step first reported, and the share of it that was done by then

    def __call__(self, share: float, words: str) -> None:
        """Takes note of the progress. Raises ChildFailed where the rest cannot be done in time."""
        now = self._clock()
        if share < self._first[1]:
            self._first = now, share
        elif share > self._first[1]:
            self.whole_s = (now - self._first[0]) / (share - self._first[1])
            left_s = self._deadline_s - (now - self._begin)
            if now - self._first[0] >= _LOOK_S and (1 - share) * self.whole_s > _LATE * left_s:
                raise ChildFailed(f"it would take about {self.whole_s:.0f} s, more than there was: stopped")
        if self._tell:
            self._tell(share, words)
