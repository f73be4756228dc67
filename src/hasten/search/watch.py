"""What a search tells while it works."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hasten.core.report import Trial


@dataclass(frozen=True, kw_only=True)
class Event:
    """One sign of life.

    Args:
        stage: "load", "search", "heat", "ablation", "proof" or "timing".
        words: what is being done.
        elapsed_s: since the start; left_s: an estimate of the rest, None while there is nothing to estimate from.
        best: the best so far, in words.
        trial: the trial that has just ended, if one has.
    """

    stage: str
    words: str
    elapsed_s: float
    left_s: float | None
    best: str | None = None
    trial: Trial | None = None


Watcher = Callable[[Event], None]


def nobody(event: Event) -> None:
    """Watches nothing."""
    del event


@dataclass(kw_only=True)
class Watch:
    """Turns progress into events with the time left.

    Args:
        watcher: who is told.
        expected_trials: a guess, for the time left.
        finals_s: a guess of what follows the last trial.
    """

    watcher: Watcher = nobody
    expected_trials: int = 20
    finals_s: float = 60.0
    best: str | None = None
    _start: float = field(default_factory=time.monotonic)
    _stage: str = "load"
    _stage_start: float = 0.0
    _ended: int = 0
    _spent_s: float = 0.0

    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def stage(self, name: str, words: str) -> None:
        """A new stage begins."""
        self._stage, self._stage_start = name, self.elapsed_s()
        self._tell(words, self._search_left() if name == "search" else None)

    def progress(self, share: float, words: str) -> None:
        """The share, in [0, 1], of what the stage does now."""
        left = self._search_left()
        if self._stage != "search":
            spent = self.elapsed_s() - self._stage_start
            left = spent * (1 - share) / share if share > 0 else None
        self._tell(words, left)

    def ended(self, trial: Trial, seconds: float) -> None:
        """A trial has ended after `seconds` in this process."""
        self._ended += 1
        self._spent_s += seconds
        outcome = "done" if trial.state == "finished" else f"refused: {trial.reason}"
        self._tell(f"{trial.words}: {outcome}", self._search_left(), trial)

    def _search_left(self) -> float | None:
        if not self._ended:
            return None
        remaining = max(self.expected_trials - self._ended, 1)
        return remaining * self._spent_s / self._ended + self.finals_s

    def _tell(self, words: str, left_s: float | None, trial: Trial | None = None) -> None:
        self.watcher(Event(stage=self._stage, words=words, elapsed_s=self.elapsed_s(), left_s=left_s, best=self.best, trial=trial))
