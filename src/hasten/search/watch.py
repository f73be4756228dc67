"""What a search tells while it works."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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

    def to_json(self) -> dict[str, Any]:
        """A JSON object; seconds to a tenth."""
        left = None if self.left_s is None else round(self.left_s, 1)
        trial = self.trial.to_json() if self.trial else None
        return {**vars(self), "elapsed_s": round(self.elapsed_s, 1), "left_s": left, "trial": trial}


Watcher = Callable[[Event], None]


def nobody(event: Event) -> None:
    """Watches nothing."""
    del event


# What follows the search, in times of one plain trial (launching the unchanged network, scoring and timing it); at most so many
# seconds where the protocol has an end.
FINALS = {"heat": (15.0, None), "ablation": (15.0, None), "proof": (4.0, None), "timing": (50.0, 90.0)}

_TELLING = 0.1  # from this share of a stage on its own pace says more than the forecast


@dataclass(kw_only=True)
class Watch:
    """Turns progress into events with the time left.

    What is left of the search is a number of trials times the mean of those that ended. The number lies between two guesses: what
    searches usually take, and what this one would still ask for if nothing more paid.

    Args:
        watcher: who is told.
        expected_trials: what a search in this catalogue usually takes.
        coming: trials that it would still ask for, as far as can be foreseen; None if nobody has looked.
        ends_s: seconds from the start at which the time limit is over; None without one.
        best: the best so far, in words.
        clock: seconds from any beginning.
    """

    watcher: Watcher = nobody
    expected_trials: int = 20
    coming: float | None = None
    ends_s: float | None = None
    best: str | None = None
    clock: Callable[[], float] = time.monotonic
    _start: float = field(init=False)
    _stage: str = "load"
    _stage_start: float = 0.0
    _seconds: list[float] = field(default_factory=list)
    _plain: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._start = self.clock()

    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return self.clock() - self._start

    def stage(self, name: str, words: str) -> None:
        """A new stage begins."""
        self._stage, self._stage_start = name, self.elapsed_s()
        self._tell(words, self._left(0.0))

    def progress(self, share: float, words: str) -> None:
        """The share, in [0, 1], of what the stage does now."""
        self._tell(words, self._left(share))

    def ended(self, trial: Trial, seconds: float) -> None:
        """A trial has ended after `seconds` in this process; one that was remembered took what it took then."""
        took = max(seconds, trial.seconds)
        self._seconds.append(took)
        if not trial.recipe["steps"] and trial.measurement:
            self._plain.append(took)
        outcome = "done" if trial.state == "finished" else f"refused: {trial.reason}"
        self._tell(f"{trial.words}: {outcome}", self._left(0.0), trial)

    def _left(self, share: float) -> float | None:
        if self._stage not in ("search", *FINALS):
            return self._rest_of_stage(share)
        if not self._seconds:
            return None
        return min(self._foreseen(share), math.inf if self.ends_s is None else max(self.ends_s - self.elapsed_s(), 0.0))

    def _foreseen(self, share: float) -> float:
        if self._stage == "search":
            return self._search_left() + sum(map(self._forecast, FINALS))
        spent = self.elapsed_s() - self._stage_start
        told = self._rest_of_stage(share) if share > _TELLING else None
        left = max(self._forecast(self._stage) - spent, 0.0) if told is None else told
        stages = list(FINALS)
        return left + sum(map(self._forecast, stages[stages.index(self._stage) + 1 :]))

    def _rest_of_stage(self, share: float) -> float | None:
        return (self.elapsed_s() - self._stage_start) * (1 - share) / share if share > 0 else None

    def _search_left(self) -> float:
        usual = max(self.expected_trials - len(self._seconds), 0)
        trials = usual if self.coming is None else (usual + self.coming) / 2
        return trials * sum(self._seconds) / len(self._seconds)

    def _forecast(self, stage: str) -> float:
        times, longest = FINALS[stage]
        seconds = times * statistics.median(self._plain or self._seconds)
        return seconds if longest is None else min(seconds, longest)

    def _tell(self, words: str, left_s: float | None, trial: Trial | None = None) -> None:
        self.watcher(Event(stage=self._stage, words=words, elapsed_s=self.elapsed_s(), left_s=left_s, best=self.best, trial=trial))
