"""What each method could do here: first seen alone, then checked against what became of it. A function of the trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.core.recipe import fingerprint
from hasten.core.report import Finding, Measurement, Trial
from hasten.search.board import GAIN
from hasten.search.catalogue import Settings


def diagnose(
    survey: Mapping[str, Any], trials: Sequence[Trial], settings: Settings, taken: Mapping[str, Any] | None
) -> tuple[Finding, ...]:
    """One finding for each kind of step that was surveyed.

    A kind is seen alone in the first two trials that differ in nothing but one step of it. What it buys there, before any training,
    is the forecast; what became of it is the largest gain between two trials that differ in that step and the training behind it, where a
    proof is expected of the one with the step.

    Args:
        survey: kind → {"space": …} or {"reason": why it cannot treat the network}.
        trials: all of them, by number.
        settings: of the run.
        taken: recipe of the result, as JSON; None where there is none.
    """
    by_key = {_key(t.recipe["steps"], t.recipe["engine"]): t for t in trials if t.measurement}
    chosen = {_kind(step) for step in taken["steps"]} if taken else set()
    return tuple(_finding(name, told, by_key, settings, name in chosen) for name, told in sorted(survey.items()))


def _finding(name: str, told: Mapping[str, Any], by_key: Mapping[str, Trial], settings: Settings, in_result: bool) -> Finding:
    if "reason" in told:
        return Finding(method=name, note=f"cannot treat this network: {told['reason']}")
    pairs = list(_pairs(name, by_key))
    if not pairs:
        return Finding(method=name, note="not tried alone" if in_result or _tried(name, by_key) else "not tried")
    cost = settings.objective.cost
    gains = [(cost(without) / cost(with_), with_.score_drop - without.score_drop, with_) for without, with_ in pairs]
    kept = [gain for gain, _, with_ in gains if settings.promising(with_)]
    first, lost, _ = gains[0]
    best = max(kept, default=None)
    note = (
        "in the result"
        if in_result
        else "lost too much"
        if best is None
        else "tried, and others were better"
        if best >= GAIN
        else "buys nothing here"
    )
    return Finding(method=name, forecast=first, score_drop=lost, gain=best, note=note)


def _pairs(name: str, by_key: Mapping[str, Trial]) -> list[tuple[Measurement, Measurement]]:
    """Measurements without and with one step of the kind, all else equal but the training behind it, in the order of the trials with it."""
    found = []
    for trial in by_key.values():
        steps = trial.recipe["steps"]
        for at in (i for i, step in enumerate(steps) if _kind(step) == name):
            rest = [*steps[:at], *steps[at + 1 :]]
            untrained = [step for step in rest if "learning_rate" not in step]
            others = (by_key.get(_key(left, trial.recipe["engine"])) for left in (rest, untrained))
            other = next((o for o in others if o), None)
            if other and other.measurement and trial.measurement:
                found.append((other.measurement, trial.measurement))
    return found


def _tried(name: str, by_key: Mapping[str, Trial]) -> bool:
    return any(_kind(step) == name for trial in by_key.values() for step in trial.recipe["steps"])


def _kind(step: Mapping[str, Any]) -> str:
    return str(step["name"]).rpartition(".")[2]


def _key(steps: Sequence[Mapping[str, Any]], engine: Mapping[str, Any]) -> str:
    return fingerprint([list(steps), engine])
