"""What a time limit leaves of the data: as much as the network as given answers in a share of it, drawn before anyone looks.

The store keeps it: `fitted` ("select": how many of how many; "batches" that are timed; "left": those that are not; "each_s": seconds
of an example), `proving` (how many of how many). A score that is no mean over examples (AUC, macro F1) needs its rare classes and is
never cut.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from hasten.core.data import View, drawn
from hasten.core.network import Arrays
from hasten.core.report import Limit
from hasten.core.runner import Runner
from hasten.core.score import Score
from hasten.core.store import Store
from hasten.load.split import fewest
from hasten.search.catalogue import Settings

# Of the time limit, that the network as given may take for *select*, for *prove*, and for a call at a batch size that is no goal.
SCORING, PROVING, CALL = 1 / 40, 1 / 8, 1 / 200
LEAST = 200  # examples, where they take at most `CHOOSING` of the limit, or `SHOWING` for those that prove; else as many as do
CHOOSING, SHOWING = 1 / 10, 1 / 4
_FEWEST = 16  # however slow the network is
_FIRST, _PIECE, _LONG_S = 2, 16, 2.0  # examples that tell how fast it is: a few, and more of them where those take no longer than this
_POWER = 2  # times as many as can show the limit at all


def fit(runner: Runner, settings: Settings, select: View, score: Score, fixed_batch: int | None) -> dict[str, Any]:
    """The fact `fitted`, by a call of the network as given that is not its first."""
    if settings.time_limit_s is None:
        return {"select": [len(select), len(select)], "batches": list(settings.batches), "left": [], "each_s": 0.0}
    few = select.take(slice(max(_FIRST, fixed_batch or 1)))
    runner.outputs(few.inputs)
    whole, each_s = _paced(runner, score, few)
    if _PIECE * each_s < _LONG_S:
        whole, each_s = _paced(runner, score, select.take(slice(max(_PIECE, fixed_batch or 1))))
    size = len(select) if whole else _fitting(settings, len(select), each_s, (SCORING, CHOOSING), LEAST)
    needed = {settings.batch, *settings.objective.batches}
    batches = [b for b in settings.batches if b in needed or b * each_s <= CALL * settings.time_limit_s]
    left = [b for b in settings.batches if b not in batches]
    return {"select": [size, len(select)], "batches": batches, "left": left, "each_s": each_s}


def _paced(runner: Runner, score: Score, piece: View) -> tuple[bool, float]:
    """Whether the score is one of the whole; seconds of an example, its score included: outputs may be large."""
    began = time.perf_counter()
    whole = _of_the_whole(score, runner.outputs(piece.inputs), piece)
    return whole, (time.perf_counter() - began) / len(piece)


def taken(select: View, settings: Settings, fitted: dict[str, Any]) -> tuple[View, Settings]:
    """What is left of *select* and of the batch sizes."""
    size = fitted["select"][0]
    part = select if size == len(select) else select.take(drawn(len(select), size, seed=settings.seed))
    return part, replace(settings, batches=tuple(fitted["batches"]))


def proving(settings: Settings, size: int, each_s: float, score: Score) -> int:
    """How many of `size` examples prove. Where there is no time for as many as can show the limit at all, equal outputs are all that can
    be proved, which takes few.

    Args:
        settings: with the limit in the score's unit.
        each_s: seconds of the network as given for an example.
        score: one that is a mean over examples.
    """
    needed = _showing(settings.limit, score) or 0
    hopeless = settings.time_limit_s is not None and needed * each_s > SHOWING * settings.time_limit_s
    return _fitting(settings, size, each_s, (PROVING, PROVING if hopeless else SHOWING), max(LEAST, _POWER * needed))


def told(store: Store) -> tuple[dict[str, int], list[str]]:
    """The examples that were used of *select* and *prove*, where it is known, and what the report says of what was left out."""
    used, said = {}, []
    fitted, prove = store.fact("fitted") or {}, store.fact("proving")
    for name, verb, part in (("select", "chose", fitted.get("select")), ("prove", "proved", prove)):
        if part:
            used[name] = part[0]
        if part and part[0] < part[1]:
            said.append(f"{part[0]:,} of the {part[1]:,} examples of {name} {verb}, drawn at random, for the sake of the time limit")
    if left := fitted.get("left"):
        said.append(f"batch {' and '.join(map(str, left))} was not timed, for the sake of the time limit")
    return used, said


def _of_the_whole(score: Score, outputs: Arrays, piece: View) -> bool:
    target = piece.labels if score.target == "labels" else outputs[0]
    return target is not None and score.per_example(outputs, target) is None


def _showing(limit: Limit, score: Score) -> int | None:
    """The fewest examples that can show the limit: none changes; None where that is not known beforehand."""
    if score.zero_one:
        return fewest(limit.max_drop, limit.confidence)
    if score.unit != "pt" or not 0 < limit.max_drop < 1:
        return None
    return math.ceil(math.log(1 - limit.confidence) / math.log(1 - limit.max_drop))  # Gaffke's bound of shares


def _fitting(settings: Settings, examples: int, each_s: float, shares: tuple[float, float], least: int) -> int:
    if settings.time_limit_s is None:
        return examples
    usual, most = (int(min(share * settings.time_limit_s / max(each_s, 1e-9), 1e9)) for share in shares)
    return min(examples, max(usual, min(least, most), _FEWEST))
