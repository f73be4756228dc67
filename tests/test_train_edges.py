"""Edges of a training: streams, states of other networks, going back, batches without a target, data that are the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hasten import optim
from hasten.core.data import View
from hasten.core.errors import UsageError
from hasten.train import Average, Checkpoints, Fit, Health, Precision, Stop, Trainer
from hasten.train.schedules import OfTorch
from hasten.training import Job, train


def line(n: int = 64) -> View:
    x = np.random.default_rng(0).standard_normal((n, 4)).astype(np.float32)
    return View(inputs=(x,), labels=(x[:, 0] > 0).astype(np.int64))


def dense() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def stream(view: View, size: int) -> DataLoader:  # type: ignore[type-arg]
    return DataLoader(TensorDataset(torch.from_numpy(view.inputs[0]), torch.from_numpy(view.labels)), batch_size=size)  # type: ignore[arg-type]


class Counting(nn.Module):
    """A teacher that is asked; its answers tell the examples apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[:, 0], -x[:, 0]], 1) * 3


def test_of_a_stream_every_batch_asks_the_teacher() -> None:
    view, settings = line(), Fit(distil=1.0, epochs=30, batch=16, learning_rate=1e-2, health=Health())
    taught = Trainer(settings=settings, teacher=Counting()).fit(dense(), stream(view, 16)).module
    wrong = taught(torch.from_numpy(view.inputs[0])).argmax(1).numpy() == view.labels  # the teacher says class 0 where x > 0
    assert wrong.mean() < 0.1


def test_weights_of_classes_are_not_counted_on_a_first_batch() -> None:
    with pytest.raises(UsageError, match="this is a stream"):
        Trainer(settings=Fit(balance="weights")).fit(dense(), stream(line(), 16))


@pytest.mark.parametrize("kind", [optim.AdamW, optim.SGD, optim.Lion])
def test_a_state_of_another_shape_is_refused(kind: Any) -> None:
    def stepped(width: int) -> Any:
        layer = nn.Linear(8, width)
        made = kind(layer.parameters(), lr=0.1, **({"momentum": 0.9} if kind is optim.SGD else {}))
        layer(torch.randn(2, 8)).sum().backward()
        return made

    small, large = stepped(10), stepped(100)
    small.step()
    large.load_state_dict(small.state_dict())
    with pytest.raises(UsageError, match="must have the shape of its parameter"):
        large.step()


def test_a_state_saved_in_another_layout_goes_on() -> None:
    def made(layout: Any) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 8, 3)
        layer.weight.data = layer.weight.data.contiguous(memory_format=layout)
        return layer, optim.AdamW(layer.parameters(), lr=0.1)

    def steps(layer: nn.Module, optimizer: Any, number: int) -> None:
        for at in range(number):
            for p in layer.parameters():
                p.grad = torch.full_like(p, 0.1 + at) * torch.arange(p.numel()).view(p.shape) / p.numel()
            optimizer.step()

    (first, one), (second, two) = made(torch.channels_last), made(torch.contiguous_format)
    steps(first, one, 2)
    second.load_state_dict(first.state_dict())
    two.load_state_dict(one.state_dict())
    steps(first, one, 3)
    steps(second, two, 3)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(one.state[p]["exp_avg"], two.state[q]["exp_avg"])


def test_a_hook_that_adapts_a_state_has_the_last_word() -> None:
    layer = nn.Linear(2, 2)
    made = optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 2)).sum().backward()
    made.step()
    saved = made.state_dict()

    def doubled(optimizer: Any, given: dict[str, Any]) -> dict[str, Any]:
        del optimizer
        state = {k: {**v, "exp_avg": 2 * v["exp_avg"]} for k, v in given["state"].items()}
        return {**given, "state": state}

    made.register_load_state_dict_pre_hook(doubled)
    made.load_state_dict(saved)
    torch.testing.assert_close(made.state[layer.weight]["exp_avg"], 2 * saved["state"][0]["exp_avg"])


def test_a_state_of_torchs_muon_is_taken() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    theirs = torch.optim.Muon([weight], lr=0.1)
    weight.grad = torch.randn(4, 4)
    theirs.step()
    ours = optim.Muon([weight], lr=0.1)
    ours.load_state_dict(theirs.state_dict())
    ours.step()


def test_prodigy_leaves_a_group_at_rate_0() -> None:
    held, moved = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    made = optim.Prodigy([{"params": [held], "lr": 0.0}, {"params": [moved]}])
    for _ in range(3):
        for p in (held, moved):
            p.grad = torch.ones(3)
        made.step()
    assert torch.equal(held, torch.ones(3))


