"""The examples run and say what they promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from hasten import optim
from hasten.report import curves

FOLDER = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_four_points_predict_the_fifth():
    assert example("four_points").main() == pytest.approx(5.0, abs=1e-2)


def test_gradients_by_hand_equal_autograd():
    assert example("by_hand").main() < 1e-6


def test_every_optimizer_descends_the_bowl(tmp_path):
    bowl = example("quadratics")
    losses = bowl.main(tmp_path / "page.html")
    assert all(loss < 0.1 for loss in losses.values()), losses
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == len(bowl.FAMILIES) + 1
    assert "effective step of y" in page
    assert all(name in page for name in losses)
    assert all(len(family) <= len(curves.COLOURS) for family in bowl.FAMILIES.values()), "no colour twice in a picture"
    made = [make([nn.Parameter(torch.ones(1, 2))], lr=rate) for family in bowl.FAMILIES.values() for make, rate in family.values()]
    assert {type(optimizer).__name__ for optimizer in made} == set(optim.__all__) - {"missing"}


def test_digits_are_learnt(tmp_path):
    found = example("digits").main(tmp_path / "page.html", task="digits", epochs=4)
    assert found["Adam"] > 0.85
    assert "a schedule of 36 optimizer steps" in (tmp_path / "page.html").read_text()


def test_every_example_is_tested():
    assert {f.stem for f in FOLDER.glob("*.py")} == {
        "four_points",
        "by_hand",
        "quadratics",
        "digits",
        "effective_steps",
        "three_frameworks",
    }
