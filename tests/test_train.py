"""The training loop and FineTune: exact, repeatable, and nobody else's network is written on."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.data import View
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context, Step, describe, part_from_json, part_to_json
from hasten.train import Diverged, FineTune, Fit, fit
from hasten.train.augment import shift


class Tokens(nn.Module):
    """Integers in, class scores out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens).mean(1))


class Several(nn.Module):
    """Two inputs; two outputs of very different size and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(5, 2)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        left = self.left(a)
        return left, 100 * self.right(b), left.argmax(1)


def _seeded(build, seed=0):
    torch.manual_seed(seed)
    return build().eval()


def _dense(classes=3):
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, classes))


def _image():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))


def _per_pixel():
    return nn.Conv2d(1, 3, 3, padding=1)


def _draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _points(n=150):
    x = _draw(n, 6)
    return View(inputs=(x,), labels=x[:, :3].argmax(1))


def _pictures(n=150):
    x = _draw(n, 1, 8, 8)
    return View(inputs=(x,), labels=np.digitize(x.mean((1, 2, 3)), [-0.05, 0.05]))


def _words(n=150):
    x = np.random.default_rng(0).integers(0, 12, (n, 5))
    return View(inputs=(x,), labels=np.digitize(x.mean(1), [4.5, 6.5]))


def _line(n=150):
    x = _draw(n, 6)
    return View(inputs=(x,), labels=x[:, 0] - 2.0 * x[:, 1])


CASES = {
    "classes": (_dense, _points(), Fit(epochs=6, batch=32, learning_rate=0.01)),
    "classes, sgd, smooth": (
        _dense,
        _points(),
        Fit(epochs=6, batch=32, optimizer="sgd", learning_rate=0.1, label_smoothing=0.1, schedule="cosine"),
    ),
    "probabilities": (
        lambda: nn.Sequential(_dense(), nn.Softmax(1)),
        _points(),
        Fit(epochs=6, batch=32, learning_rate=0.01, schedule="constant"),
    ),
    "images, shifted": (_image, _pictures(), Fit(epochs=6, batch=32, learning_rate=0.01, augmentation="shift")),
    "classes of pixels": (
        _per_pixel,
        View(inputs=(x := _draw(40, 1, 8, 8),), labels=np.digitize(x[:, 0], [-0.5, 0.5])),
        Fit(epochs=6, batch=8, learning_rate=0.05),
    ),
    "classes of words": (
        lambda: nn.Linear(6, 3),
        View(inputs=(x := _draw(40, 5, 6),), labels=x[:, :, :3].argmax(2)),
        Fit(epochs=6, batch=8, learning_rate=0.05),
    ),
    "tokens": (Tokens, _words(), Fit(epochs=6, batch=32, learning_rate=0.03)),
    "values": (lambda: _dense(1), _line(), Fit(loss="values", epochs=6, batch=32, learning_rate=0.03)),
    "original": (
        Several,
        View(inputs=(_draw(150, 6), _draw(150, 5))),
        Fit(loss="original", epochs=6, batch=32, learning_rate=0.03),
    ),
    "classes, distilled": (_dense, _points(), Fit(epochs=6, batch=32, learning_rate=0.01, distil=0.5)),
    "values, distilled": (
        lambda: _dense(1),
        _line(),
        Fit(loss="values", epochs=6, batch=32, learning_rate=0.03, distil=0.5),
    ),
    "shifted, distilled": (_image, _pictures(), Fit(epochs=6, batch=32, learning_rate=0.01, distil=1.0, augmentation="shift")),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(", ", "-"))
def case(request):
    build, view, settings = CASES[request.param]
    teacher = _seeded(build, 1) if settings.needs_teacher else None
    return _seeded(build), view, settings, teacher


def _bytes(module):
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


def test_laws_of_fit(case):
    module, view, settings, teacher = case
    before, taught = _bytes(module), _bytes(teacher) if teacher else None
    state = torch.get_rng_state()
    fitted = fit(module, view, settings=settings, teacher=teacher)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is restored"
    assert _bytes(module) == before, "the user's network is as it was"
    assert all(p.grad is None for p in [*module.parameters(), *fitted.module.parameters()])
    assert not module.training
    assert not fitted.module.training
    assert teacher is None or (_bytes(teacher) == taught and not teacher.training)
    torch.manual_seed(99)
    again = fit(module, view, settings=settings, teacher=teacher)
    assert _bytes(again.module) == _bytes(fitted.module), "same seed, same bytes"
    assert again.curve == fitted.curve
    other = fit(module, view, settings=replace(settings, seed=1), teacher=teacher)
    assert _bytes(other.module) != _bytes(fitted.module), "the seed matters"
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
    module, teacher, view = _seeded(lambda: nn.Linear(6, 3)), _seeded(lambda: nn.Linear(6, 3), 1), _points()
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
    module, teacher = _seeded(lambda: nn.Linear(6, 1)), _seeded(lambda: nn.Linear(6, 1), 1)
    view = _line()
    x = torch.from_numpy(view.inputs[0])
    z, t = (m(x).detach().numpy()[:, 0] for m in (module, teacher))
    want = ((1 - distil) * ((z - view.labels) ** 2).mean() + distil * ((z - t) ** 2).mean()) / view.labels.var()
    settings = Fit(loss="values", distil=distil)
    assert _first_loss(module, view, settings, teacher if distil else None) == pytest.approx(want, rel=1e-5)


def test_loss_of_original_weighs_outputs_by_their_variance():
    module, teacher = _seeded(Several), _seeded(Several, 1)
    view = CASES["original"][1]
    inputs = [torch.from_numpy(a) for a in view.inputs]
    pairs = [(z.detach().numpy(), t.detach().numpy()) for z, t in zip(module(*inputs), teacher(*inputs), strict=True)][:2]
    want = np.mean([((z - t) ** 2).mean() / t.var(0).mean() for z, t in pairs])
    assert _first_loss(module, view, Fit(loss="original"), teacher) == pytest.approx(want, rel=1e-5)


def test_probabilities_learn_as_their_logits_would():
    logits = _seeded(lambda: nn.Linear(6, 3))
    settings = Fit(epochs=4, batch=32, learning_rate=0.01, distil=0.5)
    shares = fit(nn.Sequential(logits, nn.Softmax(1)), _points(), settings=settings, teacher=logits)
    plain = fit(logits, _points(), settings=settings, teacher=nn.Sequential(logits, nn.Softmax(1)))
    assert torch.allclose(shares.module[0].weight, plain.module.weight, atol=1e-5)


@pytest.mark.parametrize("kept_bytes", [0, 1 << 28])
@pytest.mark.parametrize("n", [10, 64, 150])
def test_teacher_asked_once_or_at_every_step_is_the_same(kept_bytes, n, monkeypatch):
    monkeypatch.setattr("hasten.train.objective._KEPT_BYTES", kept_bytes)
    asked = []
    teacher = _seeded(lambda: nn.Linear(6, 3), 1)

    class Counted(nn.Linear):
        def forward(self, x):
            asked.append(len(x))
            return super().forward(x)

    counted = Counted(6, 3).eval()
    counted.load_state_dict(teacher.state_dict())
    settings = Fit(loss="original", epochs=5, batch=32)
    fitted = fit(_seeded(lambda: nn.Linear(6, 3)), _points(n), settings=settings, teacher=counted)
    assert len(set(asked)) == 1, "whole batches only"
    assert (len(asked) == 1 + math.ceil(n / min(n, 32))) == bool(kept_bytes)
    x = torch.from_numpy(_points(n).inputs[0])
    assert F.mse_loss(fitted.module(x), teacher(x)) < F.mse_loss(_seeded(lambda: nn.Linear(6, 3))(x), teacher(x))


def test_distillation_moves_towards_the_teacher_and_not_the_labels():
    view, teacher = _points(), _seeded(_dense, 5)
    student = _seeded(_dense)
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
    module, view = _seeded(lambda: nn.Linear(6, 1)), _line()
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
    view = View(inputs=(_draw(64, 6),), labels=np.full(64, 3.0))
    curve = fit(_seeded(lambda: nn.Linear(6, 1)), view, settings=Fit(loss="values", epochs=60, learning_rate=0.1)).curve
    assert curve[-1][1] < 0.1 * curve[0][1] < math.inf


def test_scale_of_the_original_comes_from_all_over_the_data():
    x = np.sort(_draw(6400, 1), 0)
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
    before = _bytes(teacher)
    fit(_seeded(lambda: nn.Linear(6, 3)), _points(), settings=Fit(loss="original", epochs=2, batch=32), teacher=teacher)
    assert set(modes) == {False}
    assert teacher.training
    assert _bytes(teacher) == before


def test_teacher_sees_the_shifted_images():
    module = _seeded(_per_pixel)
    settings = Fit(loss="original", epochs=1, batch=32, augmentation="shift")
    assert fit(module, _pictures(), settings=settings, teacher=module).curve[0][1] == 0
    labelled = Fit(epochs=1, batch=32)
    network = _seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    plain, moved = (fit(network, _pictures(), settings=s).curve for s in (labelled, replace(labelled, augmentation="shift")))
    assert plain[0] != moved[0], "shift does something"


def test_frozen_parameters_stay():
    module = _seeded(_dense)
    module[0].weight.requires_grad_(False)
    fitted = fit(module, _points(), settings=Fit(epochs=1)).module
    assert torch.equal(fitted[0].weight, module[0].weight)
    assert not torch.equal(fitted[4].weight, module[4].weight)


def test_works_where_gradients_are_off():
    with torch.no_grad():
        assert len(fit(_seeded(_dense), _points(), settings=Fit(epochs=1)).curve) == 1


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
    fitted = fit(_seeded(_dense), _points(), settings=settings, progress=lambda share, words: told.append((share, words)))
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert 60 <= len(told) <= 100
    assert told[-1][1].startswith("step 240 of 240, loss ")
    late = fit(_seeded(_dense), _points(), settings=settings, after_step=lambda student, step, steps: True)
    assert (len(late.curve), late.steps) == (1, 240)
    assert late.curve[0] == fitted.curve[0]


def test_after_step_may_write_on_the_weights():
    calls = []

    def clear(student, step, steps):
        calls.append((step, steps, student.training))
        with torch.no_grad():
            student[0].weight[0].zero_()

    fitted = fit(_seeded(_dense), _points(), settings=Fit(epochs=2, batch=32), after_step=clear)
    assert calls == [(step, 8, True) for step in range(1, 9)]
    assert not fitted.module[0].weight[0].any()
    assert fitted.module[0].weight[1].all()


def _spoilt(place):
    view = _points()
    view.inputs[0][place] = np.nan
    return view


def test_nan_stops_at_the_very_step():
    view = _spoilt(7)
    with pytest.raises(Diverged, match=r"must stay finite, got a loss of nan .* at step \d of 40; lower learning_rate \(0.002\)"):
        fit(_seeded(lambda: nn.Linear(6, 3)), view, settings=Fit(batch=32))
    with pytest.raises(Diverged, match=r"at step 1 of 10"):
        fit(_seeded(lambda: nn.Linear(6, 3)), _spoilt(slice(None)), settings=Fit())


def test_nan_in_the_gradient_alone_stops_too():
    class Root(nn.Linear):
        def forward(self, x):
            return torch.sqrt(super().forward(x) * 0)

    view = _line()
    with pytest.raises(Diverged, match=r"a loss of [\d.]+ with a gradient of norm nan at step 1 of"):
        fit(Root(6, 1), view, settings=Fit(loss="values"))


LINEAR = nn.Linear(6, 3)
REFUSALS = [
    (lambda: fit(LINEAR, _points(1), settings=Fit()), DataRefused, "at least 2 examples, got 1"),
    (lambda: fit(LINEAR, View(inputs=(_draw(9, 6),)), settings=Fit()), DataRefused, "'classes' needs labels, got none"),
    (lambda: fit(LINEAR, _line(), settings=Fit()), DataRefused, "needs integer labels, got float32"),
    (lambda: fit(nn.Linear(6, 2), _points(), settings=Fit()), DataRefused, r"must lie in 0 … 1, got 0 … 2"),
    (
        lambda: fit(LINEAR, View(inputs=(_draw(9, 6),), labels=np.zeros((9, 2), int)), settings=Fit()),
        DataRefused,
        "without the classes' axis, got labels \\(9, 2\\) and outputs \\('n', 3\\)",
    ),
    (lambda: fit(nn.Linear(6, 1), _points(), settings=Fit()), Unsupported, "one output per class, got 1"),
    (lambda: fit(LINEAR, _line(), settings=Fit(loss="values")), DataRefused, r"as many values as the outputs \(128, 3\)"),
    (lambda: fit(LINEAR, _points(), settings=Fit(loss="original")), UsageError, "needs a teacher, got none"),
    (lambda: fit(LINEAR, _points(), settings=Fit(), teacher=LINEAR), UsageError, "no use of the teacher; set distil above 0"),
    (
        lambda: fit(LINEAR, _points(), settings=Fit(distil=0.5), teacher=nn.Linear(6, 4)),
        UsageError,
        r"of the network's shapes \[\(128, 3\)\], got \[\(128, 4\)\]",
    ),
    (lambda: fit(LINEAR, _points(), settings=Fit(augmentation="shift")), UsageError, r"shift needs images .*, got \(150, 6\)"),
    (lambda: fit(nn.ReLU(), _points(), settings=Fit()), Unsupported, "requires_grad=True, the network has none"),
    (lambda: fit(nn.LSTM(6, 3), _points(), settings=Fit()), Unsupported, "returns a tensor or a tuple of tensors"),
    (
        lambda: fit(nn.Sequential(LINEAR, Argmax()), _points(), settings=Fit(loss="original"), teacher=nn.Sequential(Argmax())),
        Unsupported,
        "all of them are integers",
    ),
    (lambda: fit(Aside(), _points(), settings=Fit()), Unsupported, "outputs that depend on the parameters, these do not"),
]


class Argmax(nn.Module):
    def forward(self, x):
        return x.argmax(1)


class Aside(nn.Linear):
    """Its parameters reach no output."""

    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, x):
        return x[:, :3] + 0


@pytest.mark.parametrize(("call", "kind", "words"), REFUSALS, ids=lambda value: value if isinstance(value, str) else "")
def test_refusals_of_fit(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"loss": "hinge"}, r"loss must be one of \['classes', 'values', 'original'\], got 'hinge'"),
        ({"optimizer": "adam"}, "optimizer must be one of"),
        ({"schedule": "steep"}, "schedule must be one of"),
        ({"augmentation": "flip"}, "augmentation must be one of"),
        ({"epochs": 0}, "epochs must be a finite number above 0, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number above 0, got nan"),
        ({"temperature": math.inf}, "temperature must be a finite number above 0, got inf"),
        ({"batch": 0}, "batch must be at least 1, or None for all, got 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
        ({"warm_up": 1.0}, r"warm_up must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -1}, r"label_smoothing must be in \[0, 1\), got -1"),
        ({"distil": 1.2}, r"distil must be in \[0, 1\], got 1.2"),
        ({"clip": 0}, "clip must be above 0, got 0"),
        ({"loss": "original", "distil": 0.5}, "must be 0 with the loss 'original', got 0.5"),
        ({"loss": "values", "label_smoothing": 0.1}, "label_smoothing must be 0 with the loss 'values', got 0.1"),
    ],
    ids=str,
)
def test_settings_out_of_range(wrong, words):
    with pytest.raises(UsageError, match=words):
        Fit(**wrong)


def _network(module, **facts):
    return Network(kind="module", body=module, example=(_draw(2, 6),), **facts)


def _context(view=None, **facts):
    view = view or _points()
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
    space = FineTune.space(_network(_seeded(_dense)))
    assert {name: values[0] for name, values in space.items()} == {name: getattr(FineTune(), name) for name in space}
    for name, values in space.items():
        assert [getattr(FineTune(**{name: value}), name) for value in values] == list(values)


def test_finetune_trains_a_copy_from_the_context_s_seed():
    module, original = _seeded(_dense), _network(_seeded(_dense, 1))
    network, before = _network(module), _bytes(module)
    told = []
    context = _context(original=original, seed=3, progress=lambda *word: told.append(word))
    tuned = FineTune().apply(network, context)
    assert _bytes(module) == before
    assert (network.body, tuned.example, tuned.kind) == (module, network.example, "module")
    assert _bytes(tuned.module) == _bytes(FineTune().apply(network, context).module) != before
    assert _bytes(tuned.module) != _bytes(FineTune().apply(network, replace(context, seed=4)).module)
    assert told[-1][0] == 1.0


def test_finetune_hands_its_settings_on(monkeypatch):
    seen = []
    monkeypatch.setattr("hasten.train.finetune.fit", lambda module, view, **rest: seen.append(rest) or fit(module, view, **rest))
    step = FineTune(epochs=2, learning_rate=3e-3, batch=16, distil=0.9, temperature=4.0)
    network = _network(_seeded(_dense))
    step.apply(network, _context(original=network, seed=5))
    same = {"epochs": 2, "batch": 16, "learning_rate": 3e-3, "weight_decay": 0.0, "temperature": 4.0}
    assert seen[0]["settings"] == Fit(**same, distil=0.9, seed=5)
    assert seen[0]["teacher"] is network.module
    step.apply(network, _context(original=network, loss="original"))
    assert seen[1]["settings"] == Fit(**same, loss="original")


def test_finetune_short_takes_a_quarter_of_the_epochs():
    steps = {}
    for fidelity in ("short", "long"):
        told = []
        context = _context(fidelity=fidelity, progress=lambda *word, told=told: told.append(word))
        FineTune(epochs=8, batch=32, distil=0).apply(_network(_seeded(_dense)), context)
        steps[fidelity] = told[-1][1].split(",")[0]
    assert steps == {"short": "step 8 of 8", "long": "step 32 of 32"}


def test_finetune_without_labels_learns_the_original():
    original = _seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), 1)
    damaged = copy.deepcopy(original)
    with torch.no_grad():
        damaged[0].weight[:4] = 0
    view = View(inputs=_points().inputs)
    context = _context(view, original=_network(original), loss="original")
    tuned = FineTune(epochs=20, learning_rate=3e-3).apply(_network(damaged), context).module
    x = torch.from_numpy(view.inputs[0])
    assert F.mse_loss(tuned(x), original(x)) < 0.3 * F.mse_loss(damaged(x), original(x))


def test_finetune_takes_tokens():
    network = Network(kind="module", body=_seeded(Tokens), example=(_words(2).inputs[0],))
    tuned = FineTune().apply(network, _context(_words(), original=network))
    assert _bytes(tuned.module) != _bytes(network.module)


def test_finetune_keeps_a_fixed_batch():
    class Rigid(nn.Linear):
        def forward(self, x):
            assert len(x) == 40
            return super().forward(x)

    network = _network(Rigid(6, 3), fixed_batch=40)
    FineTune().apply(network, _context(original=network))
    with pytest.raises(Unsupported, match="takes 40 examples at once, the training data has 30"):
        FineTune().apply(network, _context(_points(30), original=network))


@pytest.mark.parametrize("use", ["apply", "space"])
@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Network(kind="graph", body=None, example=(_draw(2, 6),)), "needs a torch module, this network is an ONNX graph"),
        (_network(nn.Linear(6, 3), fixed_batch=1), "one example at a time; re-export with a dynamic batch"),
        (_network(nn.ReLU()), "requires_grad=True, the network has none"),
    ],
    ids=["graph", "batch of one", "nothing to train"],
)
def test_refusals_of_finetune(network, words, use):
    with pytest.raises(Unsupported, match=words):
        FineTune().apply(network, _context(original=network)) if use == "apply" else FineTune.space(network)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "the original as a torch module, it has none; set distil=0"),
        ({"loss": "original"}, "it has none; there is no other way without labels"),
        ({"original": Network(kind="graph", body=None, example=(_draw(2, 6),))}, "it has none; set distil=0"),
    ],
    ids=["none", "no labels either", "a graph"],
)
def test_finetune_refuses_to_distil_without_the_original(facts, words):
    with pytest.raises(Unsupported, match=words):
        FineTune().apply(_network(_seeded(_dense)), _context(**facts))
