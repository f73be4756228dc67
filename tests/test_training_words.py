"""`hasten train`: what its words set, which network a task gets, and what is kept where the export fails."""

from __future__ import annotations

import io
import json
import math
import re

import numpy as np
import pytest
import torch

from hasten import training
from hasten.cli import main
from hasten.core.data import View
from hasten.core.errors import ModelRefused, UsageError
from hasten.tasks import TaskData
from hasten.train import Augment, Average, Clip, Fit, Health, Hints, Precision, Stop, optim
from hasten.train.records import Record
from hasten.train.schedules import OneCycle
from hasten.train.worded import worded
from lessons import draw, points


def _main(*words):
    with pytest.raises(SystemExit) as left:
        main([str(w) for w in words])
    return left.value.code


def _made(name, *inputs, classes):
    n = len(inputs[0])
    view = View(inputs=inputs, labels=np.arange(n) % (classes - 1))  # the last class is not among the training examples
    return TaskData(name=name, train=view, held_out=view.take(np.arange(10)), classes=tuple(map(str, range(classes))))


def _words(n):
    ids = np.random.default_rng(0).integers(0, 30_522, (n, 8))
    return ids, np.ones_like(ids)


TASKS = {
    "letter": (_made("letter", draw(40, 16), classes=26), "mlp"),
    "splice": (_made("splice", draw(40, 4, 60), classes=3), "mlp"),
    "r8": (_made("r8", *_words(40), classes=8), "words"),
    "digits": (_made("digits", draw(40, 1, 28, 28), classes=10), "small_cnn"),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_a_network_that_suits_it(name, tmp_path, monkeypatch):
    data, network = TASKS[name]
    monkeypatch.setattr(training.tasks, "load", lambda asked: data)
    job = training.Job(model=name, run=tmp_path)
    found = training.train(job, Fit(batch=20, stop=Stop(steps=2)), stream=io.StringIO())
    assert (found["steps"], found["network"]) == (2, network)
    module = torch.export.load(tmp_path / "model.pt2").module()
    assert module(*(torch.from_numpy(a[:3]) for a in data.train.inputs)).shape == (3, len(data.classes))


@pytest.mark.parametrize(
    ("name", "network", "words"),
    [
        ("letter", "small_cnn", r"--network small_cnn does not fit the data of letter, \(n, 16\): .*; leave it out for mlp"),
        ("r8", "mlp", r"--network mlp does not fit the data of r8, \(n, 8\) and \(n, 8\): .*; leave it out for words"),
        ("splice", "lstm", r"--network lstm does not fit the data of splice"),
        ("digits", "words", r"--network words does not fit the data of digits"),
    ],
)
def test_a_network_that_does_not_fit_is_one_line(name, network, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.tasks, "load", lambda asked: TASKS[name][0])
    assert _main("train", name, "--network", network, "--run", tmp_path) == 2
    said = capsys.readouterr().err
    assert re.search(words, said)
    assert said.count("\n") == 1


SCRIPT = """
import torch
from torch import nn

class Undecided(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (1.0 if x.sum() > 0 else 2.0)

model = Undecided(6, 3)
wide = nn.Linear(7, 3)
"""


@pytest.fixture
def own(tmp_path):
    view = points(200)
    (tmp_path / "mine.py").write_text(SCRIPT)
    np.savez(tmp_path / "data.npz", x=view.inputs[0], y=view.labels)
    return tmp_path


def test_a_network_that_cannot_be_exported_is_kept_all_the_same(own, capsys):
    (own / "run").mkdir()
    (own / "run" / "model.pt2").write_text("of another time")
    words = ["train", f"{own}/mine.py:model", "--data", own / "data.npz", "--run", own / "run", "--steps", 4]
    assert _main(*words) == 0
    assert re.search(r"export +none: torch\.export cannot follow this network: .*; weights\.pt holds", capsys.readouterr().out)
    found = json.loads((own / "run" / "result.json").read_text())
    assert found["steps"] == 4
    assert found["export"].startswith("none: torch.export cannot follow")
    assert "cannot follow" in (own / "run" / "curves.html").read_text()
    assert not (own / "run" / "model.pt2").exists()
    assert torch.load(own / "run" / "weights.pt", weights_only=True)["weight"].shape == (3, 6)


def test_the_result_is_there_before_the_export_begins(own, monkeypatch):
    def killed(network):
        raise KeyboardInterrupt

    monkeypatch.setattr("hasten.load.program.export_program", killed)
    job = training.Job(model=f"{own}/mine.py:model", data=str(own / "data.npz"), run=own / "run")
    with pytest.raises(KeyboardInterrupt):
        training.train(job, Fit(stop=Stop(steps=2)), stream=io.StringIO())
    assert {"result.json", "curves.html", "weights.pt"} <= {p.name for p in (own / "run").iterdir()}


def test_a_network_of_one_s_own_that_does_not_run_is_one_line(own):
    job = training.Job(model=f"{own}/mine.py:wide", data=str(own / "data.npz"), run=own / "run")
    with pytest.raises(ModelRefused, match=r"mine\.py:wide does not run on the data .*data\.npz, \(n, 6\): RuntimeError: mat1 and mat2"):
        training.train(job, Fit(), stream=io.StringIO())


@pytest.fixture
def arrived(monkeypatch):
    """What `hasten train` is asked for, in the place of a training."""
    seen = []
    monkeypatch.setattr(training, "train", lambda job, settings, **_: seen.append((job, settings)) or {})
    return seen


def test_words_arrive_in_the_settings(arrived):
    assert _main("train", "digits") == 0
    assert arrived.pop()[1] == Fit()
    words = "--epochs 3 --batch 0 --lr 0.5 --optimizer sgd --schedule cosine --warm-up 0.1 --loss values --stop-loss 0.25 --seconds 60"
    words += " --patience 4 --precision bfloat16 --augment shift --seed 7 --steps 30 --set accumulate=4 --set precision.channels_last=true"
    words += " --validation look.csv --device cuda:1 --target y --tensorboard --standardize --network lstm --run here"
    assert _main("train", "digits", *words.split()) == 0
    job, settings = arrived.pop()
    assert settings == Fit(
        loss="values",
        epochs=3.0,
        batch=None,
        optimizer="sgd",
        learning_rate=0.5,
        schedule="cosine",
        warm_up=0.1,
        augmentation="shift",
        seed=7,
        accumulate=4,
        stop=Stop(steps=30, seconds=60.0, loss=0.25, patience=4),
        precision=Precision(format="bfloat16", channels_last=True),
    )
    assert (job.validation, job.device, job.target, job.network, str(job.run)) == ("look.csv", "cuda:1", "y", "lstm", "here")
    assert job.tensorboard
    assert job.standardize
    assert _main("train", "digits", "--lr", "auto") == 0
    assert arrived.pop()[1].learning_rate == "auto"


SET = [
    (["optimizer=lion"], Fit(optimizer="lion")),
    (["health.nonfinite=skip", "health.every=5"], Fit(health=Health(nonfinite="skip", every=5))),
    (["health.nonfinite=roll back"], Fit(health=Health(nonfinite="roll back"))),
    (["augmentation.mixup=0.2"], Fit(augmentation=Augment(mixup=0.2))),
    (["augmentation=shift", "augmentation.flip=random"], Fit(augmentation=Augment(shift=2, flip="random"))),
    (["average.kind=swa"], Fit(average=Average(kind="swa"))),
    (["hints.only=conv*,fc"], Fit(hints=Hints(only=("conv*", "fc")))),
    (["clip=inf"], Fit(clip=math.inf)),
    (["clip.by=adaptive", "clip.at=0.01"], Fit(clip=Clip(by="adaptive", at=0.01))),
    (["schedule=one-cycle", "schedule.rise=0.4"], Fit(schedule=OneCycle(rise=0.4))),
    (["batch=none", "stop.every=0.5"], Fit(batch=None, stop=Stop(every=0.5))),
    (["precision.checkpoint=2"], Fit(precision=Precision(checkpoint=2))),
    (["precision.checkpoint=a,b", "precision.channels_last=none"], Fit(precision=Precision(checkpoint=("a", "b")))),
    (["freeze=conv*", "rates=head:10,body.*:0.1"], Fit(freeze=("conv*",), rates=(("head", 10.0), ("body.*", 0.1)))),
    (["penalty=0.1,0.2", "balance=1,2,0.5"], Fit(penalty=(0.1, 0.2), balance=(1.0, 2.0, 0.5))),
    (["balance=none", "augmentation=none", "average=none"], Fit()),
    (["learning_rate=auto"], Fit(learning_rate="auto")),
    (["epochs=3", "epochs=4"], Fit(epochs=4.0)),
    (["freeze_norms=true", "loss=values", "label_smoothing=0"], Fit(freeze_norms=True, loss="values")),
]


@pytest.mark.parametrize(("words", "wanted"), SET, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_any_field_is_set_by_its_name(words, wanted):
    assert worded(Fit(), words) == wanted


@pytest.mark.parametrize("name", optim.BY_NAME)
def test_every_optimizer_has_a_name(name):
    assert worded(Fit(), [f"optimizer={name}"]).optimizer == name
    made = {type(make([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)).__name__ for make in optim.BY_NAME.values()}
    assert made == set(optim.__all__) - {"missing"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("accumulat=4", "no field of Fit is named 'accumulat'; the nearest are accumulate"),
        ("health.nan=skip", "no field of Fit is named 'health.nan'; health has nonfinite, most, snapshot, every, vanishing, exploding"),
        ("optimiser=sgd", "no field of Fit is named 'optimiser'; the nearest are optimizer"),
        ("mixup=0.2", r"no field of Fit is named 'mixup'; the nearest are .*augmentation.mixup"),
        ("seed.x=1", "no field of Fit is named 'seed.x'"),
        ("stop.steps.x=1", "no field of Fit is named 'stop.steps.x'"),
        ("accumulate", "--set must look like NAME=VALUE, got 'accumulate'"),
        ("accumulate=two", "accumulate must be a whole number, got 'two'"),
        ("stop.steps=1.5", "stop.steps must be a whole number or none, got '1.5'"),
        ("freeze_norms=yes", "freeze_norms must be true or false, got 'yes'"),
        ("balance=heavy", "balance must be one of none, sampling, weights or numbers with commas between, got 'heavy'"),
        ("penalty=1", "penalty must be 2 numbers with commas between, got '1'"),
        ("rates=head", "rates must be pairs of a text and a number, as in a:b,c:d, got 'head'"),
        ("average=ema", "average must be none or set field by field: average.kind, average.decay, average.start, average.recalibrate"),
        ("stop=3", "stop must be set field by field: stop.steps"),
        ("schedule.rise=0.4", "no field of schedule is named 'rise'"),
        ("health.nonfinite=never", "health.nonfinite must be one of raise, skip, roll back, got 'never'"),
        ("accumulate=0", "accumulate must be at least 1, got 0"),
    ],
)
def test_words_that_set_nothing(words, told):
    with pytest.raises(UsageError, match=told):
        worded(Fit(), [words])


def _record(step, **facts):
    return Record(step=step, steps=9, batch=4, epoch=step / 3, loss=1 / step, rate=0.1, norm=1.0, seconds=float(step), **facts)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_that_ends_early_is_ended():
    terminal, file, machine = Terminal(), io.StringIO(), io.StringIO()
    lines = [training.Line(terminal), training.Line(file), training.Line(machine, as_json=True)]
    for line in lines:
        for step in (1, 2, 3):
            line(_record(step))
        line.close()
        line.close()
    assert terminal.getvalue().endswith("left\n")
    assert terminal.getvalue().count("\n") == 1
    assert [words.split()[1] for words in file.getvalue().splitlines()] == ["1", "3"]
    assert [json.loads(words)["step"] for words in machine.getvalue().splitlines()] == [1, 3]
    whole = Terminal()
    line = training.Line(whole)
    line(_record(9))
    line.close()
    assert whole.getvalue().count("\n") == 1


def test_an_early_end_shows_its_last_step(own):
    told = io.StringIO()
    job = training.Job(model=f"{own}/mine.py:model", data=str(own / "data.npz"), run=own / "run")
    training.train(job, Fit(epochs=5, batch=20, stop=Stop(loss=1e9)), stream=told)
    assert told.getvalue().splitlines()[-1].startswith("step 10 of 50")


def test_a_search_for_the_rate_is_told_as_such():
    terminal = Terminal()
    line = training.Line(terminal)
    line(_record(9, trial="20 steps with 0.01"))
    line(_record(1))
    line.close()
    first, second = terminal.getvalue().split("\r\x1b[K")[1:]
    assert first == "looking for the learning rate: 20 steps with 0.01 · step 9 of 9 · loss 0.1111"
    assert second.startswith("step 1 of 9")
