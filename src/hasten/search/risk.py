"""How much a candidate may have lost, as far as *select* tells.

A few hundred examples show next to none of the flips of a good candidate. How far its answers lie from the original's has hardly
any noise, and over the trials of one network flips grow with it; so a trial without a flip gets those that its distance speaks of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, median

from hasten.core.report import Trial
from hasten.search.catalogue import Settings

_RANGE = (2e-3, 0.5)  # distances over which flips grow in proportion
_USUAL = 0.1  # flips for each unit of distance, at least: examples that happen to be easy show fewer


def risks(trials: Sequence[Trial], settings: Settings) -> dict[int, float]:
    """By trial number: drop + z·√(flips ÷ n) on *select*, with at least the flips that go with the distance of the answers.

    Where the score has no flips it is the drop alone.
    """
    z, slope = NormalDist().inv_cdf(settings.limit.confidence), _slope(trials)
    found = {}
    for trial in trials:
        if (m := trial.measurement) is not None:
            flips = 0.0 if m.flips is None else max(m.flips, slope * (m.distance or 0.0))
            spread = z * math.sqrt(flips / settings.select_examples) if settings.select_examples else 0.0
            found[trial.number] = m.score_drop + spread
    return found


def _slope(trials: Sequence[Trial]) -> float:
    """Flips for each unit of distance."""
    measured = [t.measurement for t in trials if t.measurement]
    known = [m.flips / m.distance for m in measured if m.flips and m.distance and _RANGE[0] <= m.distance <= _RANGE[1]]
    return max(median(known), _USUAL) if known else _USUAL
