"""What once went wrong in a training: wrapped networks, optimizers with closures, looks at averages, sparse gradients, what a kill leaves."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset

from hasten import optim
from hasten.core.data import View
from hasten.core.errors import BackendMissing, DataRefused, UsageError
from hasten.train import Augment, Average, Checkpoints, Clip, Diverged, Fit, Health, Hints, Precision, Stop, Trainer, fit
from hasten.train.devices import device_of
from hasten.train.schedules import OfTorch
from lessons import Tokens, contents, dense, draw, plain, points, seeded, sentences

BASE = Fit(epochs=2, batch=32, learning_rate=0.01)


class Endless(IterableDataset):
    """A pass of five batches that nobody can count."""

    def __init__(self, integers: bool = False, shape: tuple[int, ...] = (16, 6)) -> None:
        self.integers, self.shape = integers, shape

    def __iter__(self):
        for at in range(5):
            x = torch.from_numpy(draw(*self.shape, seed=at))
            yield (x > 0).long() if self.integers else x, torch.arange(len(x)) % 3


def test_a_loader_that_cannot_be_counted_trains_for_so_many_steps():
    fitted = Trainer(settings=Fit(stop=Stop(steps=12))).fit(seeded(plain), DataLoader(Endless(), batch_size=None))
    assert len(fitted.curve) == 12
    with pytest.raises(UsageError, match=r"does not know its length needs stop=Stop\(steps=…\)"):
        Trainer(settings=BASE).fit(seeded(plain), DataLoader(Endless(), batch_size=None))


@pytest.mark.parametrize(
    ("settings", "stream", "words"),
    [
        (Fit(augmentation="shift"), Endless(), r"shift needs images \(n, channels, height, width\), got \(16, 6\)"),
        (Fit(augmentation=Augment(flip="random")), Endless(), r"this augmentation needs images .* got \(16, 6\)"),
        (Fit(augmentation=Augment(mixup=0.2)), Endless(integers=True), "mixup needs inputs of floating-point numbers, got int64"),
        (Fit(augmentation=Augment(cutout=2)), Endless(True, (16, 1, 8, 8)), "cutout needs inputs of floating-point numbers, got int64"),
        (Fit(augmentation=Augment(resize=0.5)), Endless(True, (16, 1, 8, 8)), "resize needs inputs of floating-point numbers, got int64"),
    ],
)
def test_a_stream_is_looked_at_before_it_is_changed(settings, stream, words):
    flat = seeded(lambda: nn.Sequential(Float(), nn.Flatten(), nn.LazyLinear(3)))
    with pytest.raises(DataRefused, match=words):
        Trainer(settings=replace(settings, stop=Stop(steps=2))).fit(flat, DataLoader(stream, batch_size=None))


class Float(nn.Module):
    def forward(self, x):
        return x.float()


HINTED = replace(BASE, loss="original", hints=Hints(only=("4",)))


def hinted(settings, module=None, **more):
    return Trainer(settings=settings, teacher=seeded(dense, 1), **more).fit(module or seeded(dense), points())


def test_layers_keep_their_names_while_hidden_values_are_learnt():
    before = seeded(dense)
    frozen = hinted(replace(HINTED, freeze=("1",)), before).module
    assert torch.equal(frozen[1].running_mean, before[1].running_mean), "a frozen norm keeps its statistics"
    assert torch.equal(frozen[1].weight, before[1].weight)
    slow = hinted(replace(HINTED, rates=(("0", 1e-6),)), before).module
    moved = [float((a - b).detach().abs().max()) for a, b in zip(before.parameters(), slow.parameters(), strict=True)]
    assert moved[0] < 1e-6 < 1e-3 < moved[-1]
    found = hinted(replace(HINTED, health=Health(every=1, exploding=1e-9)))
    assert {f.layer for f in found.findings} == {"0", "1", "4"}


@pytest.mark.parametrize("asked", [("0", "2"), 2])
def test_layers_are_computed_again_while_hidden_values_are_learnt(asked, monkeypatch):
    called = []
    monkeypatch.setattr("hasten.train.precision.checkpoint", lambda run, *x, **_: called.append(run) or run(*x))
    again = hinted(replace(HINTED, precision=Precision(checkpoint=asked)))
    assert called
    assert contents(again.module) == contents(hinted(HINTED).module)


class Listed(nn.Module):
    """Blocks in a list, and one in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 512), nn.Tanh(), nn.Linear(512, 6)) for _ in range(3))
        self.named = nn.ModuleDict({"last": nn.Sequential(nn.Linear(6, 512), nn.Tanh(), nn.Linear(512, 3))})

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.named["last"](x)


