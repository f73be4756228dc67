"""First guesses: where a search begins, never what it returns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hasten.compress import QuantizeStatic
from hasten.core.network import Network
from hasten.core.recipe import Recipe, part_to_json
from hasten.engines import OnnxRuntime
from hasten.prepare import architecture
from hasten.search import warm
from hasten.search.propose import propose
from hasten.train import FineTune
from test_shaping import CATALOGUE, SETTINGS, SPACES, Thin, Train, best, run, steps, trainings, world


def test_what_was_kept_comes_back_and_damage_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = warm.place(["digest", "some processor", ["latency"], 1])
    assert warm.recall(file) == []
    warm.remember(file, Recipe((FineTune(learning_rate=3e-3), QuantizeStatic(observer="mse")), OnnxRuntime()))
    assert warm.parts(warm.recall(file)) == {FineTune: FineTune(learning_rate=3e-3), QuantizeStatic: QuantizeStatic(observer="mse")}
    file.write_text(file.read_text().replace("QuantizeStatic", "NoLongerThere"))
    assert warm.parts(warm.recall(file)) == {FineTune: FineTune(learning_rate=3e-3)}
    file.write_text("[{")
    assert warm.recall(file) == []
    (tmp_path / "file").touch()
    warm.remember(tmp_path / "file" / "x.json", Recipe((), OnnxRuntime()))  # a cache that cannot be written is done without


def test_a_guess_saves_trainings_and_decides_nothing() -> None:
    usual = run(world(0.8))
    found = steps(best(usual))
    guessed = run(world(0.8), guesses={Thin: found["Thin"], Train: found["Train"]})
    assert len(trainings(guessed)) < len(trainings(usual))
    assert steps(best(guessed))["Thin"] == found["Thin"]
    misled = run(world(0.3), guesses={Thin: Thin(ratio=0.75), Train: Train(learning_rate=3e-3)})
    assert steps(best(misled))["Thin"].ratio <= 0.31


def test_an_architecture_is_that_of_the_layers_not_of_the_weights() -> None:
    def digest(width: int, seed: int) -> str:
        torch.manual_seed(seed)
        return architecture(Network(kind="module", body=nn.Sequential(nn.Linear(3, width), nn.ReLU()), example=()))

    assert digest(4, 0) == digest(4, 1) != digest(5, 0)


def test_guesses_are_optional() -> None:
    first, second = (next(propose(CATALOGUE, SPACES, replace(SETTINGS), guesses)) for guesses in (None, {Thin: Thin(ratio=0.25)}))
    assert first == second
    assert part_to_json(Thin(ratio=0.25))["ratio"] == 0.25
