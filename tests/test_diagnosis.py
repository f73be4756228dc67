"""What is said of each method is what the trials show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hasten.core.recipe import Recipe
from hasten.core.report import Finding
from hasten.search.diagnosis import diagnose
from test_shaping import SETTINGS, best, run, world

SURVEY: dict[str, Any] = {name: {"space": {}} for name in ("Thin", "Cut", "Round", "Train", "Fold")} | {"Split": {"reason": "no layers"}}


def findings(bears: float, blocks: int = 0) -> dict[str, Finding]:
    trials = run(world(bears, blocks=blocks))
    return {f.method: f for f in diagnose(SURVEY, trials, SETTINGS, best(trials).recipe)}


def test_the_forecast_is_from_before_the_training_and_the_gain_from_after() -> None:
    found = findings(0.62)
    thin = found["Thin"]
    assert thin.note == "in the result"
    assert thin.forecast == pytest.approx(8 / 6)  # the mildest setting was looked at first
    assert thin.score_drop == pytest.approx(0.6)
    assert 2 <= (thin.gain or 0) <= 1 / 0.37
    assert found["Round"].gain == pytest.approx(2.0)
    assert found["Train"].note == "in the result"


def test_what_did_not_come_out_says_why() -> None:
    found = findings(-1.0)
    assert (found["Thin"].gain, found["Thin"].note) == (None, "lost too much")
    assert found["Split"].note == "cannot treat this network: no layers"
    assert found["Fold"] == Finding(method="Fold", note="not tried")


def test_what_buys_nothing_is_called_so() -> None:
    trials = run(lambda recipe: (10.0 if not recipe.steps else 10.1, 0.0, 1.0))
    found = {f.method: f for f in diagnose(SURVEY, trials, SETTINGS, None)}
    assert {found[name].note for name in ("Thin", "Cut", "Round")} == {"buys nothing here"}
    assert found["Thin"].gain == pytest.approx(10 / 10.1)


def test_a_run_that_has_just_begun_has_findings_without_figures() -> None:
    first = run(world())[:1]
    assert Recipe.from_json(first[0].recipe).steps == ()
    assert {f.note for f in diagnose(SURVEY, first, replace(SETTINGS), None)} == {"not tried", "cannot treat this network: no layers"}
