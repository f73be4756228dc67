"""The time of a run: what may be used, in words, and what is left."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hasten.core.errors import UsageError


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

    def used_s(self) -> float:
        """Seconds since the run began, as far as it ran."""
        return self.before_s + self.elapsed_s()

    def left_s(self) -> float:
        """Seconds until the limit; negative when it is over, infinite without one."""
        return float("inf") if self.limit_s is None else self.limit_s - self.used_s()


def parse_duration(words: float | str | None) -> float | None:
    """Seconds.

    >>> parse_duration("10m"), parse_duration("1h30m"), parse_duration(45), parse_duration(None)
    (600.0, 5400.0, 45.0, None)

    Raises:
        UsageError: on anything else, and on nothing at all.
    """
    if words is None:
        return None
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", str(words).strip())
    seconds = sum(float(n) * unit for n, unit in zip(found.groups("0"), (3600, 60, 1), strict=True)) if found else 0.0
    if not seconds > 0:
        raise UsageError(f"a time limit must look like 10m, 90s, 1h30m or a number of seconds above 0, got {words!r}")
    return seconds
