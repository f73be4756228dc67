"""`hasten train`: words → a run folder with curves, a log and a network that runs."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
import torch

from hasten import training
from hasten.cli import main
from hasten.core.errors import BackendMissing, ModelRefused, UsageError
from hasten.report import curves
from hasten.train import Fit, Stop
from hasten.train.records import Record, read
from lessons import points

SCRIPT = """
import torch
from torch import nn

model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

def made():
    return nn.Linear(6, 3)

number = 3
def nothing():
    return number
"""


@pytest.fixture
def own(tmp_path):
    view = points(200)
    (tmp_path / "mine.py").write_text(SCRIPT)
    np.savez(tmp_path / "data.npz", x=view.inputs[0], y=view.labels)
    return tmp_path


def _main(*words):
    with pytest.raises(SystemExit) as left:
        main([str(w) for w in words])
    return left.value.code


def test_train_a_network_of_one_s_own(own, capsys):
    words = [
        "train",
        f"{own}/mine.py:model",
        "--data",
        own / "data.npz",
        "--run",
        own / "run",
        "--epochs",
        5,
        "--batch",
        20,
        "--lr",
        0.02,
        "--json",
    ]
    assert _main(*words) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert found == json.loads((own / "run" / "result.json").read_text())
    assert (found["steps"], found["planned_steps"], found["global_batch"], found["examples"]) == (50, 50, 20, 200)
    assert json.loads(told.err.splitlines()[-1])["step"] == 50
    records = read(own / "run" / "log.jsonl")
    assert [r.step for r in records] == list(range(1, 51))
    page = (own / "run" / "curves.html").read_text()
    assert "global batch 20, learning rate 0.02 at its highest, a schedule of 50 optimizer steps" in page
    assert page.count("<svg") == 3
    module = torch.export.load(own / "run" / "model.pt2").module()
    right = (module(torch.from_numpy(points(200).inputs[0])).argmax(1).numpy() == points(200).labels).mean()
    assert right > 0.6
    assert _main(*words) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == found["loss"], "the same command finds it done"


def test_the_network_standardizes_its_inputs_itself(own):
    view = points(200)
    np.savez(own / "far.npz", x=1000 * view.inputs[0] + 5000, y=view.labels)
    words = ["train", f"{own}/mine.py:model", "--data", own / "far.npz", "--epochs", 5, "--batch", 20, "--lr", 0.02, "--json"]
    assert _main(*words, "--run", own / "run", "--standardize") == 0
    module = torch.export.load(own / "run" / "model.pt2").module()
    right = (module(torch.from_numpy(1000 * view.inputs[0] + 5000)).argmax(1).numpy() == view.labels).mean()
    assert right > 0.6


def test_train_a_task(tmp_path, capsys):
    assert _main("train", "digits", "--network", "mlp", "--run", tmp_path / "run", "--epochs", 3) == 0
    told = capsys.readouterr().out
    assert "held-out data" in told
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["accuracy"] > 0.8


def test_progress_is_json_where_that_is_asked_for(tmp_path, capsys):
    assert _main("train", "digits", "--network", "mlp", "--run", tmp_path / "run", "--epochs", 1, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["accuracy"] > 0
    assert [json.loads(line)["step"] for line in said.err.splitlines()][-1] > 0


def test_what_decides_never_looks_at_held_out_data(own):
    job = training.Job(model="digits", run=own / "run", network="mlp")
    found = training.train(job, Fit(epochs=2, stop=Stop(patience=1)), stream=io.StringIO())
    assert found["validation_data"] == "a tenth of the training data"
    assert found["examples"] < 1200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits", "--data", "x.npz"], "the task digits brings its data"),
        (["OWN/mine.py:model"], "needs --data: a file, a folder of images, or one of the tasks"),
        (["nothing"], "expected one of the tasks"),
        (["digits", "--network", "gpt"], "--network must be one of lstm, mlp"),
        (["OWN/none.py", "--data", "digits"], "no such file: .*none.py"),
        (["OWN/mine.py:there", "--data", "digits"], "has no 'there'"),
        (["digits", "--lr", "fast"], "--lr must be a number or auto, got 'fast'"),
        (["digits", "--optimizer", "best"], "optimizer must be one of"),
        (["digits", "--device", "abacus"], "device must be one of cpu, cuda, mps, tpu, xla"),
    ],
)
def test_words_that_cannot_be_used(own, words, message, capsys):
    import re

    assert _main("train", *[w.replace("OWN", str(own)) for w in words], "--run", own / "run") == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_script_must_give_a_network(own):
    with pytest.raises(ModelRefused, match=r"mine\.py:nothing must be a torch module, or a class or function that gives one, got int"):
        training.from_script(own / "mine.py", "nothing")
    assert isinstance(training.from_script(own / "mine.py", "made"), torch.nn.Linear)
    with pytest.raises(UsageError, match="no such file"):
        training.from_script(own / "other.py", "model")


def _record(step, **facts):
    return Record(step=step, steps=9, batch=4, epoch=step / 3, loss=1 / step, rate=0.1, norm=1.0, seconds=float(step), **facts)


def test_curves_leave_out_what_cannot_be_drawn_and_escape_words():
    page = curves.page({"<b>": [_record(i) for i in range(1, 10)]}, {"<i>": ["<u>"], "none": None})
    assert "<b>" not in page
    assert "&lt;u&gt;" in page
    assert "Nothing was looked at." in page
    picture = curves.svg({"a": [(1, 1.0), (2, float("nan")), (3, -1.0), (4, 0.1)], "b": [(1, 0.5)]})
    assert picture.count("<polyline") == 2
    assert "nan" not in picture
    long = curves.svg({"a": [(i, 1.0 + i) for i in range(10_000)]})
    assert len(long) < 20_000


def test_the_line_is_kept_up_to_date_in_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    line = training.Line(stream)
    for step in range(1, 10):
        line(_record(step, validation=0.5, accuracy=0.875))
    assert stream.getvalue().count("\r") == 9
    assert stream.getvalue().endswith("· validation 0.5, 87.50 % right · rate 0.1 · batch 4 · about 0:00 left\n")
    quiet = io.StringIO()
    line = training.Line(quiet)
    for step in range(1, 10):
        line(_record(step))
    assert quiet.getvalue().count("\n") == 2, "into a file it writes seldom"


def test_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(BackendMissing, match=r"pip install 'hasten\[tensorboard\]'"):
        training.TensorBoard(tmp_path)


def test_tensorboard_reads_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = training.TensorBoard(tmp_path)
    writer(_record(1, layers={"0": 0.25}))
    writer(_record(2, validation=1.5, accuracy=0.5))
    writer.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert {tag: scalars[tag] for tag in ("loss", "validation", "accuracy", "gradient/0")} == {
        "loss": [(1, 1.0), (2, 0.5)],
        "validation": [(2, 1.5)],
        "accuracy": [(2, 0.5)],
        "gradient/0": [(1, 0.25)],
    }
    assert set(scalars) == {"loss", "rate", "norm", "validation", "accuracy", "gradient/0"}