@pytest.mark.parametrize("asked", [1, ("blocks", "named")])
def test_blocks_in_a_list_are_computed_again(asked):
    def kept(precision):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            found = fit(seeded(Listed), points(), settings=Fit(epochs=1, batch=128, precision=precision)).module
        return sum(sizes), contents(found)

    (less, mine), (more, theirs) = kept(Precision(checkpoint=asked)), kept(Precision())
    assert less < 0.5 * more
    assert mine == theirs


def sam(groups, lr, **options):
    return optim.SAM(optim.AdamW(groups, lr=lr), **options)


def test_sam_in_the_loop_equals_sam_by_hand():
    view, settings = points(64), Fit(epochs=4, batch=None, learning_rate=0.05, schedule="constant", warm_up=0, clip=math.inf)
    found = fit(seeded(plain), view, settings=replace(settings, optimizer=sam)).module
    module = seeded(plain)
    parts = [[p for p in module.parameters() if (p.ndim >= 2) == wide] for wide in (True, False)]
    optimizer = sam([{"params": part, "weight_decay": 0.01 * (part[0].ndim >= 2)} for part in parts], 0.05)
    x, y = torch.from_numpy(view.inputs[0]), torch.from_numpy(view.labels)
    for _ in range(4):

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(module(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    for got, want in zip(found.parameters(), module.parameters(), strict=True):
        assert torch.allclose(got, want, atol=1e-5)
    assert contents(fit(seeded(plain), view, settings=replace(settings, optimizer="sam")).module) == contents(found)


def test_both_gradients_of_a_step_are_of_the_same_batch_changed_alike():
    seen: list[torch.Tensor] = []

    class Seeing(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.append(F.dropout(x, 0.5))
            return super().forward(x)

    settings = replace(BASE, optimizer=sam, augmentation=Augment(mixup=0.4))
    fit(seeded(lambda: Seeing(6, 3)), points(), settings=settings)
    assert len(seen) == 16, "two for each of eight steps"
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    assert not torch.equal(seen[0], seen[2])


def test_lbfgs_solves_the_least_squares_in_a_few_steps():
    x = draw(30, 2)
    view = View(inputs=(x,), labels=x @ np.array([[2.0], [-1.0]], dtype=np.float32) + 0.5)
    settings = Fit(loss="values", batch=None, learning_rate=1.0, schedule="constant", warm_up=0, clip=math.inf, stop=Stop(steps=3))
    joined = replace(settings, optimizer=lambda groups, lr: torch.optim.LBFGS([p for g in groups for p in g["params"]], lr=lr))
    found = fit(seeded(lambda: nn.Linear(2, 1)), view, settings=joined).module
    assert found.weight.detach().numpy() == pytest.approx(np.array([[2.0, -1.0]]), abs=1e-3)
    with pytest.raises(UsageError, match=r"LBFGS doesn't support per-parameter options.*join them: lambda groups, lr:"):
        fit(seeded(lambda: nn.Linear(2, 1)), view, settings=replace(settings, optimizer=torch.optim.LBFGS))


class Steep(nn.Module):
    """Infinite as soon as it leaves its first weights, but for a call in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.first = nn.Linear(6, 3), None

    def forward(self, x):
        now = self.layer.weight.detach()
        self.first = now.clone() if self.first is None else self.first
        return self.layer(x) * (1.0 if torch.equal(now, self.first) else math.inf)


def test_a_gradient_that_is_sick_only_nearby_is_met_as_any_other():
    with pytest.raises(Diverged, match="at step 1 of 8"):
        fit(seeded(Steep), points(), settings=replace(BASE, optimizer=sam))
    module = seeded(Steep)
    skipped = fit(module, points(), settings=replace(BASE, optimizer=sam, health=Health(nonfinite="skip", most=99)))
    assert len(skipped.notes) == 8
    assert torch.equal(skipped.module.layer.weight, module.layer.weight), "weights as before the step"


def test_a_scaled_loss_and_a_closure_do_not_go_together():
    with pytest.raises(UsageError, match=r"SAM asks for the gradient more than once a step.*float16.*take bfloat16"):
        fit(seeded(plain), points(), settings=replace(BASE, optimizer=sam, precision=Precision(format="float16")))


AVERAGES = {
    "ema": {"average": Average(kind="ema", decay=0.8)},
    "swa": {"average": Average(kind="swa", start=0.3)},
    "schedule free": {"optimizer": "schedule_free", "schedule": "constant"},
}


@pytest.mark.parametrize("facts", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("patience", [None, 9])
def test_a_look_is_at_the_network_that_is_handed_over(facts, patience):
    settings = replace(BASE, epochs=4, learning_rate=0.03, stop=Stop(patience=patience), **facts)
    judge = points(60, seed=1)
    fitted = Trainer(settings=settings, validation=judge).fit(seeded(dense), points())
    with torch.no_grad():
        loss = F.cross_entropy(fitted.module(torch.from_numpy(judge.inputs[0])), torch.from_numpy(judge.labels)).item()
    assert loss == pytest.approx(fitted.looks[-1] if patience is None else min(fitted.looks), rel=1e-5)


@pytest.mark.parametrize("facts", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_look_at_an_average_leaves_the_training_as_it_was(facts, streamed):
    view = points()
    pairs = torch.utils.data.TensorDataset(torch.from_numpy(view.inputs[0]), torch.from_numpy(view.labels))
    data = DataLoader(pairs, batch_size=30, shuffle=True) if streamed else view
    settings = replace(BASE, epochs=3, batch=30, stop=Stop(every=0.4), **facts)
    seen = Trainer(settings=settings, validation=points(60, seed=1)).fit(seeded(dense), data)
    assert len(seen.looks) > 3
    unseen = Trainer(settings=settings).fit(seeded(dense), data)
    assert seen.curve == unseen.curve
    assert contents(seen.module) == contents(unseen.module)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=40, cycle_momentum=False),
        lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=10, cycle_momentum=False),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 1.0, 5), lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=10, cycle_momentum=False)], [5]
        ),
    ],
    ids=["one cycle", "cyclic", "one after another"],
)
def test_going_back_halves_the_rates_of_torch_s_schedulers(make):
    def rates(*calls):
        seen: dict[int, float] = {}
        settings = Fit(
            epochs=4, batch=16, warm_up=0, schedule=OfTorch(make), optimizer="sgd", health=Health(nonfinite="roll back", snapshot=4)
        )
        Trainer(settings=settings, watch=lambda r: seen.update({r.step: r.rate})).fit(Sick(*calls), points(64))
        return seen

    whole, halved = rates(), rates(7)
    assert [halved[step] / whole[step] for step in range(1, 4)] == pytest.approx([1.0] * 3)
    assert [halved[step] / whole[step] for step in range(5, 17)] == pytest.approx([0.5] * 12)


class Sick(nn.Module):
    """Gives infinity at some calls in training."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self.layer, self.calls, self.seen = nn.Linear(6, 3), calls, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += self.training
        return self.layer(x) * (math.inf if self.training and self.seen in self.calls else 1.0)


def tokens(sparse: bool) -> nn.Module:
    module = Tokens()
    module.embed.sparse = sparse
    return module


@pytest.mark.parametrize(
    "facts",
    [
        {"clip": 0.05},
        {"clip": Clip(by="value", at=0.001)},
        {"clip": Clip(by="adaptive", at=0.01)},
        {"clip": math.inf, "accumulate": 3, "health": Health(every=1)},
        {"clip": math.inf, "penalty": (0.01, 0.02)},
        {"clip": math.inf, "optimizer": lambda g, lr: optim.SAM(optim.SGD(g, lr=lr))},
        {"clip": math.inf, "optimizer": lambda g, lr: optim.SAM(optim.SGD(g, lr=lr), adaptive=True)},
    ],
    ids=["norm", "value", "adaptive", "parts", "penalty", "SAM", "ASAM"],
)
def test_sparse_gradients_train_as_dense_ones_do(facts):
    settings = replace(BASE, **{"optimizer": optim.SGD, "learning_rate": 0.5, "weight_decay": 0.0, **facts})
    mine, theirs = (fit(seeded(lambda s=s: tokens(s)), sentences(), settings=settings) for s in (True, False))
    assert [loss for _, loss in mine.curve] == pytest.approx([loss for _, loss in theirs.curve], rel=1e-4)
    for got, want in zip(mine.module.parameters(), theirs.module.parameters(), strict=True):
        assert torch.allclose(got, want, atol=1e-5)


def test_a_sick_sparse_gradient_is_found():
    class Wild(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.embed.sparse = True

        def forward(self, x):
            return torch.where(x.sum(1, keepdim=True) < 0, 1.0, (super().forward(x) - 1e4).exp().sqrt())  # the root of 0 has no slope

    with pytest.raises(Diverged, match="it comes from the gradient of the layer 'head'"):
        fit(seeded(Wild), sentences(), settings=replace(BASE, optimizer=optim.SGD, weight_decay=0.0))


def test_what_a_kill_left_half_saved_is_swept(tmp_path):
    (tmp_path / ".step-000000003.part").mkdir()
    (tmp_path / ".step-000000003.part" / "state.pt").write_bytes(b"half")
    (tmp_path / ".mine.part").mkdir()
    Trainer(settings=BASE, checkpoints=Checkpoints(folder=tmp_path)).fit(seeded(plain), points())
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.part", "lock", "step-000000008"]


def test_tpu_is_another_word_for_xla():
    with pytest.raises(BackendMissing, match=r"the device tpu needs the package torch_xla.*pip install torch_xla.*or take cpu"):
        device_of("tpu")
    with pytest.raises(UsageError, match="device must be one of cpu, cuda, mps, tpu, xla"):
        device_of("abacus")


class Jittered(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Augments with the random numbers that people use."""

    def __init__(self, view: View) -> None:
        self.view = view

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, at: int) -> Any:
        noise = np.random.normal(size=6).astype(np.float32) * random.random()
        return torch.from_numpy(self.view.inputs[0][at] + noise), int(self.view.labels[at])


def test_random_numbers_of_python_and_numpy_are_taken_up_again(tmp_path):
    class Interrupted(Exception):
        pass

    def stop(_, step, __):
        if step == 7:
            raise Interrupted

    loader = DataLoader(Jittered(points()), batch_size=32, shuffle=True)
    before = random.getstate(), np.random.get_state()[1].tolist()
    whole = Trainer(settings=BASE).fit(seeded(plain), loader)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before, "as before when a training ends"
    random.seed(5)
    np.random.seed(5)
    kept = Checkpoints(folder=tmp_path, steps=1)
    with pytest.raises(Interrupted):
        Trainer(settings=BASE, checkpoints=kept, after_step=stop).fit(seeded(plain), loader)
    random.random()
    np.random.random(3)
    assert contents(Trainer(settings=BASE, checkpoints=kept).fit(seeded(plain), loader).module) == contents(whole.module)
