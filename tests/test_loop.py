"""The loop: equal to one written by hand, off changes no byte, ends where it should, and says where a NaN was born."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hasten import optim
from hasten.core.data import View
from hasten.core.errors import BackendMissing, DataRefused, Unsupported, UsageError
from hasten.train import Augment, Average, Checkpoints, Clip, Diverged, Fit, Health, Precision, Stop, Trainer, fit
from hasten.train.health import trend
from hasten.train.loop import _tensors
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


# When a training ends


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


# Gradients


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


# Data


def test_balanced_sampling_draws_classes_equally():
    view = View(inputs=(draw(1000, 6),), labels=(np.arange(1000) % 10 == 0).astype(int))
    drawn = []

    class Counting(nn.Linear):
        def forward(self, x):
            drawn.append(x[:, 0]) if self.training else None
            return super().forward(x)

    fit(seeded(lambda: Counting(6, 2)), view, settings=Fit(epochs=4, batch=100, balance="sampling"))
    rare = set(view.inputs[0][view.labels == 1, 0].tolist())
    share = np.mean([value in rare for value in torch.cat(drawn).tolist()])
    assert share == pytest.approx(0.5, abs=0.05)


def test_balance_by_weights_is_the_weighted_mean():
    view = View(inputs=(draw(90, 6),), labels=(np.arange(90) % 9 == 0).astype(int))
    module = seeded(lambda: nn.Linear(6, 2))
    loss = fit(module, view, settings=Fit(epochs=1, batch=None, balance="weights")).curve[0][1]
    want = F.cross_entropy(module(torch.from_numpy(view.inputs[0])), torch.from_numpy(view.labels), torch.tensor([90 / 160, 4.5]))
    assert loss == pytest.approx(want.item(), rel=1e-5)


def test_a_loader_trains_like_the_data_in_memory():
    view = points(128)
    dataset = TensorDataset(torch.from_numpy(view.inputs[0]), torch.from_numpy(view.labels))
    settings = replace(BASE, batch=None, epochs=5)
    whole = fit(seeded(plain), view, settings=settings)
    streamed = Trainer(settings=replace(settings, batch=128)).fit(seeded(plain), DataLoader(dataset, batch_size=128))
    assert [loss for _, loss in streamed.curve] == pytest.approx([loss for _, loss in whole.curve], rel=1e-4)
    with pytest.raises(DataRefused, match="the stream must give batches, got none"):
        Trainer(settings=BASE).fit(seeded(plain), [])
    with pytest.raises(UsageError, match=r"must begin anew for every pass, got an iterator \(generator\)"):
        Trainer(settings=BASE).fit(seeded(plain), (batch for batch in dataset))


def test_arrays_train_like_their_view():
    view = points()
    pair = (view.inputs[0], view.labels)
    found = Trainer(settings=BASE, validation=pair).fit(seeded(plain), pair)
    assert contents(found.module) == contents(fit(seeded(plain), view, settings=BASE).module)
    assert len(found.looks) == 3


def test_a_view_on_disk_that_does_not_fit_is_read_from_there(tmp_path, monkeypatch):
    points().save(tmp_path)
    view = View.load(tmp_path)
    monkeypatch.setattr("hasten.train.loop.room_bytes", lambda: 10)
    assert _tensors(view, torch.device("cpu"))[0].data_ptr() == view.inputs[0].ctypes.data, "the file itself"
    assert contents(fit(seeded(plain), view, settings=BASE).module) == contents(fit(seeded(plain), points(), settings=BASE).module)


@pytest.mark.parametrize("settings", [BASE, replace(BASE, distil=0.5), replace(BASE, batch=None)], ids=["labels", "teacher", "whole"])
def test_the_data_are_neither_copied_nor_written_on(settings):
    view = points()
    for array in view.inputs:
        array.flags.writeable = False
    before = [array.copy() for array in view.inputs]
    assert _tensors(view, torch.device("cpu"))[0].data_ptr() == view.inputs[0].ctypes.data
    at_work = seeded(lambda: nn.Sequential(nn.ReLU(inplace=True), *plain()))  # its first layer writes on what it is given
    Trainer(settings=settings, validation=view, teacher=at_work if settings.distil else None).fit(at_work, view)
    assert all(np.array_equal(a, b) for a, b in zip(view.inputs, before, strict=True))


def test_a_stream_refuses_what_needs_single_examples():
    batches = [(torch.zeros(4, 6), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(UsageError, match="this is a stream; give a View"):
        Trainer(settings=replace(BASE, balance="sampling")).fit(seeded(plain), batches)

    class Endless:
        def __iter__(self):
            while True:
                yield batches[0]

    with pytest.raises(UsageError, match=r"needs stop=Stop\(steps=…\)"):
        Trainer(settings=BASE).fit(seeded(plain), Endless())
    assert len(Trainer(settings=replace(BASE, stop=Stop(steps=5))).fit(seeded(plain), Endless()).curve) == 5


def test_frozen_layers_stay_and_rates_scale():
    module = seeded(dense)
    fitted = fit(module, points(), settings=replace(BASE, freeze=("0", "1")))
    for name, value in module.state_dict().items():
        assert torch.equal(value, fitted.module.state_dict()[name]) == name.startswith(("0", "1"))
    assert all(p.requires_grad for p in fitted.module.parameters())
    step = Fit(epochs=1, batch=None, optimizer=torch.optim.SGD, learning_rate=0.1, warm_up=0, weight_decay=0, clip=math.inf)
    module = seeded(plain)
    one, other = (fit(module, points(), settings=replace(step, rates=r)).module for r in ((), (("2", 0.5),)))
    for name, value in module.state_dict().items():
        factor = 0.5 if name.startswith("2") else 1.0
        assert torch.allclose(other.state_dict()[name] - value, factor * (one.state_dict()[name] - value), atol=1e-6)
    with pytest.raises(UsageError, match=r"no layer is named '0\.weigh'; the nearest are"):
        fit(module, points(), settings=replace(BASE, freeze=("0.weigh",)))


# Precision, memory, averages


@pytest.mark.parametrize("format", ["bfloat16", "float16"])
def test_16_bits_stay_near_32(format):
    settings = replace(BASE, epochs=10)
    whole, half = (fit(seeded(plain), points(), settings=replace(settings, precision=p)) for p in (Precision(), Precision(format=format)))
    assert half.curve[-1][1] == pytest.approx(whole.curve[-1][1], abs=0.1)
    assert half.curve != whole.curve
    assert all(p.dtype == torch.float32 for p in half.module.parameters())


def test_channels_last_changes_the_layout_alone():
    settings = replace(BASE, precision=Precision(channels_last=True))
    one, other = (fit(seeded(image), pictures(), settings=s) for s in (BASE, settings))
    assert [loss for _, loss in one.curve] == pytest.approx([loss for _, loss in other.curve], rel=1e-3)


def test_checkpointed_layers_keep_less_for_the_way_back():
    def kept(precision):
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.nbytes
            return tensor

        wide = seeded(lambda: nn.Sequential(*(nn.Sequential(nn.Linear(6, 512), nn.ReLU(), nn.Linear(512, 6)) for _ in range(3))))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fit(wide, points(), settings=Fit(epochs=1, batch=128, precision=precision))
        return size

    assert kept(Precision(checkpoint=1)) < 0.5 * kept(Precision())


def test_ema_and_swa_are_their_formulas():
    weights = []

    def note(student, step, steps):
        weights.append([p.detach().clone() for p in student.parameters()])

    settings = replace(BASE, average=Average(kind="ema", decay=0.7))
    found = fit(seeded(dense), points(), settings=settings, after_step=note).module
    mean = weights[0]
    for now in weights[1:]:
        mean = [0.7 * a + 0.3 * w for a, w in zip(mean, now, strict=True)]
    for got, want in zip(found.parameters(), mean, strict=True):
        assert torch.allclose(got, want, atol=1e-6)
    weights.clear()
    found = fit(seeded(dense), points(), settings=replace(BASE, average=Average(kind="swa", start=0.4)), after_step=note).module
    for got, *ends in zip(found.parameters(), weights[7], weights[11], strict=True):
        assert torch.allclose(got, sum(ends) / 2, atol=1e-6)


def test_norms_are_recalibrated_for_the_average():
    view = points(128)
    settings = Fit(epochs=8, batch=128, learning_rate=0.05, average=Average(kind="ema", decay=0.9))
    found = fit(seeded(dense), view, settings=settings).module
    x = found[0](torch.from_numpy(view.inputs[0]))
    assert torch.allclose(found[1].running_mean, x.mean(0), atol=1e-5)
    assert torch.allclose(found[1].running_var, x.var(0), atol=1e-4)
    stale = fit(seeded(dense), view, settings=replace(settings, average=replace(settings.average, recalibrate=0))).module
    assert not torch.allclose(stale[1].running_mean, x.mean(0), atol=1e-5)


class Averaging(torch.optim.SGD):
    """Trains at one place and hands over another, as Schedule-Free does: here 1 beside it."""

    def _move(self, by):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(by)

    def eval(self):
        self._move(1.0)

    def train(self):
        self._move(-1.0)


def test_an_optimizer_that_averages_is_asked_for_its_result():
    view, settings = points(128), Fit(epochs=4, batch=128, optimizer=Averaging, learning_rate=0.01)
    found = Trainer(settings=settings, validation=points(40, seed=1)).fit(seeded(dense), view)
    last = fit(seeded(dense), view, settings=replace(settings, optimizer=torch.optim.SGD)).module
    for got, want in zip(found.module.parameters(), last.parameters(), strict=True):
        assert torch.allclose(got, want + 1, atol=1e-5)
    x = torch.from_numpy(view.inputs[0])
    assert torch.allclose(found.module[1].running_mean, found.module[0](x).mean(0), atol=1e-4), "norms fit what is handed over"


@pytest.mark.long
def test_compiled_training_tells_its_cost():
    fitted = fit(seeded(plain), points(), settings=replace(BASE, precision=Precision(compile=True)))
    whole = fit(seeded(plain), points(), settings=BASE)
    assert 0 < fitted.compile_seconds < fitted.seconds
    assert [loss for _, loss in fitted.curve] == pytest.approx([loss for _, loss in whole.curve], rel=1e-3)


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
        (lambda: Trainer(device="tpu").fit(plain(), points()), "device must be one of cpu, cuda, mps, xla"),
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
