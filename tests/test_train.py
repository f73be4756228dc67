"""The training loop: exact, repeatable, and nobody else's network is written on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.data import View
from hasten.train import Diverged, Fit, fit
from hasten.train.augment import shift
from lessons import Several, Tokens, contents, dense, draw, image, line, per_pixel, pictures, points, seeded, sentences

CASES = {
    "classes": (dense, points(), Fit(epochs=6, batch=32, learning_rate=0.01)),
    "classes, sgd, smooth": (
        dense,
        points(),
        Fit(epochs=6, batch=32, optimizer="sgd", learning_rate=0.1, label_smoothing=0.1, schedule="cosine"),
    ),
    "probabilities": (
        lambda: nn.Sequential(dense(), nn.Softmax(1)),
        points(),
        Fit(epochs=6, batch=32, learning_rate=0.01, schedule="constant"),
    ),
    "images, shifted": (image, pictures(), Fit(epochs=6, batch=32, learning_rate=0.01, augmentation="shift")),
    "classes of pixels": (
        per_pixel,
        View(inputs=(x := draw(40, 1, 8, 8),), labels=np.digitize(x[:, 0], [-0.5, 0.5])),
        Fit(epochs=6, batch=8, learning_rate=0.05),
    ),
    "classes of words": (
        lambda: nn.Linear(6, 3),
        View(inputs=(x := draw(40, 5, 6),), labels=x[:, :, :3].argmax(2)),
        Fit(epochs=6, batch=8, learning_rate=0.05),
    ),
    "tokens": (Tokens, sentences(), Fit(epochs=6, batch=32, learning_rate=0.03)),
    "values": (lambda: dense(1), line(), Fit(loss="values", epochs=6, batch=32, learning_rate=0.03)),
    "original": (
        Several,
        View(inputs=(draw(150, 6), draw(150, 5))),
        Fit(loss="original", epochs=6, batch=32, learning_rate=0.03),
    ),
    "classes, distilled": (dense, points(), Fit(epochs=6, batch=32, learning_rate=0.01, distil=0.5)),
    "values, distilled": (
        lambda: dense(1),
        line(),
        Fit(loss="values", epochs=6, batch=32, learning_rate=0.03, distil=0.5),
    ),
    "shifted, distilled": (image, pictures(), Fit(epochs=6, batch=32, learning_rate=0.01, distil=1.0, augmentation="shift")),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(", ", "-"))
def case(request):
    build, view, settings = CASES[request.param]
    teacher = seeded(build, 1) if settings.needs_teacher else None
    return seeded(build), view, settings, teacher


def test_laws_of_fit(case):
    module, view, settings, teacher = case
    before, taught = contents(module), contents(teacher) if teacher else None
    state = torch.get_rng_state()
    fitted = fit(module, view, settings=settings, teacher=teacher)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is restored"
    assert contents(module) == before, "the user's network is as it was"
    assert all(p.grad is None for p in [*module.parameters(), *fitted.module.parameters()])
    assert not module.training
    assert not fitted.module.training
    assert teacher is None or (contents(teacher) == taught and not teacher.training)
    torch.manual_seed(99)
    again = fit(module, view, settings=settings, teacher=teacher)
    assert contents(again.module) == contents(fitted.module), "same seed, same bytes"
    assert again.curve == fitted.curve
    other = fit(module, view, settings=replace(settings, seed=1), teacher=teacher)
    assert contents(other.module) != contents(fitted.module), "the seed matters"
    losses = [loss for _, loss in fitted.curve]
    assert [step for step, _ in fitted.curve] == list(range(1, fitted.steps + 1))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]), "the loss falls"


def _softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _first_loss(module, view, settings, teacher=None):
    """Of all the data in one batch, before any step."""
    return fit(module, view, settings=replace(settings, batch=len(view), epochs=1), teacher=teacher).curve[0][1]


@pytest.mark.parametrize("distil", [0.0, 0.3])
def test_loss_of_classes_is_the_formula(distil):
    module, teacher, view = seeded(lambda: nn.Linear(6, 3)), seeded(lambda: nn.Linear(6, 3), 1), points()
    x = torch.from_numpy(view.inputs[0])
    z, t = (m(x).detach().numpy().astype(np.float64) for m in (module, teacher))
    smooth = 0.9 * np.eye(3)[view.labels] + 0.1 / 3
    hard = -(smooth * np.log(_softmax(z))).sum(1).mean()
    p, q = _softmax(t / 4), _softmax(z / 4)
    want = (1 - distil) * hard + distil * 16 * (p * np.log(p / q)).sum(1).mean()
    settings = Fit(label_smoothing=0.1, distil=distil, temperature=4.0)
    assert _first_loss(module, view, settings, teacher if distil else None) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("distil", [0.0, 0.3])
def test_loss_of_values_is_the_formula_in_any_unit(distil):
    module, teacher = seeded(lambda: nn.Linear(6, 1)), seeded(lambda: nn.Linear(6, 1), 1)
    view = line()
    x = torch.from_numpy(view.inputs[0])
    z, t = (m(x).detach().numpy()[:, 0] for m in (module, teacher))
    want = ((1 - distil) * ((z - view.labels) ** 2).mean() + distil * ((z - t) ** 2).mean()) / view.labels.var()
    settings = Fit(loss="values", distil=distil)
    assert _first_loss(module, view, settings, teacher if distil else None) == pytest.approx(want, rel=1e-5)


def test_loss_of_original_weighs_outputs_by_their_variance():
    module, teacher = seeded(Several), seeded(Several, 1)
    view = CASES["original"][1]
    inputs = [torch.from_numpy(a) for a in view.inputs]
    pairs = [(z.detach().numpy(), t.detach().numpy()) for z, t in zip(module(*inputs), teacher(*inputs), strict=True)][:2]
    want = np.mean([((z - t) ** 2).mean() / t.var(0).mean() for z, t in pairs])
    assert _first_loss(module, view, Fit(loss="original"), teacher) == pytest.approx(want, rel=1e-5)


def test_probabilities_learn_as_their_logits_would():
    logits = seeded(lambda: nn.Linear(6, 3))
    settings = Fit(epochs=4, batch=32, learning_rate=0.01, distil=0.5)
    shares = fit(nn.Sequential(logits, nn.Softmax(1)), points(), settings=settings, teacher=logits)
    plain = fit(logits, points(), settings=settings, teacher=nn.Sequential(logits, nn.Softmax(1)))
    assert torch.allclose(shares.module[0].weight, plain.module.weight, atol=1e-5)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 28])
@pytest.mark.parametrize("n", [10, 64, 150])
def test_teacher_asked_once_or_at_every_step_is_the_same(kept_bytes, n, monkeypatch):
    monkeypatch.setattr("hasten.train.objective._KEPT_BYTES", kept_bytes)
    asked = []
    teacher = seeded(lambda: nn.Linear(6, 3), 1)

    class Counted(nn.Linear):
        def forward(self, x):
            asked.append(len(x))
            return super().forward(x)

    counted = Counted(6, 3).eval()
    counted.load_state_dict(teacher.state_dict())
    settings = Fit(loss="original", epochs=5, batch=32)
    fitted = fit(seeded(lambda: nn.Linear(6, 3)), points(n), settings=settings, teacher=counted)
    assert len(set(asked)) == 1, "whole batches only"
    assert (len(asked) == 1 + math.ceil(n / min(n, 32))) == bool(kept_bytes)
    x = torch.from_numpy(points(n).inputs[0])
    assert F.mse_loss(fitted.module(x), teacher(x)) < F.mse_loss(seeded(lambda: nn.Linear(6, 3))(x), teacher(x))


def test_distillation_moves_towards_the_teacher_and_not_the_labels():
    view, teacher = points(), seeded(dense, 5)
    student = seeded(dense)
    x = torch.from_numpy(view.inputs[0])
    theirs = F.log_softmax(teacher(x), 1)

    def distance(module):
        return F.kl_div(F.log_softmax(module(x), 1), theirs, log_target=True, reduction="batchmean").item()

    settings = Fit(epochs=20, batch=32, learning_rate=0.01)
    taught = fit(student, view, settings=replace(settings, distil=1.0), teacher=teacher).module
    labelled = fit(student, view, settings=settings).module
    assert distance(taught) < 0.25 * distance(student) < distance(labelled)


@pytest.mark.parametrize("n", [2, 31, 32, 33, 65])
def test_batches_are_whole_and_no_example_comes_twice_in_a_pass(n):
    seen = []

    class Seen(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.append(x[:, 0].int().tolist())
            return super().forward(x)

    x = np.arange(n, dtype=np.float32)[:, None]
    fit(Seen(1, 1), View(inputs=(x,), labels=x), settings=Fit(loss="values", epochs=2, batch=32, learning_rate=1e-6))
    size, each = min(n, 32), max(1, n // 32)
    assert [len(batch) for batch in seen] == [size] * 2 * each
    first, second = seen[:each], seen[each:]
    assert all(len({x for batch in part for x in batch}) == each * size for part in (first, second))
    assert n == 2 or first != second


def test_rate_rises_to_its_peak_and_falls():
    for schedule in ("linear", "cosine", "constant"):
        settings = Fit(learning_rate=0.5, schedule=schedule, warm_up=0.2)
        rates = [settings.rate(step, 100) for step in range(1, 101)]
        top = rates.index(max(rates))
        assert (top, max(rates)) == (20, 0.5)
        assert rates[:21] == sorted(set(rates[:21]))
        assert rates[20:] == sorted(rates[20:], reverse=True)
        assert 0 < rates[-1] < 0.01 or schedule == "constant"


def _three_steps(settings, module, view):
    """The optimizers of `Fit` as their papers write them, for Linear(6, 1) and squared error, all data in each step."""
    x, y = view.inputs[0].astype(np.float64), view.labels.astype(np.float64)
    weights = {name: p.detach().numpy().astype(np.float64) for name, p in module.named_parameters()}
    speed = {name: np.zeros_like(w) for name, w in weights.items()}
    square = {name: np.zeros_like(w) for name, w in weights.items()}
    for step, rate in enumerate([0.05, 0.1, 0.05], start=1):  # 0.1 at its highest
        error = 2 * (x @ weights["weight"][0] + weights["bias"] - y) / len(y) / y.var()
        gradient = {"weight": (error @ x)[None], "bias": error.sum(keepdims=True)}
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, w in weights.items():
            g = gradient[name] * min(1, settings.clip / norm)
            decay = settings.weight_decay if name == "weight" else 0.0
            if settings.optimizer == "sgd":
                g = g + decay * w
                speed[name] = 0.9 * speed[name] + g
                weights[name] = w - rate * (g + 0.9 * speed[name])
                continue
            speed[name] = 0.9 * speed[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g**2
            update = speed[name] / (1 - 0.9**step) / (np.sqrt(square[name] / (1 - 0.999**step)) + 1e-8)
            weights[name] = w - rate * (decay * w + update)
    return weights


@pytest.mark.parametrize("clip", [0.05, math.inf])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_are_the_formula(optimizer, clip):
    module, view = seeded(lambda: nn.Linear(6, 1)), line()
    settings = Fit(
        loss="values",
        epochs=3,
        batch=150,
        optimizer=optimizer,
        learning_rate=0.1,
        weight_decay=0.2,
        warm_up=0.4,
        clip=clip,
    )
    trained = dict(fit(module, view, settings=settings).module.named_parameters())
    for name, want in _three_steps(settings, module, view).items():
        np.testing.assert_allclose(trained[name].detach().numpy(), want, atol=2e-6)


def test_outputs_that_never_vary_are_learnt_too():
    view = View(inputs=(draw(64, 6),), labels=np.full(64, 3.0))
    curve = fit(seeded(lambda: nn.Linear(6, 1)), view, settings=Fit(loss="values", epochs=60, learning_rate=0.1)).curve
    assert curve[-1][1] < 0.1 * curve[0][1] < math.inf


def test_scale_of_the_original_comes_from_all_over_the_data():
    x = np.sort(draw(6400, 1), 0)
    teacher, zero = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, slope in ((teacher, 100.0), (zero, 0.0)):
        nn.init.constant_(module.weight, slope)
        nn.init.zeros_(module.bias)
    fitted = fit(zero, View(inputs=(x,)), settings=Fit(loss="original", batch=32), teacher=teacher)
    assert 0.4 < fitted.curve[0][1] < 2.5, "nothing explained yet: about 1"


@pytest.mark.parametrize("kept_bytes", [0, 1 << 28])
def test_teacher_in_training_mode_is_asked_in_eval_mode(kept_bytes, monkeypatch):
    monkeypatch.setattr("hasten.train.objective._KEPT_BYTES", kept_bytes)
    modes = []

    class Watched(nn.BatchNorm1d):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    teacher = nn.Sequential(nn.Linear(6, 3), Watched(3)).train()
    before = contents(teacher)
    fit(seeded(lambda: nn.Linear(6, 3)), points(), settings=Fit(loss="original", epochs=2, batch=32), teacher=teacher)
    assert set(modes) == {False}
    assert teacher.training
    assert contents(teacher) == before


def test_teacher_sees_the_shifted_images():
    module = seeded(per_pixel)
    settings = Fit(loss="original", epochs=1, batch=32, augmentation="shift")
    assert fit(module, pictures(), settings=settings, teacher=module).curve[0][1] < 1e-12
    labelled = Fit(epochs=1, batch=32)
    network = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    plain, moved = (fit(network, pictures(), settings=s).curve for s in (labelled, replace(labelled, augmentation="shift")))
    assert plain[0] != moved[0], "shift does something"


def test_frozen_parameters_stay():
    module = seeded(dense)
    module[0].weight.requires_grad_(False)
    fitted = fit(module, points(), settings=Fit(epochs=1)).module
    assert torch.equal(fitted[0].weight, module[0].weight)
    assert not torch.equal(fitted[4].weight, module[4].weight)


def test_works_where_gradients_are_off():
    with torch.no_grad():
        assert len(fit(seeded(dense), points(), settings=Fit(epochs=1)).curve) == 1


def test_shift_moves_each_image_by_whole_pixels():
    generator = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 2, 9, 9)
    image[0, 0, 4, 4], image[0, 1, 4, 5] = 1.0, 2.0
    moved = shift(image.repeat(2000, 1, 1, 1), most=2, generator=generator)
    places = moved[:, 0].flatten(1).argmax(1)
    assert torch.equal(moved[:, 1].flatten(1).argmax(1), places + 1), "channels move together"
    down, right = places // 9 - 4, places % 9 - 4
    counts = torch.bincount((down + 2) * 5 + right + 2, minlength=25)
    assert counts.sum() == 2000
    assert counts.min() > 50, "all 25 places, about 80 each"
    assert shift(torch.ones(3, 1, 4, 4), most=2, generator=generator).eq(1).all(), "the edge is repeated"


def test_progress_and_an_early_end():
    told = []
    settings = Fit(epochs=60, batch=32)
    fitted = fit(seeded(dense), points(), settings=settings, progress=lambda share, words: told.append((share, words)))
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert 60 <= len(told) <= 100
    assert told[-1][1].startswith("step 240 of 240, loss ")
    late = fit(seeded(dense), points(), settings=settings, after_step=lambda student, step, steps: True)
    assert (len(late.curve), late.steps) == (1, 240)
    assert late.curve[0] == fitted.curve[0]


def test_after_step_may_write_on_the_weights():
    calls = []

    def clear(student, step, steps):
        calls.append((step, steps, student.training))
        with torch.no_grad():
            student[0].weight[0].zero_()

    fitted = fit(seeded(dense), points(), settings=Fit(epochs=2, batch=32), after_step=clear)
    assert calls == [(step, 8, True) for step in range(1, 9)]
    assert not fitted.module[0].weight[0].any()
    assert fitted.module[0].weight[1].all()


def _spoilt(place):
    view = points()
    view.inputs[0][place] = np.nan
    return view


def test_nan_stops_at_the_very_step():
    view = _spoilt(7)
    with pytest.raises(Diverged, match=r"must stay finite, got a loss of nan .* at step \d of 40; lower learning_rate \(0.002\)"):
        fit(seeded(lambda: nn.Linear(6, 3)), view, settings=Fit(batch=32))
    with pytest.raises(Diverged, match=r"at step 1 of 10"):
        fit(seeded(lambda: nn.Linear(6, 3)), _spoilt(slice(None)), settings=Fit())


def test_nan_in_the_gradient_alone_stops_too():
    class Root(nn.Linear):
        def forward(self, x):
            return torch.sqrt(super().forward(x) * 0)

    view = line()
    with pytest.raises(Diverged, match=r"a loss of [\d.]+ with a gradient of norm nan at step 1 of"):
        fit(Root(6, 1), view, settings=Fit(loss="values"))
