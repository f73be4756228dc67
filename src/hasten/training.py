"""The verb `train`: a built-in task or the user's own network, data → a trained network in a run folder, with its curves.

The folder holds `checkpoints/` while and after it runs, `log.jsonl`, `curves.html`, `weights.pt`, `result.json` and, where
torch.export can follow the network, `model.pt2`.
"""

from __future__ import annotations

import copy
import io
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten import tasks
from hasten.core import folder
from hasten.core.data import View
from hasten.core.errors import HastenError, ModelRefused, StorageError, UsageError
from hasten.load import files
from hasten.load.data import read
from hasten.load.lower import reason
from hasten.load.script import from_script
from hasten.tasks import networks
from hasten.train import Checkpoints, Fit, Fitted, Precision, Stop, Trainer, initial
from hasten.train.outputs import outputs_of
from hasten.train.records import Log, Record, TensorBoard, Watcher, together
from hasten.train.worded import worded

_VOCABULARY = 30_522  # of the tokens of `tasks.text`


class Words(nn.Module):
    """The mean of the tokens' vectors and a linear layer: ids and mask, (batch, tokens) each → (batch, classes)."""

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(_VOCABULARY, width), nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        shares = mask.unsqueeze(-1).to(self.table.weight.dtype)
        result: Tensor = self.head((self.table(ids) * shares).sum(1) / shares.sum(1))
        return result


def mlp(view: View, classes: int) -> nn.Module:
    """As many inputs as an example has values, then 128-64-classes with ReLU; on images of 28×28 it is `tasks.networks.mlp`."""
    values = math.prod(view.inputs[0].shape[1:])
    return nn.Sequential(nn.Flatten(), nn.Linear(values, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, classes))


NETWORKS: dict[str, Callable[[View, int], nn.Module]] = {
    "lstm": lambda _, classes: networks.lstm(classes),
    "mlp": mlp,
    "mobilenet": lambda _, classes: networks.mobilenet(classes),
    "resnet18": lambda _, classes: networks.resnet18(classes),
    "resnet20": lambda _, classes: networks.resnet20(classes),
    "small_cnn": lambda _, classes: networks.small_cnn(classes),
    "words": lambda _, classes: Words(classes),
}


