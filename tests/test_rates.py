"""Finding a learning rate: no trace is left, good rates are told from bad ones, held-out data is not needed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hasten.core.data import View
from hasten.core.errors import UsageError
from hasten.train import Checkpoints, Fit, Stop, Trainer
from hasten.train.rates import range_test
from hasten.train.schedules import OfTorch
from hasten.train.seeds import over_seeds
from lessons import contents, dense, draw, plain, points, seeded


def line(n=200):
    x = draw(n, 3)
    return View(inputs=(x,), labels=x @ [1.0, -2.0, 0.5])


def test_range_test_leaves_no_trace():
    module, state = seeded(dense), torch.get_rng_state()
    module.train()
    before = contents(module)
    found = range_test(Trainer(settings=Fit(batch=32)), module, points())
    assert contents(module) == before
    assert module.training
    assert all(p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert list(found.rates) == sorted(found.rates)
    assert found.rates[0] == pytest.approx(1e-6)


def test_range_test_finds_where_the_loss_falls():
    settings = Fit(loss="values", batch=50, optimizer=torch.optim.SGD, weight_decay=0, clip=math.inf)
    found = range_test(Trainer(settings=settings), seeded(lambda: nn.Linear(3, 1)), line(), high=100)
    assert found.suggested is not None
    assert 1e-2 < found.suggested < 5, "gradient descent on this parabola diverges from about 5 on"
    assert len(found.rates) < 100, "it ends where the loss explodes"


def test_auto_chooses_by_the_end_of_short_trainings():
    settings = Fit(loss="values", batch=20, epochs=4, optimizer=torch.optim.SGD, weight_decay=0, learning_rate="auto")
    fitted = Trainer(settings=settings).fit(seeded(lambda: nn.Linear(3, 1)), line())
    assert "was chosen on a tenth of the training data" in fitted.notes[0]
    assert "20 steps: " in fitted.notes[0]
    assert fitted.curve[-1][1] < 0.05
    again = Trainer(settings=settings).fit(seeded(lambda: nn.Linear(3, 1)), line())
    assert contents(again.module) == contents(fitted.module)


def test_auto_needs_something_to_judge_by():
    trainer = Trainer(settings=Fit(learning_rate="auto"))
    with pytest.raises(UsageError, match="needs at least 20 examples to judge by, got 10"):
        trainer.fit(seeded(plain), points(10))
    with pytest.raises(UsageError, match="this is a stream; give a View or a number"):
        trainer.fit(seeded(plain), [])
    with pytest.raises(UsageError, match="'auto' must be chosen first"):
        Fit(learning_rate="auto").rate(1, 2)


class Interrupted(Exception):
    pass


AUTO = Fit(loss="values", batch=20, epochs=4, optimizer=torch.optim.SGD, weight_decay=0, learning_rate="auto")


def searched(folder=None, *, trials=math.inf, settings=AUTO):
    """A training and what was tried for it; broken off behind so many trials."""
    tried = []

    def watch(record):
        if record.trial and record.trial not in tried:
            if len(tried) == trials:
                raise Interrupted
            tried.append(record.trial)

    kept = None if folder is None else Checkpoints(folder=folder)
    try:
        return Trainer(settings=settings, checkpoints=kept, watch=watch).fit(seeded(lambda: nn.Linear(3, 1)), line()), tried
    except Interrupted:
        return None, tried


def test_a_search_that_was_broken_off_goes_on_and_a_finished_one_is_not_done_again(tmp_path):
    whole, tried = searched()
    assert tried[0] == "a range test"
    assert all("20 steps" in one or "40 steps" in one for one in tried[1:])
    _, first = searched(tmp_path, trials=3)
    assert first == tried[:3]
    parts, rest = searched(tmp_path)
    assert rest == tried[3:], "what was judged is known; the trial that was broken off begins anew"
    assert contents(parts.module) == contents(whole.module)
    assert parts.notes == whole.notes
    again, none = searched(tmp_path)
    assert none == []
    assert contents(again.module) == contents(whole.module)
    with pytest.raises(UsageError, match="holds a training with other settings, data or layers; choose a new folder"):
        searched(tmp_path, settings=replace(AUTO, batch=10))


def test_a_search_tells_where_it_stands_and_its_time_is_counted():
    seen = []
    trainer = Trainer(settings=AUTO, watch=seen.append)
    fitted = trainer.fit(seeded(lambda: nn.Linear(3, 1)), line())
    trials = [r for r in seen if r.trial]
    assert [r.step for r in seen if not r.trial] == list(range(1, 41))
    assert [r.seconds for r in trials] == sorted(r.seconds for r in trials)
    assert fitted.seconds > trials[-1].seconds


def test_a_search_ends_with_the_time_it_has():
    settings = replace(AUTO, epochs=1e7, stop=Stop(seconds=0.3))
    fitted, tried = searched(settings=settings)
    assert tried == ["a range test", *tried[1:]]
    assert "seconds were over" in fitted.ended
    assert "half of the 0.3 seconds" in fitted.notes[0]
    assert len(fitted.curve) > 0


def test_a_scheduler_of_torch_holds_the_rate_that_auto_would_set():
    with pytest.raises(UsageError, match="'auto' sets the rate, which a scheduler of torch holds itself"):
        Fit(learning_rate="auto", warm_up=0, schedule=OfTorch(lambda o: torch.optim.lr_scheduler.StepLR(o, 5)))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"low": 0}, "rising positive numbers, got 0 and 10.0"),
        ({"low": 1, "high": 0.1}, "rising positive"),
        ({"steps": 5}, "at least 10, got 5"),
    ],
)
def test_refusals(wrong, words):
    with pytest.raises(UsageError, match=words):
        range_test(Trainer(), seeded(plain), points(), **wrong)


def test_seeds_show_their_spread():
    trainer = Trainer(settings=Fit(epochs=2, batch=32, learning_rate=0.01), validation=points(60, seed=1))
    found = over_seeds(trainer, dense, points(), seeds=range(3))
    assert len(set(found.losses)) == 3
    assert [f.looks[-1] for f in found.fitted] == list(found.losses)
    assert str(found).startswith("loss ")
    assert "over 3 seeds" in str(found)
    assert contents(found.fitted[1].module) == contents(over_seeds(trainer, dense, points(), seeds=(5, 1)).fitted[1].module)
    with pytest.raises(UsageError, match=r"at least two different seeds, got \[1, 1\]"):
        over_seeds(trainer, dense, points(), seeds=[1, 1])
    with pytest.raises(UsageError, match="checkpoints belong to one training"):
        over_seeds(Trainer(checkpoints=Checkpoints(folder="x")), dense, points(), seeds=[1, 2])
