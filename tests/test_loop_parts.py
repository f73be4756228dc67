"""What the loop is composed of: where data come from, which layers learn, number formats, averages."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hasten.core.data import View
from hasten.core.errors import DataRefused, UsageError
from hasten.train import Average, Fit, Precision, Stop, Trainer, chance, devices, fit
from hasten.train.loop import _tensors
from lessons import contents, dense, draw, image, pictures, plain, points, seeded

BASE = Fit(epochs=3, batch=32, learning_rate=0.01)


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


@pytest.mark.parametrize("format", ["bfloat16", "float16"])
def test_16_bits_stay_near_32(format):
    settings = replace(BASE, epochs=10)
    whole, half = (fit(seeded(plain), points(), settings=replace(settings, precision=p)) for p in (Precision(), Precision(format=format)))
    assert half.curve[-1][1] == pytest.approx(whole.curve[-1][1], abs=0.1)
    assert half.curve != whole.curve
    assert all(p.dtype == torch.float32 for p in half.module.parameters())


def test_channels_last_changes_the_layout_alone():
    one, other = (fit(seeded(image), pictures(), settings=replace(BASE, precision=Precision(channels_last=c))) for c in (False, True))
    assert [loss for _, loss in one.curve] == pytest.approx([loss for _, loss in other.curve], rel=1e-3)
    assert all(p.is_contiguous() for p in other.module.parameters())


def test_what_is_behind_a_kernel_of_a_single_channel_has_its_channels_together():
    seen = []

    def build():
        net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 3))
        net[1].register_forward_hook(lambda layer, given, made: seen.append(made.stride(1) if layer.training else 1))
        return net

    fitted = fit(seeded(build), pictures(), settings=replace(BASE, precision=Precision(channels_last=True)))
    assert set(seen) == {1}  # neighbouring numbers are the channels of one place
    assert [p.stride() for p in fitted.module.parameters()] == [p.stride() for p in build().parameters()]


class _Noise(nn.Module):
    """Draws in training and out of it."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.1, training=True)


def _convolving(width=16):
    convolutions = nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3)
    return nn.Sequential(*convolutions, _Noise(), nn.Flatten(), nn.Linear(16 * width, 3))


def _narrow():
    return _convolving(8)


def test_kernels_of_more_axes_stay_as_they_are():
    def build():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Unflatten(1, (4, 1)), nn.Conv3d(4, 2, (1, 3, 3)), nn.Flatten(), nn.Linear(32, 3))

    fitted = fit(seeded(build), pictures(), settings=replace(BASE, precision=Precision(channels_last=True)))
    assert all(p.is_contiguous() for p in fitted.module.parameters())


class _Viewing(nn.Module):
    """Takes what a convolution gives for contiguous."""

    def __init__(self):
        super().__init__()
        self.body, self.head = _convolving()[:-2], nn.Linear(256, 3)

    def forward(self, x):
        return self.head(self.body(x).view(len(x), -1))


@pytest.mark.parametrize(("build", "together"), [(_convolving, True), (_narrow, False), (_Viewing, False)])
def test_the_layout_is_chosen_where_nothing_is_said_and_disturbs_no_draw(build, together):
    seen = set()

    def look(module, step, steps):
        kernel = next(p for p in module.parameters() if p.ndim == 4 and p.shape[1] > 1)
        seen.add(kernel.is_contiguous(memory_format=torch.channels_last))
        return False

    chosen = fit(seeded(build), pictures(), settings=BASE, after_step=look)
    assert seen == {together}
    said = fit(seeded(build), pictures(), settings=replace(BASE, precision=Precision(channels_last=together)))
    assert chosen.curve == said.curve
    assert all(p.is_contiguous() for p in chosen.module.parameters())


def _wide():
    return nn.Sequential(*(nn.Sequential(nn.Linear(6, 512), nn.ReLU(), nn.Linear(512, 6)) for _ in range(3)))


def _chain():
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(6, 512), nn.Tanh(), nn.Linear(512, 6))))


@pytest.mark.parametrize(("build", "length"), [(_wide, 1), (_chain, 3)])
def test_checkpointed_layers_keep_less_for_the_way_back(build, length):
    def kept(precision):
        size = 0

        def pack(tensor):
            nonlocal size
            size += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fit(seeded(build), points(), settings=Fit(epochs=1, batch=128, precision=precision))
        return size

    assert kept(Precision(checkpoint=length)) < 0.5 * kept(Precision())


def test_a_chain_with_a_way_of_its_own_keeps_it():
    class Around(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    module, x = seeded(lambda: Around(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))), torch.randn(4, 6)
    with Precision(checkpoint=1).prepared(module) as prepared:
        assert torch.equal(prepared(x), x + nn.Sequential(*module)(x))


def test_the_allocator_is_told_while_activations_are_computed_again(monkeypatch):
    told = []
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(mallopt=lambda *words: told.append(words)))
    monkeypatch.setattr("sys.platform", "linux")
    for checkpoint in ((), 2):
        with Precision(checkpoint=checkpoint).prepared(_chain()):
            told.append(checkpoint)
    assert told == [(), (-3, 1 << 20), 2, (-3, 32 << 20)]


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


class Device:
    """A device's generator that counts."""

    state = 0

    def get_rng_state(self):
        return self.state

    def set_rng_state(self, state):
        Device.state = state

    manual_seed = set_rng_state


@pytest.mark.parametrize("kind", ["mps", "xla"])
def test_the_generator_of_another_device_begins_at_the_seed_and_is_put_back(kind, monkeypatch):
    if kind == "mps":
        monkeypatch.setattr(torch, "mps", Device())
    else:
        names = ("torch_xla", "torch_xla.core", "torch_xla.core.xla_model")
        found = [ModuleType(name) for name in names]
        found[0].core, found[1].xla_model = found[1], Device()
        for name, module in zip(names, (*found[:2], found[1].xla_model), strict=True):
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Device, "state", 3)
    device = torch.device(kind)
    with devices.seeded(device, 7):
        assert Device.state == 7
        kept = chance.random_states(device)
        Device.state = 8
        chance.put_random_states(kept, device)
        assert Device.state == 7
    assert Device.state == 3


def test_random_states_of_torch_alone_are_taken_up_as_they_were_once_kept():
    before = random.getstate()
    kept = {"random": torch.get_rng_state(), "cuda": None}
    first = torch.rand(1)
    chance.put_random_states(kept)
    assert torch.equal(torch.rand(1), first)
    assert random.getstate() == before