def suited(view: View) -> str:
    """The network of `NETWORKS` that a task is trained with if none is named."""
    if len(view.inputs) > 1:
        return "words"
    return "small_cnn" if view.inputs[0].ndim == 4 else "mlp"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `train` was asked for.

    Args:
        model: the name of a task, or `script.py:name` of a network or a function without arguments that gives one.
        data: of a script's network: a file or folder (see `load.data.read`), or the name of a task. None for a task.
        validation: a file; by default the data a task holds out, for a script nothing.
        network: which of `NETWORKS` is trained on a task; None for the one that suits the data.
        run: the folder.
        device: see `Trainer`.
        target: name of the part of the data that holds the labels.
        tensorboard: whether events for TensorBoard are written as well.
        standardize: whether inputs go to mean 0 and variance 1, as the training examples say; the result does so itself.
    """

    model: str
    run: Path
    data: str | None = None
    validation: str | None = None
    network: str | None = None
    device: str = "cpu"
    target: str | None = None
    tensorboard: bool = False
    standardize: bool = False


def asked(words: Mapping[str, Any]) -> tuple[Job, Fit]:
    """What the options of `hasten train` ask for, each under its own name; `set_` holds words for `worded`.

    Raises:
        UsageError: words that cannot be used.
    """
    settings = Fit(
        batch=words["batch"] or None,
        augmentation=words["augment"],
        precision=Precision(format=words["precision"]),
        stop=Stop(steps=words["steps"], loss=words["stop_loss"], seconds=words["seconds"], patience=words["patience"]),
        **{name: words[name] for name in ("epochs", "learning_rate", "loss", "optimizer", "schedule", "seed", "warm_up")},
    )
    run = words["run"] or Path("runs") / f"train-{Path(words['model'].partition(':')[0]).stem}"
    return Job(**{f.name: words[f.name] for f in fields(Job)} | {"run": run}), worded(settings, words["set_"])


def train(job: Job, settings: Fit, *, stream: IO[str] | None = None, as_json: bool = False) -> dict[str, Any]:
    """Trains, writes the run folder, and says what came out; the progress goes to `stream`, usually standard error.

    Raises:
        UsageError: words that cannot be used.
        ModelRefused: the script does not give a network.
    """
    torch.manual_seed(settings.seed)
    view, validation, of, classes = _data(job, settings)
    name, module = _network(job, view, classes, settings)
    if job.standardize:
        module = initial.standardized(module, view)
    board = TensorBoard(job.run / "tensorboard") if job.tensorboard else None
    line = Line(stream or sys.stderr, as_json=as_json)
    watch: list[Watcher] = [Log(job.run / "log.jsonl"), line, *([board] if board else [])]
    trainer = Trainer(
        settings=settings,
        validation=validation,
        device=job.device,
        checkpoints=Checkpoints(folder=job.run / "checkpoints"),
        watch=together(*watch),
    )
    try:
        fitted = trainer.fit(module, view)
    finally:
        line.close()
        if board:
            board.close()
    return _written(job, settings, fitted, view, of, name)


class Line:
    """A watcher that keeps one line of a terminal up to date, or writes a line now and then into a file.

    Args:
        stream: usually standard error.
        as_json: one JSON object per line, the record, for programs.
    """

    def __init__(self, stream: IO[str], *, as_json: bool = False) -> None:
        self._stream, self._as_json, self._said = stream, as_json, -1e9
        self._terminal = stream.isatty() and not as_json
        self._unsaid: Record | None = None
        self._open = False  # a line that the next one writes over

    def __call__(self, record: Record) -> None:
        """Says where the training stands."""
        last = record.step == record.steps and not record.trial
        self._unsaid = record
        if last or abs(record.seconds - self._said) >= (0.2 if self._terminal else 10.0):  # behind a search the seconds begin anew
            self._say(record, last=last)

    def close(self) -> None:
        """Says the last step, where it was not said, and ends the line: a training may end before its last step."""
        if self._unsaid is not None:
            self._say(self._unsaid, last=True)
        elif self._open:
            print(file=self._stream, flush=True)
        self._open = False

    def _say(self, record: Record, *, last: bool) -> None:
        self._said, self._unsaid = record.seconds, None
        if self._terminal:
            print(f"\r\x1b[K{told(record)}", end="\n" if last else "", file=self._stream, flush=True)
            self._open = not last
        else:
            print(record.to_json() if self._as_json else told(record), file=self._stream, flush=True)


def told(record: Record) -> str:
    """The record in one line.

    >>> told(Record(step=30, steps=120, batch=64, epoch=1.5, loss=0.25, rate=0.001, norm=1, seconds=20))
    'step 30 of 120, epoch 1.5 · loss 0.25 · rate 0.001 · batch 64 · about 1:00 left'
    """
    if record.trial:
        return f"looking for the learning rate: {record.trial} · step {record.step} of {record.steps} · loss {record.loss:.4g}"
    minutes, seconds = divmod(round(record.left_s), 60)
    looked = "" if record.validation is None else f" · validation {record.validation:.4g}"
    right = "" if record.accuracy is None else f", {100 * record.accuracy:.2f} % right"
    return (
        f"step {record.step} of {record.steps}, epoch {record.epoch:.3g} · loss {record.loss:.4g}{looked}{right}"
        f" · rate {record.rate:.3g} · batch {record.batch} · about {minutes}:{seconds:02} left"
    )


def _data(job: Job, settings: Fit) -> tuple[View, View | None, str | None, int]:
    """What is trained on, what is looked at, what that is, and how many classes a task has.

    Where a look decides something, it is never at held-out data.
    """
    scripted = job.model.partition(":")[0].endswith(".py")
    if not scripted and job.data is not None:
        raise UsageError(f"--data is for a network of your own (script.py:name); the task {job.model} brings its data")
    if scripted and job.data is None:
        raise UsageError(f"{job.model} needs --data: a file, a folder of images, or one of the tasks {', '.join(tasks.names())}")
    source = job.data if scripted and job.data is not None else job.model
    held_out, classes, count = None, None, 0
    if not scripted or source.replace("-", "_") in tasks.names():
        found = tasks.load(source)
        view, held_out, count = found.train, found.held_out, len(found.classes)
    else:
        loaded = read(source, target=job.target)
        view, classes = loaded.view, loaded.classes
    if job.validation is not None:
        return view, read(job.validation, target=job.target, classes=classes).view, job.validation, count
    if not settings.needs_validation:
        return view, held_out, "held-out data" if held_out else None, count
    order = np.random.default_rng(settings.seed).permutation(len(view))
    cut = max(2, len(view) // 10)
    return view.take(np.sort(order[cut:])), view.take(np.sort(order[:cut])), "a tenth of the training data", count


def _network(job: Job, view: View, classes: int, settings: Fit) -> tuple[str, nn.Module]:
    """What the network is called, and the network, which was run on a batch."""
    path, _, name = job.model.partition(":")
    scripted = path.endswith(".py")
    called = job.model if scripted else job.network or suited(view)
    if not scripted and called not in NETWORKS:
        raise UsageError(f"--network must be one of {', '.join(NETWORKS)}, got {job.network!r}")
    module = from_script(Path(path), name or "model") if scripted else NETWORKS[called](view, classes)
    try:
        _run(module, view, settings)
    except HastenError:
        raise
    except Exception as why:  # a network raises whatever its layers raise
        shapes = " and ".join(str(("n", *a.shape[1:])).replace("'", "") for a in view.inputs)
        if scripted:
            raise ModelRefused(f"{called} does not run on the data {job.data}, {shapes}: {reason(why)}") from why
        way = f"leave it out for {suited(view)}"
        raise UsageError(f"--network {called} does not fit the data of {job.model}, {shapes}: {reason(why)}; {way}") from why
    return called, module


@torch.no_grad()
def _run(module: nn.Module, view: View, settings: Fit) -> None:
    """Runs a copy of the network on the first batch."""
    first = tuple(torch.from_numpy(np.array(a[: settings.size(len(view))])) for a in view.inputs)
    with torch.random.fork_rng(devices=[]):
        outputs_of(copy.deepcopy(module).eval(), first)


def _written(job: Job, settings: Fit, fitted: Fitted, view: View, of: str | None, name: str) -> dict[str, Any]:
    """Writes weights, curves and result, and only then tries the export, which not every network bears."""
    from hasten.report import curves
    from hasten.train import records

    known = records.read(job.run / "log.jsonl")
    last = known[-1]
    looks = [r for r in known if r.validation is not None]
    shown = None  # the look at what is handed over
    if looks:
        shown = looks[-1] if settings.stop.patience is None else min(looks, key=lambda r: r.validation or 0.0)
    result = {
        "run": str(job.run),
        "network": name,
        "examples": len(view),
        "steps": last.step,
        "planned_steps": fitted.steps,
        "global_batch": last.batch,
        "learning_rate": max(r.rate for r in known),
        "loss": last.loss,
        "validation_data": of,
        "validation_loss": shown.validation if shown else None,
        "accuracy": shown.accuracy if shown else None,
        "seconds": round(fitted.seconds, 3),
        "compile_seconds": round(fitted.compile_seconds, 3),
        "ended": fitted.ended,
        "trend": fitted.trend,
        "findings": [str(f) for f in fitted.findings],
        "notes": list(fitted.notes),
        "seed": settings.seed,
        "export": "not tried yet",
    }

    def write() -> None:
        folder.write(job.run / "curves.html", curves.page({job.model: known}, result))
        folder.write(job.run / "result.json", json.dumps(result, indent=1) + "\n")

    folder.write(job.run / "weights.pt", _saved(lambda file: torch.save(fitted.module.state_dict(), file)))
    write()
    result["export"] = _exported(job, fitted, view)
    write()
    return result


def _exported(job: Job, fitted: Fitted, view: View) -> str:
    """Writes model.pt2; its name, or why there is none."""
    from hasten.load.program import export_program

    path = job.run / "model.pt2"
    try:
        program = export_program(files.from_module(fitted.module, tuple(a[:4] for a in view.inputs)))
        folder.write(path, _saved(lambda file: torch.export.save(program, file)))
    except StorageError:
        raise
    except Exception as why:  # the exporter raises whatever its parts raise
        path.unlink(missing_ok=True)  # of a training before
        return f"none: {why if isinstance(why, HastenError) else reason(why)}; weights.pt holds what was learnt"
    return path.name


def _saved(save: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()
