"""The loop: equal to one written by hand, off changes no byte, ends where it should, and says where a NaN was born."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hasten import optim
from hasten.core.data import View
from hasten.core.errors import BackendMissing, DataRefused, Unsupported, UsageError
from hasten.train import Augment, Average, Checkpoints, Clip, Diverged, Fit, Health, Precision, Stop, Trainer, fit
from hasten.train.health import trend
from hasten.train.schedules import Linear
from lessons import contents, dense, draw, image, pictures, plain, points, seeded

BASE = Fit(epochs=3, batch=32, learning_rate=0.01)


def test_the_loop_equals_one_written_by_hand():
    view, module = points(), seeded(dense)
    found = fit(module, view, settings=replace(BASE, clip=math.inf))
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    module.train()
    optimizer = optim.AdamW(
        [{"params": [p for p in module.parameters() if (p.ndim >= 2) == wide], "weight_decay": 0.01 * wide} for wide in (True, False)]
    )
    x, y = torch.from_numpy(view.inputs[0]), torch.from_numpy(view.labels)
    step = 0
    for _ in range(3):
        order = torch.randperm(150, generator=generator)
        for index in order[:128].split(32):
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * step / 3 if step <= 2 else 0.01 * ((12 - step + 1) / 10)
            optimizer.zero_grad()
            F.cross_entropy(module(x[index]), y[index]).backward()
            optimizer.step()
    assert contents(found.module) == contents(module)


IDLE = {
    "one part": {"accumulate": 1},
    "looking at layers": {"health": Health(every=1)},
    "ready to skip": {"health": Health(nonfinite="skip")},
    "ready to go back": {"health": Health(nonfinite="roll back", snapshot=2)},
    "recomputed activations": {"precision": Precision(checkpoint=2)},
    "recomputed by name": {"precision": Precision(checkpoint=("1", "4"))},
    "equal rates": {"rates": (("0", 1.0),)},
    "no limits reached": {"stop": Stop(seconds=3600, loss=-1, change=0)},
    "steps for epochs": {"stop": Stop(steps=12)},
    "schedule written out": {"schedule": Linear()},
    "clip written out": {"clip": Clip(by="norm", at=1.0)},
    "augmentation written out": {"augmentation": Augment()},
    "whole images": {"augmentation": Augment(resize=1.0)},
    "average of nothing": {"average": None},
}


@pytest.mark.parametrize("idle", IDLE.values(), ids=IDLE)
@pytest.mark.parametrize("build", [dense, image], ids=["dense", "image"])
def test_what_is_off_changes_no_byte(idle, build):
    view = points() if build is dense else pictures()
    assert contents(fit(seeded(build), view, settings=replace(BASE, **idle)).module) == contents(
        fit(seeded(build), view, settings=BASE).module
    )


def test_looking_and_saving_change_no_byte(tmp_path):
    plain_ = fit(seeded(dense), points(), settings=BASE).module
    trainer = Trainer(settings=BASE, validation=points(40, seed=1), checkpoints=Checkpoints(folder=tmp_path, steps=1))
    assert contents(trainer.fit(seeded(dense), points()).module) == contents(plain_)


def test_the_law_of_idle_settings_can_fail():
    assert contents(fit(seeded(dense), points(), settings=replace(BASE, clip=0.1)).module) != contents(
        fit(seeded(dense), points(), settings=BASE).module
    )


def test_short_name_of_shift_is_the_setting():
    settings = [replace(BASE, augmentation=a) for a in ("shift", Augment(shift=2))]
    one, other = (contents(fit(seeded(image), pictures(), settings=s).module) for s in settings)
    assert one == other


def test_full_batch_descends_to_the_least_squares_solution():
    x = draw(30, 2)
    y = x @ np.array([[2.0], [-1.0]], dtype=np.float32) + 0.5
    settings = Fit(
        loss="values",
        batch=None,
        epochs=3000,
        optimizer=torch.optim.SGD,
        learning_rate=0.3,
        schedule="constant",
        warm_up=0,
        weight_decay=0,
        clip=math.inf,
        stop=Stop(change=1e-7),
    )
    fitted = fit(seeded(lambda: nn.Linear(2, 1)), View(inputs=(x,), labels=y), settings=settings)
    assert "changed by at most" in fitted.ended or fitted.curve[-1][1] < 1e-10
    assert len(fitted.curve) < 3000
    assert fitted.module.weight.detach().numpy() == pytest.approx(np.array([[2.0, -1.0]]), abs=1e-2)


def test_single_examples():
    fitted = fit(seeded(plain), points(60), settings=replace(BASE, batch=1, epochs=1))
    assert len(fitted.curve) == 60
    with pytest.raises(Unsupported, match=r"a batch norm.*needs more than one value per channel.*batch=1"):
        fit(seeded(dense), points(60), settings=replace(BASE, batch=1))


def test_threshold_of_the_loss_ends_after_a_pass():
    fitted = fit(seeded(plain), points(), settings=replace(BASE, epochs=50, stop=Stop(loss=0.4)))
    means = [np.mean([loss for _, loss in fitted.curve[i : i + 4]]) for i in range(0, len(fitted.curve), 4)]
    assert len(fitted.curve) < fitted.steps
    assert means[-1] <= 0.4 < means[-2]
    assert "reached 0.4" in fitted.ended


def test_seconds_end_it():
    fitted = fit(seeded(plain), points(), settings=replace(BASE, epochs=1e6, stop=Stop(seconds=0.05)))
    assert fitted.ended == "0.05 seconds were over"
    assert fitted.seconds >= 0.05
    assert len(fitted.curve) < fitted.steps


def test_patience_brings_back_the_best_weights():
    noise = View(inputs=(draw(60, 6),), labels=np.random.default_rng(0).integers(0, 3, 60))  # only over-fitting can come of it
    validation = View(inputs=(draw(60, 6, seed=1),), labels=np.random.default_rng(1).integers(0, 3, 60))
    settings = Fit(epochs=200, batch=20, learning_rate=0.02, schedule="constant", stop=Stop(patience=3))
    fitted = Trainer(settings=settings, validation=validation).fit(seeded(plain), noise)
    assert "3 looks at the validation data" in fitted.ended
    x, y = torch.from_numpy(validation.inputs[0]), torch.from_numpy(validation.labels)
    assert F.cross_entropy(fitted.module(x), y).item() == pytest.approx(min(fitted.looks), rel=1e-5)
    assert min(fitted.looks) < fitted.looks[-1]


def test_parts_of_a_batch_add_up_by_their_targets():
    view = points(40)
    labels = view.labels.copy()
    labels[::3] = -100  # left out: parts have different numbers of targets
    view = View(inputs=view.inputs, labels=labels)
    settings = Fit(epochs=2, batch=40, balance=(1.0, 2.0, 0.5))
    whole = fit(seeded(plain), view, settings=settings)
    parts = fit(seeded(plain), view, settings=replace(settings, accumulate=7))
    assert [loss for _, loss in parts.curve] == pytest.approx([loss for _, loss in whole.curve], rel=1e-5)
    for mine, theirs in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_penalties_are_the_gradient_of_their_formula():
    view, module = points(), seeded(plain)
    settings = Fit(epochs=1, batch=None, optimizer=torch.optim.SGD, learning_rate=1.0, warm_up=0, weight_decay=0, clip=math.inf)
    bare, penal = (fit(module, view, settings=replace(settings, penalty=p)).module for p in ((0.0, 0.0), (0.1, 0.3)))
    for before, one, other in zip(module.parameters(), bare.parameters(), penal.parameters(), strict=True):
        want = 0.1 * before.sign() + 0.3 * before if before.ndim >= 2 else torch.zeros_like(before)
        assert torch.allclose(one - other, want, atol=1e-6)


def gradients(*values):
    found = []
    for weight, gradient in values:
        parameter = nn.Parameter(torch.tensor(weight))
        parameter.grad = torch.tensor(gradient)
        found.append(parameter)
    return found


def test_clip_is_its_formula():
    by_value = gradients(([1.0, 1.0], [3.0, -0.5]))
    assert Clip(by="value", at=1.0)(by_value) == pytest.approx(math.hypot(3, 0.5))
    assert by_value[0].grad.tolist() == [1.0, -0.5]
    by_norm = gradients(([1.0, 1.0], [3.0, 0.0]), ([1.0], [4.0]))
    assert Clip(by="norm", at=1.0)(by_norm) == pytest.approx(5.0)
    assert [p.grad.norm().item() for p in by_norm] == pytest.approx([0.6, 0.8], rel=1e-4)
    adaptive = gradients(([[3.0, 4.0], [0.0, 0.0]], [[5.0, 0.0], [0.03, 0.04]]))
    Clip(by="adaptive", at=0.1)(adaptive)
    assert adaptive[0].grad.numpy() == pytest.approx(np.array([[0.5, 0.0], [0.00006, 0.00008]]), rel=1e-5)


def deep(gain):
    layers = [nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh() if gain < 1 else nn.Identity()) for _ in range(12)]
    for layer in layers:
        nn.init.orthogonal_(layer[0].weight, gain=gain)
    return nn.Sequential(*layers, nn.Linear(6, 3))


@pytest.mark.parametrize(("gain", "what", "layer"), [(0.1, "vanishing", "0.0"), (6.0, "exploding", "0.0")])
def test_sick_gradients_are_named_by_layer_and_step(gain, what, layer):
    settings = replace(BASE, health=Health(every=2), clip=1.0, learning_rate=1e-6)
    found = fit(seeded(lambda: deep(gain)), points(), settings=settings).findings
    assert (found[0].step, found[0].layer, found[0].what) == (2, layer, what)
    assert f"step 2: the gradient of '{layer}' is {what}" in str(found[0])
    assert not fit(seeded(lambda: deep(1.0)), points(), settings=settings).findings


class Faulty(nn.Module):
    """Gives NaN, or a gradient of NaN, at its n-th call."""

    def __init__(self, at: tuple[int, ...], back: bool = False) -> None:
        super().__init__()
        self.at, self.back, self.calls = at, back, 0
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.calls += 1
        if self.calls not in self.at:
            return x * self.scale
        return (x * 0).sqrt() * self.scale + x if self.back else x * math.nan


def faulty(*at, back=False):
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), Faulty(at, back), nn.BatchNorm1d(16), nn.Linear(16, 3))


def test_the_layer_where_a_nan_is_born_is_named():
    with pytest.raises(Diverged, match=r"at step 3 of 12; .*: it comes from the layer '2'"):
        fit(seeded(lambda: faulty(3)), points(), settings=BASE)
    with pytest.raises(Diverged, match=r"at step 3 of 12; .*: it comes from the gradient of the layer '(1|0)'"):
        fit(seeded(lambda: faulty(3, back=True)), points(), settings=BASE)
    sick = points()
    sick.inputs[0][7] = math.nan
    with pytest.raises(Diverged, match="it comes from the inputs"):
        fit(seeded(plain), sick, settings=BASE)
    broken = seeded(plain)
    with torch.no_grad():
        broken[2].weight[0, 0] = math.inf
    with pytest.raises(Diverged, match=r"it comes from the weights '2\.weight'"):
        fit(broken, points(), settings=BASE)


def test_skip_leaves_out_the_step_and_keeps_the_statistics():
    fitted = fit(seeded(lambda: faulty(3)), points(), settings=replace(BASE, health=Health(nonfinite="skip")))
    assert [step for step, _ in fitted.curve] == [1, 2, *range(4, 13)]
    assert all(torch.isfinite(value).all() for value in fitted.module.state_dict().values())
    assert "a step was skipped: got a loss of nan" in fitted.notes[0]
    assert "the layer '2'" in fitted.notes[0]
    with pytest.raises(Diverged, match="at step 3"):
        fit(seeded(lambda: faulty(1, 2, 3)), points(), settings=replace(BASE, health=Health(nonfinite="skip", most=2)))


def test_roll_back_goes_on_from_the_copy_at_half_the_rate():
    seen = []
    settings = replace(BASE, schedule="constant", warm_up=0.0, health=Health(nonfinite="roll back", snapshot=2))
    fitted = Trainer(settings=settings, watch=seen.append).fit(seeded(lambda: faulty(4)), points())
    assert [r.step for r in seen] == [1, 2, 3, 2, *range(3, 13)]
    assert [r.rate for r in seen] == [0.01] * 4 + [0.005] * 10
    assert "went back to step 2 and to 0.5 of the learning rate" in fitted.notes[0]
    assert all(math.isfinite(loss) for _, loss in fitted.curve)


def test_trend_says_how_it_ended():
    rng = np.random.default_rng(0)
    assert trend(list(1 + 0.1 * rng.normal(size=500))) == "settled"
    assert trend(list(np.linspace(1, 2, 500) + 0.1 * rng.normal(size=500))) == "rising"
    assert trend([1.0] * 19) == "too short"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Precision(format="int8"), "format must be one of"),
        (lambda: Precision(checkpoint=0), "checkpoint must be at least 1"),
        (lambda: Average(kind="mean"), "kind must be one of"),
        (lambda: Average(decay=1), "decay must be between 0 and 1, got 1"),
        (lambda: Average(start=1), r"start must be in \[0, 1\), got 1"),
        (lambda: Average(recalibrate=-1), "recalibrate must be at least 0, got -1"),
        (lambda: Clip(by="layer"), "by must be one of"),
        (lambda: Clip(by="value", at=0), "clip must be above 0, got 0"),
        (lambda: Health(nonfinite="ignore"), "nonfinite must be one of"),
        (lambda: Health(most=0), "most must be at least 1, got 0"),
        (lambda: Health(vanishing=0), "vanishing must be a finite number above 0, got 0"),
        (lambda: Fit(accumulate=0), "accumulate must be at least 1, got 0"),
        (lambda: Fit(penalty=(-1.0, 0.0)), "penalty must be two finite numbers"),
        (lambda: Fit(rates=(("a", 0.0),)), "the factor of 'a' in rates must be a finite number above 0, got 0.0"),
        (lambda: Fit(loss="values", balance="weights"), "balance is of classes"),
        (lambda: Fit(learning_rate="fast"), "learning_rate must be a number or 'auto', got 'fast'"),
        (lambda: Trainer(device="abacus").fit(plain(), points()), "device must be one of cpu, cuda, mps, tpu, xla"),
        (lambda: fit(plain(), points(), settings=Fit(balance=(1.0, 2.0))), "one weight of at least 0 for each of 3 classes"),
        (lambda: fit(plain(), points(), settings=Fit(optimizer=lambda groups, lr: None)), "must make a torch.optim.Optimizer"),
    ],
)
def test_refusals(wrong, words):
    with pytest.raises((UsageError, DataRefused), match=words):
        wrong()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here():
    with pytest.raises(BackendMissing, match=r"the device cuda is not here: torch .* sees no CUDA device; use cpu"):
        Trainer(device="cuda").fit(plain(), points())
