"""The training loop: resident tensors, a fused optimizer, and every random number from one seed.

Shapes: inputs, one tensor per network input, each (n, …).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hasten.core.data import View
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.core.recipe import Progress
from hasten.train import optim
from hasten.train.augment import shift
from hasten.train.hints import watched
from hasten.train.objective import Objective, objective, probe
from hasten.train.outputs import Tensors, outputs_of
from hasten.train.settings import Fit

Curve = tuple[tuple[int, float], ...]
AfterStep = Callable[[nn.Module, int, int], bool | None]
"""What is done with (the network in training, step, steps planned) after a step; True ends the training."""

_SHIFT_PIXELS = 2
_LARGE = 1_000_000


class Diverged(Unsupported):
    """The loss or its gradient stopped being a finite number."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fitted:
    """A trained network.

    Args:
        module: the new network, in eval mode, on the device of the old one.
        curve: (step, loss) of every step taken, steps counted from 1.
        steps: that were planned; the curve is shorter where `after_step` ended it.
    """

    module: nn.Module
    curve: Curve
    steps: int


def _silent(share: float, words: str) -> None:
    del share, words


def go_on(student: nn.Module, step: int, steps: int) -> None:
    """Looks on and does nothing."""
    del student, step, steps


def fit(
    module: nn.Module,
    view: View,
    *,
    settings: Fit,
    teacher: nn.Module | None = None,
    device: str = "cpu",
    progress: Progress = _silent,
    after_step: AfterStep = go_on,
) -> Fitted:
    """Trains a copy of `module` on `view`, held in memory; `module` and `teacher` stay as they are.

    The same seed gives the same bytes on the same machine with the same number of threads. The global random state is
    as before when the call ends. Parameters that ask for no gradient stay frozen.

    Args:
        teacher: gives the outputs to learn from, where `settings` need one.
        device: a torch device.
        progress: called about a hundred times.
        after_step: called when the optimizer has changed the weights, with the network in training mode, the number of the
            step, counted from 1, and the steps planned. It may write on the weights; the training ends where it says True.

    Raises:
        DataRefused: fewer than two examples, or labels that do not fit the loss or the outputs.
        Diverged: the loss or its gradient is NaN or infinite; at the very step.
        Unsupported: nothing in the network can be trained, or a layer cannot be matched with the teacher's.
        UsageError: a teacher is missing, not needed, or gives outputs of another shape; shift without images.

    >>> line = View(inputs=(np.linspace(-1, 1, 64, dtype=np.float32)[:, None],), labels=np.linspace(-3, 3, 64))
    >>> fitted = fit(nn.Linear(1, 1), line, settings=Fit(loss="values", epochs=100, batch=16, learning_rate=0.1))
    >>> round(fitted.module.weight.item(), 1)
    3.0
    """
    if settings.needs_teacher != (teacher is not None):
        wrong = "needs a teacher, got none" if teacher is None else "makes no use of the teacher; set distil above 0"
        raise UsageError(f"training with loss={settings.loss!r} and distil={settings.distil} {wrong}")
    if len(view) < 2:
        raise DataRefused(f"training needs at least 2 examples, got {len(view)}")
    if settings.augmentation == "shift" and view.inputs[0].ndim != 4:
        raise UsageError(f"shift needs images (n, channels, height, width), got {view.inputs[0].shape}")
    place = torch.device(device)
    with torch.random.fork_rng(devices=[] if place.type == "cpu" else [place]), torch.enable_grad():
        torch.default_generator.manual_seed(settings.seed)  # dropout draws from the global state
        if place.type == "cuda":
            torch.cuda.manual_seed(settings.seed)
        home = trainable(module)[0].device
        student = copy.deepcopy(module).eval().to(place)
        inputs = tuple(torch.from_numpy(np.array(a)).to(place) for a in view.inputs)
        shown = student
        if settings.hints is not None and teacher is not None:
            index = probe(settings, inputs)
            shown, teacher = watched(settings.hints, student, teacher, tuple(a[index] for a in inputs))
        aim = objective(settings, shown, teacher, inputs, view.labels)

        def look(_: nn.Module, step: int, steps: int) -> bool | None:
            return after_step(student, step, steps)

        curve = _train(shown, inputs, aim, settings=settings, progress=progress, after_step=look)
    return Fitted(module=student.eval().to(home), curve=curve, steps=settings.steps(len(view)))


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that ask for a gradient. Raises Unsupported where there are none."""
    if found := [p for p in module.parameters() if p.requires_grad]:
        return found
    raise Unsupported("training needs parameters with requires_grad=True, the network has none")


def _train(
    student: nn.Module,
    inputs: Tensors,
    aim: Objective,
    *,
    settings: Fit,
    progress: Progress,
    after_step: AfterStep,
) -> Curve:
    student.train()
    if settings.freeze_norms:
        for layer in student.modules():
            if isinstance(layer, nn.modules.batchnorm._NormBase):
                layer.eval()
    examples, generator = len(inputs[0]), torch.Generator().manual_seed(settings.seed)
    weights, steps = trainable(student), settings.steps(examples)
    optimizer = _optimizer(weights, settings)
    curve: list[tuple[int, float]] = []
    for step, index in enumerate(itertools.islice(_batches(examples, settings.batch, generator), steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step, steps)
        seen = _augmented(tuple(a[index] for a in inputs), settings, generator)
        loss = aim(outputs_of(student, seen), index, seen)
        optimizer.zero_grad()
        norm = _gradient(loss, weights, settings.clip)
        value = loss.item()
        if not math.isfinite(value + norm):
            raise Diverged(
                f"the loss and its gradient must stay finite, got a loss of {value} with a gradient of norm {norm} at step "
                f"{step} of {steps}; lower learning_rate ({settings.learning_rate:g}) or look for NaN in the data"
            )
        optimizer.step()
        ended = after_step(student, step, steps)
        curve.append((step, value))
        if step % math.ceil(steps / 100) == 0 or step == steps:
            progress(step / steps, f"step {step} of {steps}, loss {value:.4g}")
        if ended:
            break
    student.zero_grad()
    return tuple(curve)


def _gradient(loss: torch.Tensor, weights: list[nn.Parameter], clip: float) -> float:
    """Leaves the clipped gradient in the weights; its norm before."""
    if not loss.requires_grad:
        raise Unsupported("training needs outputs that depend on the parameters, these do not")
    loss.backward()  # type: ignore[no-untyped-call]
    return nn.utils.clip_grad_norm_(weights, clip).item()


def _batches(examples: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices without end: one new order per pass, without its incomplete last batch; all at once where there are fewer."""
    size = min(size, examples)
    while True:
        order = torch.randperm(examples, generator=generator)
        yield from torch.split(order[: examples - examples % size], size)


def _augmented(inputs: Tensors, settings: Fit, generator: torch.Generator) -> Tensors:
    if settings.augmentation == "none":
        return inputs
    return (shift(inputs[0], most=_SHIFT_PIXELS, generator=generator), *inputs[1:])


def _optimizer(weights: list[nn.Parameter], settings: Fit) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in weights if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    # on a processor our kernels win where memory decides; below that, what torch does before its kernel is shorter
    large = sum(p.numel() for p in weights) >= _LARGE
    ours = large and weights[0].device.type == "cpu" and optim.missing() is None
    sgd, adamw = (optim.SGD, optim.AdamW) if ours else (torch.optim.SGD, torch.optim.AdamW)
    if settings.optimizer == "sgd":
        return sgd(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True, fused=True)
    return adamw(groups, lr=settings.learning_rate, fused=True)
