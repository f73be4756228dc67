"""FineTune: a step that trains a copy with the loop."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.data import View
from hasten.core.errors import Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context, Step, describe, part_from_json, part_to_json
from hasten.load.lower import forward
from hasten.train import FineTune, Fit, fit
from lessons import Tokens, contents, dense, draw, points, seeded, sentences


def as_network(module, **facts):
    return Network(kind="module", body=module, example=(draw(2, 6),), **facts)


def as_context(view=None, **facts):
    view = view or points()
    return Context(train=view, calibrate=view.take(slice(20)), **facts)


def test_finetune_is_a_step_that_rebuilds_from_its_json():
    for step in (FineTune(), FineTune(epochs=2, learning_rate=3e-4, batch=16, distil=0.9, temperature=4.0)):
        assert isinstance(step, Step)
        assert part_from_json(json.loads(json.dumps(part_to_json(step)))) == step
    assert part_to_json(FineTune())["name"] == "hasten.train.FineTune"
    assert describe(FineTune(distil=0.9)) == "FineTune(distil=0.9)"
    with pytest.raises(UsageError, match=r"distil must be in \[0, 1\], got 2"):
        FineTune(distil=2)


def test_finetune_space_starts_with_the_defaults_and_can_be_built():
    space = FineTune.space(as_network(seeded(dense)))
    assert {name: values[0] for name, values in space.items()} == {name: getattr(FineTune(), name) for name in space}
    for name, values in space.items():
        assert [getattr(FineTune(**{name: value}), name) for value in values] == list(values)


def test_finetune_trains_a_copy_from_the_context_s_seed():
    module, original = seeded(dense), as_network(seeded(dense, 1))
    network, before = as_network(module), contents(module)
    told = []
    context = as_context(original=original, seed=3, progress=lambda *word: told.append(word))
    tuned = FineTune().apply(network, context)
    assert contents(module) == before
    assert (network.body, tuned.example, tuned.kind) == (module, network.example, "module")
    assert contents(tuned.module) == contents(FineTune().apply(network, context).module) != before
    assert contents(tuned.module) != contents(FineTune().apply(network, replace(context, seed=4)).module)
    assert told[-1][0] == 1.0


def test_finetune_hands_its_settings_on(monkeypatch):
    seen = []
    monkeypatch.setattr("hasten.train.finetune.fit", lambda module, view, **rest: seen.append(rest) or fit(module, view, **rest))
    step = FineTune(epochs=2, learning_rate=3e-3, batch=16, distil=0.9, temperature=4.0)
    network = as_network(seeded(dense))
    step.apply(network, as_context(original=network, seed=5))
    same = {"epochs": 2, "batch": 16, "learning_rate": 3e-3, "weight_decay": 0.0, "temperature": 4.0}
    assert seen[0]["settings"] == Fit(**same, distil=0.9, seed=5)
    assert seen[0]["teacher"] is network.module
    step.apply(network, as_context(original=network, loss="original"))
    assert seen[1]["settings"] == Fit(**same, loss="original")


def test_finetune_learns_from_answers_that_are_known():
    network, original, other = (as_network(seeded(dense, seed)) for seed in (0, 1, 2))
    context = as_context(original=original)
    asked = contents(FineTune().apply(network, context).module)

    def told(teacher):
        return contents(FineTune().apply(network, replace(context, answers=lambda: forward(teacher, context.train.inputs))).module)

    assert told(original) == asked != told(other)


def test_finetune_short_takes_a_quarter_of_the_epochs():
    steps = {}
    for fidelity in ("short", "long"):
        told = []
        context = as_context(fidelity=fidelity, progress=lambda *word, told=told: told.append(word))
        FineTune(epochs=8, batch=32, distil=0).apply(as_network(seeded(dense)), context)
        steps[fidelity] = told[-1][1].split(",")[0]
    assert steps == {"short": "step 8 of 8", "long": "step 32 of 32"}


def test_finetune_without_labels_learns_the_original():
    original = seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), 1)
    damaged = copy.deepcopy(original)
    with torch.no_grad():
        damaged[0].weight[:4] = 0
    view = View(inputs=points().inputs)
    context = as_context(view, original=as_network(original), loss="original")
    tuned = FineTune(epochs=20, learning_rate=3e-3).apply(as_network(damaged), context).module
    x = torch.from_numpy(view.inputs[0])
    assert F.mse_loss(tuned(x), original(x)) < 0.3 * F.mse_loss(damaged(x), original(x))


def test_finetune_takes_tokens():
    network = Network(kind="module", body=seeded(Tokens), example=(sentences(2).inputs[0],))
    tuned = FineTune().apply(network, as_context(sentences(), original=network))
    assert contents(tuned.module) != contents(network.module)


def test_finetune_keeps_a_fixed_batch():
    class Rigid(nn.Linear):
        def forward(self, x):
            assert len(x) == 40
            return super().forward(x)

    network = as_network(Rigid(6, 3), fixed_batch=40)
    FineTune().apply(network, as_context(original=network))
    with pytest.raises(Unsupported, match="takes 40 examples at once, the training data has 30"):
        FineTune().apply(network, as_context(points(30), original=network))


@pytest.mark.parametrize("use", ["apply", "space"])
@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Network(kind="graph", body=None, example=(draw(2, 6),)), "needs a torch module, this network is an ONNX graph"),
        (as_network(nn.Linear(6, 3), fixed_batch=1), "one example at a time; re-export with a dynamic batch"),
        (as_network(nn.ReLU()), "requires_grad=True, the network has none"),
    ],
    ids=["graph", "batch of one", "nothing to train"],
)
def test_refusals_of_finetune(network, words, use):
    with pytest.raises(Unsupported, match=words):
        FineTune().apply(network, as_context(original=network)) if use == "apply" else FineTune.space(network)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "the original as a torch module, it has none; set distil=0"),
        ({"loss": "original"}, "it has none; there is no other way without labels"),
        ({"original": Network(kind="graph", body=None, example=(draw(2, 6),))}, "it has none; set distil=0"),
    ],
    ids=["none", "no labels either", "a graph"],
)
def test_finetune_refuses_to_distil_without_the_original(facts, words):
    with pytest.raises(Unsupported, match=words):
        FineTune().apply(as_network(seeded(dense)), as_context(**facts))