class Sick(nn.Module):
    """Gives infinity at some calls in training."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self.layer, self.calls, self.seen = nn.Linear(4, 2), calls, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += self.training
        return self.layer(x) * (float("inf") if self.training and self.seen in self.calls else 1.0)


def test_float16_goes_on_behind_a_step_that_was_skipped() -> None:
    settings = Fit(epochs=2, batch=16, precision=Precision(format="float16"), health=Health(nonfinite="skip"))
    fitted = Trainer(settings=settings).fit(Sick(3), line())
    assert any("was skipped" in note for note in fitted.notes)


def test_going_back_leaves_no_trace_of_the_way_that_was_left(tmp_path: Path) -> None:
    told: list[int] = []
    settings = Fit(epochs=4, batch=16, health=Health(nonfinite="roll back", snapshot=4), average=Average(kind="ema"))
    kept = Checkpoints(folder=tmp_path, steps=1, last=8)
    trainer = Trainer(settings=settings, checkpoints=kept, watch=lambda record: told.append(record.step))
    fitted = trainer.fit(Sick(7), line())
    assert told == [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    assert [step for step, _ in fitted.curve] == list(range(1, 17))
    assert any("went back to step 4" in note for note in fitted.notes)
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("step-*")) == list(range(9, 17))


def test_checkpoints_behind_the_step_gone_back_to_are_removed(tmp_path: Path) -> None:
    settings = Fit(epochs=4, batch=16, health=Health(nonfinite="roll back", snapshot=4))
    found: list[list[int]] = []

    def look(record: Any) -> None:
        del record
        found.append(sorted(int(p.name[5:]) for p in tmp_path.glob("step-*")))

    Trainer(settings=settings, checkpoints=Checkpoints(folder=tmp_path, steps=1, last=8), watch=look).fit(Sick(7), line())
    assert max(found[6], default=0) <= 4  # told behind the step that went back


def test_what_is_gone_back_to_outlives_a_kill(tmp_path: Path) -> None:
    settings = Fit(epochs=4, batch=16, health=Health(nonfinite="roll back", snapshot=100))
    kept = Checkpoints(folder=tmp_path, steps=1)
    module = Sick(9)

    class Killed(Exception):
        pass

    def kill(record: Any) -> None:
        if record.step == 6 and module.seen < 100:
            raise Killed

    with pytest.raises(Killed):
        Trainer(settings=settings, checkpoints=kept, watch=kill).fit(module, line())
    fitted = Trainer(settings=settings, checkpoints=kept).fit(Sick(3), line())
    assert any("went back to step 0" in note for note in fitted.notes)


def test_a_torch_scheduler_learns_at_the_rates_of_the_layers() -> None:
    settings = Fit(
        epochs=1,
        batch=16,
        optimizer="sgd",
        learning_rate=0.1,
        warm_up=0.0,
        schedule=OfTorch(lambda o: torch.optim.lr_scheduler.StepLR(o, 100)),
        rates=(("0", 0.0001),),
        weight_decay=0.0,
    )
    before = dense()
    after = Trainer(settings=settings).fit(before, line()).module
    moved = [float((a - b).detach().abs().max()) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert moved[0] < 1e-4 < moved[2]


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Conv2d(1, 16, 3), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x -= 0.13
        return self.head(self.layer(x).mean((2, 3)))


def test_the_layout_is_tried_on_a_copy_of_the_data() -> None:
    x = np.ones((32, 1, 8, 8), np.float32)
    before = x.copy()
    Trainer(settings=Fit(epochs=1, batch=16)).fit(Overwriting(), View(inputs=(x,), labels=np.arange(32) % 2))
    assert np.array_equal(x, before)


def test_a_batch_without_a_target_teaches_nothing() -> None:
    view = line()
    labels = np.where(np.arange(64) < 48, -100, view.labels)  # type: ignore[arg-type]
    for accumulate in (1, 4):
        settings = Fit(epochs=2, batch=4, accumulate=accumulate)
        fitted = Trainer(settings=settings).fit(dense(), View(inputs=view.inputs, labels=labels))
        assert all(np.isfinite(loss) for _, loss in fitted.curve)


def test_a_view_to_look_at_is_taken_as_it_is() -> None:
    view = line()
    labels = np.where(np.arange(64) % 2, -100, view.labels)  # type: ignore[arg-type]
    part = View(inputs=view.inputs, labels=labels)
    assert Trainer(settings=Fit(epochs=1), validation=part).fit(dense(), view).looks


def test_a_learning_rate_is_found_on_few_examples() -> None:
    assert Trainer(settings=Fit(epochs=1, learning_rate="auto", batch=4)).fit(dense(), line(20)).notes


def test_the_figures_are_those_of_the_network_that_is_handed_over(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\nmodel = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))\n")
    view = line(200)
    names, kinds = [f"x{i}" for i in range(4)], np.digitize(view.inputs[0][:, 0], (-0.5, 0.5))
    rows = [",".join([*names, "y"]), *(",".join(map(str, [*x, f"class {y}"])) for x, y in zip(view.inputs[0], kinds, strict=True))]
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    one = [row for row in rows[1:] if not row.endswith("class 0")]
    (tmp_path / "look.csv").write_text("\n".join([rows[0], *one]) + "\n")
    settings = Fit(epochs=20, batch=8, learning_rate=0.3, optimizer="sgd", stop=Stop(patience=2))
    job = Job(
        model=f"{tmp_path}/net.py",
        data=str(tmp_path / "train.csv"),
        validation=str(tmp_path / "look.csv"),
        target="y",
        run=tmp_path / "run",
    )
    result = train(job, settings)
    known = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    looks = [record for record in known if "validation" in record]
    assert result["validation_loss"] == min(record["validation"] for record in looks)
    assert result["accuracy"] > 0.5  # classes 1 and 2 are not 0 and 1 here
