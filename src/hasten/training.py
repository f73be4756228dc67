"""The verb `train`: a built-in task or the user's own network, data → a trained network in a run folder, with its curves.

The folder holds `checkpoints/` while and after it runs, `log.jsonl`, `curves.html`, `model.pt2` and `result.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from hasten import tasks
from hasten.core import folder
from hasten.core.data import View
from hasten.core.errors import UsageError
from hasten.load import files
from hasten.load.data import read
from hasten.load.script import from_script
from hasten.tasks import networks
from hasten.train import Checkpoints, Fit, Fitted, Trainer, initial
from hasten.train.records import Log, Record, TensorBoard, Watcher, together

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lstm": networks.lstm,
    "mlp": networks.mlp,
    "mobilenet": networks.mobilenet,
    "resnet20": networks.resnet20,
    "small_cnn": networks.small_cnn,
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `train` was asked for.

    Args:
        model: the name of a task, or `script.py:name` of a network or a function without arguments that gives one.
        data: of a script's network: a file or folder (see `load.data.read`), or the name of a task. None for a task.
        validation: a file; by default the data a task holds out, for a script nothing.
        network: which of `NETWORKS` is trained on a task.
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
    network: str = "small_cnn"
    device: str = "cpu"
    target: str | None = None
    tensorboard: bool = False
    standardize: bool = False


def train(job: Job, settings: Fit, *, stream: IO[str] | None = None, as_json: bool = False) -> dict[str, Any]:
    """Trains, writes the run folder, and says what came out; the progress goes to `stream`, usually standard error.

    Raises:
        UsageError: words that cannot be used.
        ModelRefused: the script does not give a network.
    """
    torch.manual_seed(settings.seed)
    view, validation, of = _data(job, settings)
    module = initial.standardized(_network(job), view) if job.standardize else _network(job)
    board = TensorBoard(job.run / "tensorboard") if job.tensorboard else None
    watch: list[Watcher] = [Log(job.run / "log.jsonl"), Line(stream or sys.stderr, as_json=as_json), *([board] if board else [])]
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
        if board:
            board.close()
    return _written(job, settings, fitted, view, of)


class Line:
    """A watcher that keeps one line of a terminal up to date, or writes a line now and then into a file.

    Args:
        stream: usually standard error.
        as_json: one JSON object per line, the record, for programs.
    """

    def __init__(self, stream: IO[str], *, as_json: bool = False) -> None:
        self._stream, self._as_json, self._said = stream, as_json, -1e9
        self._terminal = stream.isatty() and not as_json

    def __call__(self, record: Record) -> None:
        """Says where the training stands."""
        last = record.step == record.steps
        if not last and record.seconds - self._said < (0.2 if self._terminal else 10.0):
            return
        self._said = record.seconds
        if self._terminal:
            print(f"\r\x1b[K{told(record)}", end="\n" if last else "", file=self._stream, flush=True)
        else:
            print(record.to_json() if self._as_json else told(record), file=self._stream, flush=True)


def told(record: Record) -> str:
    """The record in one line.

    >>> told(Record(step=30, steps=120, batch=64, epoch=1.5, loss=0.25, rate=0.001, norm=1, seconds=20))
    'step 30 of 120, epoch 1.5 · loss 0.25 · rate 0.001 · batch 64 · about 1:00 left'
    """
    minutes, seconds = divmod(round(record.left_s), 60)
    looked = "" if record.validation is None else f" · validation {record.validation:.4g}"
    right = "" if record.accuracy is None else f", {100 * record.accuracy:.2f} % right"
    return (
        f"step {record.step} of {record.steps}, epoch {record.epoch:.3g} · loss {record.loss:.4g}{looked}{right}"
        f" · rate {record.rate:.3g} · batch {record.batch} · about {minutes}:{seconds:02} left"
    )


def _data(job: Job, settings: Fit) -> tuple[View, View | None, str | None]:
    """What is trained on, what is looked at, and what that is. Where a look decides something, it is never at held-out data."""
    scripted = job.model.partition(":")[0].endswith(".py")
    if not scripted and job.data is not None:
        raise UsageError(f"--data is for a network of your own (script.py:name); the task {job.model} brings its data")
    if scripted and job.data is None:
        raise UsageError(f"{job.model} needs --data: a file, a folder of images, or one of the tasks {', '.join(tasks.names())}")
    source = job.data if scripted and job.data is not None else job.model
    held_out, classes = None, None
    if not scripted or source.replace("-", "_") in tasks.names():
        found = tasks.load(source)
        view, held_out = found.train, found.held_out
    else:
        loaded = read(source, target=job.target)
        view, classes = loaded.view, loaded.classes
    if job.validation is not None:
        return view, read(job.validation, target=job.target, classes=classes).view, job.validation
    if not settings.needs_validation:
        return view, held_out, "held-out data" if held_out else None
    order = np.random.default_rng(settings.seed).permutation(len(view))
    cut = max(2, len(view) // 10)
    return view.take(np.sort(order[cut:])), view.take(np.sort(order[:cut])), "a tenth of the training data"


def _network(job: Job) -> nn.Module:
    path, _, name = job.model.partition(":")
    if not path.endswith(".py"):
        if job.network not in NETWORKS:
            raise UsageError(f"--network must be one of {', '.join(NETWORKS)}, got {job.network!r}")
        return NETWORKS[job.network]()
    return from_script(Path(path), name or "model")


def _written(job: Job, settings: Fit, fitted: Fitted, view: View, of: str | None) -> dict[str, Any]:
    from hasten.load.program import export_program
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
    }
    network = files.from_module(fitted.module, tuple(a[:4] for a in view.inputs))
    torch.export.save(export_program(network), job.run / "model.pt2")
    folder.write(job.run / "curves.html", curves.page({job.model: known}, result))
    folder.write(job.run / "result.json", json.dumps(result, indent=1) + "\n")
    return result
