"""Training: a copy of a network, data, settings → the trained network and what happened on the way.

Shapes: inputs, one tensor per network input, each (n, …).
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from hasten.core.data import View
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.core.recipe import Progress
from hasten.load.data import read
from hasten.load.examples import room_bytes
from hasten.train.checkpoint import Checkpoints, identity
from hasten.train.devices import device_of, seeded
from hasten.train.health import Finding, Trend, trend
from hasten.train.hints import watched
from hasten.train.layers import freeze, trainable
from hasten.train.lesson import Lesson, Look
from hasten.train.objective import objective, probe
from hasten.train.outputs import Tensors, outputs_of
from hasten.train.records import Record, Watcher, silent
from hasten.train.run import Diverged, Run
from hasten.train.sampler import Sampler
from hasten.train.settings import Fit
from hasten.train.source import Resident, Stream
from hasten.train.targets import IGNORED, balanced

__all__ = ["AfterStep", "Curve", "Diverged", "Fitted", "Trainer", "fit", "go_on", "trainable"]

Curve = tuple[tuple[int, float], ...]
AfterStep = Callable[[nn.Module, int, int], bool | None]
"""What is done with (the network in training, step, steps planned) after a step; True ends the training."""

_BY_HAND = "after_step ended it"
_EXAMPLE = 4  # rows that a network is tried with before it is trained


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A trained network.

    Args:
        module: the new network, in eval mode, on the device of the old one.
        curve: (step, loss) of every step taken, steps counted from 1.
        steps: that were planned; the curve is shorter where something ended the training before.
        ended: what that was, or nothing.
        trend: what the loss did in the end.
        looks: losses on the validation data.
        findings: layers whose gradients vanished or exploded.
        notes: plain sentences on what went otherwise than planned.
        seconds: on the clock.
        compile_seconds: of them, what compiling cost: the first step beyond a later one; 0 without.
    """

    module: nn.Module
    curve: Curve
    steps: int
    ended: str = ""
    trend: Trend = "too short"
    looks: tuple[float, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    compile_seconds: float = 0.0


def _unheard(share: float, words: str) -> None:
    del share, words


def go_on(student: nn.Module, step: int, steps: int) -> None:
    """Looks on and does nothing."""
    del student, step, steps


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains networks: one value holds how, `fit` does it.

    The same seed gives the same bytes on the same machine with the same number of threads, interrupted or not. The global
    random state is as before when a training ends. Parameters that ask for no gradient stay frozen.

    Args:
        settings: how to train.
        validation: data that no gradient sees, looked at every `settings.stop.every` passes: whatever `load.data.read` takes.
        teacher: gives the outputs to learn from, where the settings need one.
        device: "cpu", "cuda", "cuda:1", "mps" or "xla" ("tpu").
        checkpoints: where the training is put on disk to be taken up again; None for nowhere.
        watch: is told of every step.
        after_step: called when the optimizer has changed the weights, with the network in training mode, the number of the
            step, counted from 1, and the steps planned. It may write on the weights; the training ends where it says True.

    >>> line = View(inputs=(np.linspace(-1, 1, 64, dtype=np.float32)[:, None],), labels=np.linspace(-3, 3, 64))
    >>> trainer = Trainer(settings=Fit(loss="values", epochs=100, batch=16, learning_rate=0.1))
    >>> round(trainer.fit(nn.Linear(1, 1), line).module.weight.item(), 1)
    3.0
    """

    settings: Fit = field(default_factory=Fit)
    validation: Any = None
    teacher: nn.Module | None = None
    device: str = "cpu"
    checkpoints: Checkpoints | None = None
    watch: Watcher = silent
    after_step: AfterStep = go_on

    def __post_init__(self) -> None:
        settings = self.settings
        if settings.needs_teacher != (self.teacher is not None):
            wrong = "needs a teacher, got none" if self.teacher is None else "makes no use of the teacher; set distil above 0"
            raise UsageError(f"training with loss={settings.loss!r} and distil={settings.distil} {wrong}")
        if settings.needs_validation and self.validation is None:
            raise UsageError("stopping by patience, or a plateau schedule, needs validation data, got none")

    def fit(self, module: nn.Module, data: Any) -> Fitted:
        """Trains a copy of `module`; `module` and the teacher stay as they are.

        Args:
            data: arrays, (inputs, labels), a file, or a `View` (see `load.data.read`), held in memory or, where a view lies on
                disk and is too large, read from there batch by batch; or a DataLoader or another iterable of batches that can
                be begun anew, labels last where the loss needs them.

        Raises:
            DataRefused: fewer than two examples, or labels that do not fit the loss or the outputs.
            Diverged: the loss or its gradient is NaN or infinite; at the very step, with the layer where it was born.
            Unsupported: nothing in the network can be trained, or a layer cannot be matched with the teacher's.
            UsageError: the teacher's outputs have another shape; images are asked for and there are none; the checkpoints
                are of another training.
            RunLocked: another process writes these checkpoints.
        """
        data, settings = _viewed(data), self.settings
        if settings.learning_rate == "auto":
            from hasten.train.rates import choose

            return choose(self, module, data)
        if isinstance(data, View):
            _check(settings, data)
        place = device_of(self.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(seeded(place, settings.seed))
            stack.enter_context(torch.enable_grad())
            home = trainable(module)[0].device
            student = copy.deepcopy(module).eval().to(place)
            thaw = freeze(student, settings)
            shown, lesson, steps = self._lesson(student, data, place)
            precision = settings.precision.settled(student, lesson.example)
            forward = stack.enter_context(precision.prepared(shown, of=student))
            run = Run(shown, forward, lesson, replace(settings, precision=precision), steps)
            if self.checkpoints is not None:
                stack.callback(self.checkpoints.lock().release)
                _take_up(run, self.checkpoints, identity(settings, shown, data))
            compile_seconds = self._go(run, student)
            run.finish()
            thaw()
        return Fitted(
            module=student.eval().to(home),
            curve=tuple(run.curve),
            steps=steps,
            ended=run.ended,
            trend=trend([loss for _, loss in run.curve]),
            looks=tuple(run.looks),
            findings=tuple(run.findings),
            notes=tuple(run.notes),
            seconds=run.seconds,
            compile_seconds=compile_seconds,
        )

    def _lesson(self, student: nn.Module, data: View | Iterable[Any], place: torch.device) -> tuple[nn.Module, Lesson, int]:
        """The network with its hidden values shown where they are learnt, what it learns from, and the steps planned."""
        settings, teacher, shown = self.settings, self.teacher, student
        generator = torch.Generator().manual_seed(settings.seed)
        if isinstance(data, View):
            inputs, labels = _tensors(data, place), data.labels
        else:
            stream = Stream(data, place, labelled=settings.loss != "original")
            _check_stream(settings, stream)
            inputs, labels = stream.first
        if settings.hints is not None and teacher is not None:
            index = probe(settings, inputs)
            shown, teacher = watched(settings.hints, student, teacher, tuple(a[index] for a in inputs))
        aim = objective(settings, shown, teacher, inputs, labels, whole=isinstance(data, View))
        example = tuple(a[:_EXAMPLE].clone().to(place) for a in inputs)
        look = None if self.validation is None else self._look(student, _known(self.validation), place)
        if not isinstance(data, View):
            stream.feed(aim.targets)
            steps = settings.stop.steps or max(1, round(settings.epochs * stream.per_pass))
            return shown, Lesson(source=stream, aim=aim, generator=generator, example=example, look=look), steps
        chances = None
        if settings.balance == "sampling" and aim.targets is not None:
            chances = _chances(aim.targets.values)
        sampler = Sampler(len(data), settings.size(len(data)), generator, chances)
        source = Resident(inputs, sampler, place)
        lesson = Lesson(source=source, aim=aim, generator=generator, example=example, look=look, examples=len(data))
        return shown, lesson, settings.steps(len(data))

    def _look(self, student: nn.Module, view: View, place: torch.device) -> Look:
        """Loss and accuracy on the validation data, without smoothing, weights or hidden values."""
        plain = replace(self.settings, hints=None, label_smoothing=0.0, balance="none", augmentation="none")
        inputs = _tensors(view, place)
        aim = objective(plain, student, self.teacher if plain.needs_teacher else None, inputs, view.labels)
        parts = torch.split(torch.arange(len(view)), max(2, plain.size(len(view))))

        @torch.no_grad()
        def look() -> tuple[float, float | None]:
            student.eval()
            loss = right = count = 0.0
            for index in parts:
                seen = tuple(a[index].to(place) for a in inputs)
                outputs, weight = outputs_of(student, seen), aim.count(index)
                if weight:
                    loss, count = loss + weight * aim(outputs, index, seen).item(), count + weight
                    right += weight * aim.right(outputs, index) if aim.right else 0.0
            return loss / count, right / count if aim.right else None

        return look

    def _go(self, run: Run, student: nn.Module) -> float:
        """Steps until the end; what compiling cost."""
        took: list[float] = []
        saved = time.monotonic()
        while run.step < run.steps and not run.ended:
            began = time.perf_counter()
            before, record = run.step, run.advance()
            if run.step <= before and self.checkpoints is not None:
                self.checkpoints.forget(after=run.step)
            took.append(time.perf_counter() - began)
            if self.after_step(student, run.step, run.steps):
                run.ended = run.ended or _BY_HAND
            self.watch(record)
            over = run.step == run.steps or bool(run.ended)
            if self.checkpoints is not None and (over or self.checkpoints.due(run.step, time.monotonic() - saved)):
                self.checkpoints.save(run.step, {"run": run.state(), "of": run.identity})
                saved = time.monotonic()
        if not self.settings.precision.compile or len(took) < 2:
            return 0.0
        return max(0.0, took[0] - median(took[1:]))


def fit(
    module: nn.Module,
    view: View,
    *,
    settings: Fit,
    teacher: nn.Module | None = None,
    device: str = "cpu",
    progress: Progress = _unheard,
    after_step: AfterStep = go_on,
) -> Fitted:
    """`Trainer.fit` as a step of a recipe calls it; `progress` is called about a hundred times.

    >>> line = View(inputs=(np.linspace(-1, 1, 64, dtype=np.float32)[:, None],), labels=np.linspace(-3, 3, 64))
    >>> fitted = fit(nn.Linear(1, 1), line, settings=Fit(loss="values", epochs=100, batch=16, learning_rate=0.1))
    >>> round(fitted.module.weight.item(), 1)
    3.0
    """

    def watch(record: Record) -> None:
        if record.step % math.ceil(record.steps / 100) == 0 or record.step == record.steps:
            progress(record.step / record.steps, f"step {record.step} of {record.steps}, loss {record.loss:.4g}")

    trainer = Trainer(settings=settings, teacher=teacher, device=device, watch=watch, after_step=after_step)
    return trainer.fit(module, view)


def _known(data: Any) -> View:
    """A view as it is, for what trains may look; anything else is read."""
    return data if isinstance(data, View) else read(data).view


def _viewed(data: Any) -> View | Iterable[Any]:
    """Data that is there at once as a view; a stream as it is."""
    whole = isinstance(data, (tuple, Mapping, str, os.PathLike, np.ndarray, torch.Tensor))
    return read(data).view if whole else data


def _check(settings: Fit, view: View) -> None:
    if len(view) < 2:
        raise DataRefused(f"training needs at least 2 examples, got {len(view)}")
    first = view.inputs[0]
    _check_augmented(settings, first.shape, str(first.dtype), floats=first.dtype.kind == "f")


def _check_augmented(settings: Fit, shape: tuple[int, ...], dtype: str, *, floats: bool) -> None:
    """Whether the first input can be changed as the augmentation changes it."""
    augment = settings.augment()
    if augment.needs_images and len(shape) != 4:
        asked = settings.augmentation if isinstance(settings.augmentation, str) else "this augmentation"
        raise DataRefused(f"{asked} needs images (n, channels, height, width), got {tuple(shape)}")
    reckoning = {"mixup": augment.mixup > 0, "cutout": augment.cutout > 0, "resize": augment.resize < 1}
    if not floats and any(reckoning.values()):
        name = next(name for name, on in reckoning.items() if on)
        raise DataRefused(f"{name} needs inputs of floating-point numbers, got {dtype.removeprefix('torch.')}")


def _check_stream(settings: Fit, stream: Stream) -> None:
    first = stream.first[0][0]
    _check_augmented(settings, first.shape, str(first.dtype), floats=first.is_floating_point())
    if settings.needs_teacher and settings.hints is not None:
        raise Unsupported("hidden values are learnt from data in memory, this is a stream; give a View")
    if settings.balance == "weights":
        raise UsageError("balance='weights' counts the classes of all the data, this is a stream; give the weights themselves, or a View")
    if settings.balance == "sampling" or settings.augment().flip == "alternating":
        raise UsageError("balanced sampling and alternating flips need to know each example, this is a stream; give a View")
    if not stream.per_pass and settings.stop.steps is None:
        raise UsageError("a stream that does not know its length needs stop=Stop(steps=…)")


def _tensors(view: View, place: torch.device) -> Tensors:
    """The data on the device: what lies in memory without a copy, for batches are gathered and nothing writes on it.

    What lies on disk is read, but where it is too large for memory it stays there and is read where it is touched.
    """
    large = sum(a.nbytes for a in view.inputs) > room_bytes()
    found = []
    for array in view.inputs:
        on_disk = isinstance(array, np.memmap)
        if on_disk and not large:
            array = np.array(array)
        with warnings.catch_warnings(action="ignore"):  # that it cannot be written on
            tensor = torch.from_numpy(array if on_disk else np.ascontiguousarray(array))
        found.append(tensor if on_disk and large else tensor.to(place))
    return tuple(found)


def _chances(labels: torch.Tensor) -> torch.Tensor:
    """(n,): each class is drawn equally often; an example of several labels by its first."""
    first = labels.flatten(1)[:, 0] if labels.ndim > 1 else labels
    if bool((first == IGNORED).any()):
        raise DataRefused(f"balanced sampling needs a class for every example, got {IGNORED}, left out")
    return balanced(first, int(first.max()) + 1)[first].cpu()


def _take_up(run: Run, checkpoints: Checkpoints, identity: str) -> None:
    run.identity = identity
    state, notes = checkpoints.newest()
    if state is None:
        return
    if state["of"] != identity:
        raise UsageError(f"{checkpoints.folder} holds a training with other settings, data or layers; choose a new folder")
    run.load(state["run"])
    checkpoints.forget(after=run.step)  # damaged ones, which would take the place of whole ones
    run.notes += notes
