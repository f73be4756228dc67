"""The time of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The time of a run, over all the processes that worked on it.

    Args:
        limit_s: None for no limit.
        elapsed_s: seconds since this process began.
        before_s: seconds of the processes before it.
    """

    limit_s: float | None
    elapsed_s: Callable[[], float]
    before_s: float = 0.0

    def left_s(self) -> float:
        """Seconds until the limit; negative when it is over, infinite without one."""
        return float("inf") if self.limit_s is None else self.limit_s - self.before_s - self.elapsed_s()
