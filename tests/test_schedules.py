"""Learning rates over time: the formulas, torch's schedulers, and what a plateau remembers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import lr_scheduler

from hasten.core.errors import UsageError
from hasten.train import Fit, Stop, Trainer, fit
from hasten.train.schedules import NAMED, Cosine, Exponential, Linear, Moment, OfTorch, OneCycle, Plateau, Steps
from lessons import contents, plain, points, seeded

T = 40


def shares(schedule, **facts):
    return [schedule.share(Moment(step=t, steps=T, **facts)) for t in range(T)]


def of_torch(make):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(T):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (Linear(), lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=T)),
        (Cosine(), lambda o: lr_scheduler.CosineAnnealingLR(o, T)),
        (Steps(factor=0.1, at=(0.5, 0.75)), lambda o: lr_scheduler.MultiStepLR(o, [20, 30], 0.1)),
        (OneCycle(rise=0.3), lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=T, pct_start=0.3, cycle_momentum=False)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_schedules_equal_those_of_torch(mine, theirs):
    assert shares(mine) == pytest.approx(of_torch(theirs), abs=1e-9)


def test_linear_falls_by_the_formula_to_zero():
    settings = Fit(learning_rate=0.3, warm_up=0.0)
    assert [settings.rate(t + 1, 10) for t in range(10)] == pytest.approx([0.3 * (1 - t / 10) for t in range(10)])


def test_exponential_falls_once_a_pass():
    seen = []
    Trainer(settings=Fit(epochs=3, batch=50, schedule=Exponential(factor=0.9), warm_up=0.0, learning_rate=1e-3), watch=seen.append).fit(
        seeded(plain), points()
    )
    assert [r.rate for r in seen] == pytest.approx([1e-3 * 0.9 ** (i // 3) for i in range(9)])


def test_plateau_equals_torch_s():
    losses = [3, 2, 2.5, 2.4, 2.3, 2.2, 1.9, 2, 2, 2, 2, 2, 2]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, threshold=0.0)
    mine = Plateau(factor=0.5, patience=3)  # torch counts the looks that it forgives
    for n, loss in enumerate(losses, start=1):
        theirs.step(loss)
        found = mine.share(Moment(step=0, steps=1, looks=tuple(losses[:n])))
        assert found == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("warm_up", [0.0, 0.2])
def test_one_cycle_rises_once(warm_up):
    settings = Fit(learning_rate=2.0, schedule="one-cycle", warm_up=warm_up)
    rates = [settings.rate(step, T) for step in range(1, T + 1)]
    assert rates == pytest.approx([2.0 * share for share in shares(OneCycle())])
    top = rates.index(max(rates))
    assert rates == [*sorted(rates[:top]), *sorted(rates[top:], reverse=True)]


@pytest.mark.parametrize("name", sorted(NAMED.keys() - {"one-cycle"}))
def test_every_schedule_warms_up_and_stays_in_range(name):
    settings = Fit(learning_rate=2.0, warm_up=0.25, schedule=name)
    rates = [settings.rate(step, T) for step in range(1, T + 1)]
    assert rates[:10] == pytest.approx([2.0 * step / 11 for step in range(1, 11)])
    assert all(0 < rate <= 2.0 for rate in rates)


def test_a_scheduler_of_torch_changes_what_its_formula_says():
    halves = OfTorch(lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 9))
    settings = Fit(epochs=3, batch=50, warm_up=0.0)
    mine = fit(seeded(plain), points(), settings=settings)
    theirs = fit(seeded(plain), points(), settings=Fit(epochs=3, batch=50, warm_up=0.0, schedule=halves))
    for name, value in mine.module.state_dict().items():
        assert torch.allclose(value, theirs.module.state_dict()[name], atol=1e-7)
    flat = fit(seeded(plain), points(), settings=Fit(epochs=3, batch=50, warm_up=0.0, schedule="constant"))
    assert contents(flat.module) != contents(theirs.module), "the scheduler matters"


def test_reduce_on_plateau_of_torch_hears_of_the_looks():
    seen = []
    schedule = OfTorch(lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs"))
    settings = Fit(epochs=4, batch=50, warm_up=0.0, schedule=schedule, learning_rate=1e-3)
    Trainer(settings=settings, validation=points(40, seed=1), watch=seen.append).fit(seeded(plain), points())
    assert [r.rate for r in seen][::3] == [1e-3, 1e-3, 5e-4, 2.5e-4]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Exponential(factor=0), r"factor must be in \(0, 1\], got 0"),
        (lambda: Steps(factor=2), r"factor must be in \(0, 1\], got 2"),
        (lambda: Steps(at=(0.7, 0.5)), "at must be rising shares"),
        (lambda: OneCycle(rise=1), "rise must be between 0 and 1, got 1"),
        (lambda: OneCycle(start=0.5), "start must be a finite number of at least 1, got 0.5"),
        (lambda: Plateau(factor=1), "factor must be between 0 and 1, got 1"),
        (lambda: Plateau(patience=0), "patience must be at least 1, got 0"),
        (lambda: Plateau(least=-1), r"least must be in \[0, 1\), got -1"),
        (lambda: Fit(schedule=OfTorch(lambda o: None)), "warm_up must be 0 with a scheduler of torch"),
        (lambda: Trainer(settings=Fit(schedule="plateau")), "a plateau schedule, needs validation data, got none"),
        (lambda: Trainer(settings=Fit(stop=Stop(patience=2))), "stopping by patience.* needs validation data, got none"),
        (lambda: Stop(steps=0), "steps must be a whole number of at least 1, got 0"),
        (lambda: Stop(seconds=0), "seconds must be a finite number above 0, got 0"),
        (lambda: Stop(loss=math.nan), "loss must be a finite number, got nan"),
        (lambda: Stop(change=-1), "change must be a finite number of at least 0, got -1"),
        (lambda: Stop(every=0), "every must be a finite number of passes above 0, got 0"),
    ],
)
def test_refusals(wrong, words):
    with pytest.raises(UsageError, match=words):
        wrong()
