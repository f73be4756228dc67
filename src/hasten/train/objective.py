"""What a network learns: a loss of its outputs against labels, a teacher's outputs, or both.

Shapes: outputs (batch, …); class scores (batch, classes, …) or (batch, …, classes), labels the same without the classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.data import Array
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.core.network import Arrays
from hasten.train.hints import Watched
from hasten.train.outputs import Tensors, outputs_of
from hasten.train.settings import Fit, Hints
from hasten.train.targets import IGNORED, Targets, as_classes, as_values, class_axis, class_weights

Losses = Callable[[Tensors, torch.Tensor, Tensors], torch.Tensor]

_KEPT_BYTES = 1 << 28  # of a teacher's outputs
_PROBED = 64  # examples that are looked at where batches are single examples


def _examples(index: torch.Tensor) -> float:
    return len(index)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a network learns. Called with (outputs, index of the examples, inputs as the network saw them) it gives the loss.

    Args:
        loss: the mean over the targets of a batch.
        count: how many targets the examples at an index have, weighed as the mean weighs them; parts of a batch add by it.
        right: the share of (outputs, index) that is right, where the loss is of classes.
        targets: the labels, or None where the loss needs none.
    """

    loss: Losses
    count: Callable[[torch.Tensor], float] = _examples
    right: Callable[[Tensors, torch.Tensor], float] | None = None
    targets: Targets | None = None

    def __call__(self, outputs: Tensors, index: torch.Tensor, seen: Tensors) -> torch.Tensor:
        return self.loss(outputs, index, seen)


def objective(
    settings: Fit, module: nn.Module, teacher: nn.Module | None, inputs: Tensors, labels: Array | None, *, whole: bool = True
) -> Objective:
    """The loss that `settings` ask for, after a look at what `module` (in eval mode) gives on one batch.

    `whole`: inputs and labels are all of the data, not a stream's first batch.

    Labels tell of the first output. With a teacher, the others keep to its own at full weight: nothing else says what they should be.

    With hints both networks are `Watched`: their hidden values lie behind their outputs.
    """
    index = probe(settings, inputs)
    hidden = len(module.names) if isinstance(module, Watched) else 0
    with torch.no_grad():
        given = outputs_of(module, tuple(a[index] for a in inputs))
    shown = given[: len(given) - hidden]
    lesson = None
    if teacher is not None:
        lesson = _Teacher(teacher, inputs, index, repeats=whole and not settings.augment().on, hidden=hidden)
    if lesson is not None and [o.shape for o in lesson.shown] != [o.shape for o in shown]:
        shapes = [[tuple(o.shape) for o in outputs] for outputs in (shown, lesson.shown)]
        raise UsageError(f"a teacher must give outputs of the network's shapes {shapes[0]}, got {shapes[1]}")
    taught = lesson if settings.loss == "original" or settings.distil else None
    plain = _of_outputs(settings, shown, taught, labels, whole)
    if lesson is not None and settings.loss != "original":
        plain = _beside(plain, lesson)
    return plain if settings.hints is None or lesson is None else _hinted(settings.hints, plain, lesson)


def probe(settings: Fit, inputs: Tensors) -> torch.Tensor:
    """The places of one batch from all over the data."""
    examples = len(inputs[0])
    size = settings.size(examples)
    return torch.linspace(0, examples - 1, size if size > 1 else min(_PROBED, examples)).long()


def _of_outputs(settings: Fit, shown: Tensors, lesson: _Teacher | None, labels: Array | None, whole: bool) -> Objective:
    if settings.loss == "original":
        assert lesson is not None  # `fit` has seen to it
        return _original(lesson)
    if labels is None:
        raise DataRefused(f"training with the loss {settings.loss!r} needs labels, got none; learn from the original instead")
    if settings.loss == "values":
        return _values(settings, Targets(labels, lambda given: as_values(given, shown[0])), lesson)
    return _classes(settings, shown[0], Targets(labels, lambda given: as_classes(given, shown[0])), lesson, whole)


class Known(nn.Module):
    """A teacher whose outputs on all the training data are known, so that it is asked only about what is changed on the way.

    Args:
        module: the teacher.
        answers: gives its outputs on the data, in their order.
    """

    def __init__(self, module: nn.Module, answers: Callable[[], Arrays]) -> None:
        super().__init__()
        self.module, self.answers = module, answers

    def forward(self, *inputs: torch.Tensor) -> Any:
        """What the teacher gives."""
        return self.module(*inputs)


class _Teacher:
    """A network whose outputs are learnt. Where the inputs repeat from pass to pass and memory allows, it is asked once.

    `shown` are its outputs, and `hidden` its hidden values, on the examples at `probe`.
    """

    def __init__(self, module: nn.Module, inputs: Tensors, probe: torch.Tensor, *, repeats: bool, hidden: int) -> None:
        self._module = copy.deepcopy(module).eval().to(inputs[0].device)
        self._known: Tensors | None = None
        self._last: tuple[torch.Tensor, Tensors] | None = None
        given = self._ask(tuple(a[probe] for a in inputs))
        self.shown, self.hidden = given[: len(given) - hidden], given[len(given) - hidden :]
        examples, size = len(inputs[0]), len(probe)
        rows = all(o.shape[:1] == (size,) for o in given)
        if repeats and rows and sum(o.nbytes for o in given) * examples <= _KEPT_BYTES * size:
            told = [torch.from_numpy(a) for a in module.answers()] if isinstance(module, Known) else self._all(given, inputs, size)
            self._known = tuple(a.to(inputs[0].device) for a in told)

    def __call__(self, index: torch.Tensor, seen: Tensors) -> Tensors:
        """Its outputs and hidden values on the examples at `index`, which the network sees as `seen`."""
        if self._last is None or self._last[0] is not index:  # outputs and hidden values are asked for apart
            self._last = index, self._ask(seen) if self._known is None else tuple(o[index] for o in self._known)
        return self._last[1]

    @torch.no_grad()
    def _ask(self, seen: Tensors) -> Tensors:
        return outputs_of(self._module, seen)

    def _all(self, given: Tensors, inputs: Tensors, size: int) -> Tensors:
        """In whole batches, the last of them moved back to the end: some networks take no other."""
        examples = len(inputs[0])
        known = tuple(o.new_empty((examples, *o.shape[1:])) for o in given)
        for start in range(0, examples, size):
            part = slice(min(start, examples - size), start + size)
            seen = tuple(a[part].clone() for a in inputs)  # a first layer may work in place, on data that are the user's own
            for whole, piece in zip(known, self._ask(seen), strict=True):
                whole[part] = piece
        return known


def _hinted(hints: Hints, plain: Objective, teacher: _Teacher) -> Objective:
    """`plain` and the mean over the layers of how far their hidden values are from the teacher's."""
    count, scales = len(teacher.hidden), [_variance(h) for h in teacher.hidden]

    def distance(mine: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if hints.match == "features":
            return F.mse_loss(mine, theirs) / scale
        return (mine - theirs).flatten(1).square().sum(1).mean()

    def loss(outputs: Tensors, index: torch.Tensor, seen: Tensors) -> torch.Tensor:
        rest = len(outputs) - count
        pairs = zip(outputs[rest:], teacher(index, seen)[rest:], scales, strict=True)
        return plain(outputs[:rest], index, seen) + hints.weight * torch.stack([distance(*pair) for pair in pairs]).mean()

    return replace(plain, loss=loss)


def _original(teacher: _Teacher) -> Objective:
    loss = _distance(teacher, 0)
    if loss is None:
        raise Unsupported("learning from the original needs an output of floating-point numbers, all of them are integers")
    return Objective(loss=loss)


def _beside(plain: Objective, teacher: _Teacher) -> Objective:
    """`plain`, which is of the first output, and the distance of the others from the teacher's."""
    others = _distance(teacher, 1)
    if others is None:
        return plain
    return replace(plain, loss=lambda outputs, index, seen: plain(outputs, index, seen) + others(outputs, index, seen))


def _distance(teacher: _Teacher, first: int) -> Losses | None:
    """Mean over the outputs of floats, from the `first` on, of (mean squared error ÷ variance); None where there are none.

    Beside a first output, those that hold infinities (masks) are left out: no distance to them is a number.
    """
    learnt = [i for i, o in enumerate(teacher.shown) if i >= first and o.is_floating_point()]
    learnt = [i for i in learnt if not first or bool(teacher.shown[i].isfinite().all())]
    scales = [_variance(teacher.shown[i]) for i in learnt]

    def loss(outputs: Tensors, index: torch.Tensor, seen: Tensors) -> torch.Tensor:
        goal = teacher(index, seen)
        parts = [F.mse_loss(outputs[i], goal[i]) / scale for i, scale in zip(learnt, scales, strict=True)]
        return torch.stack(parts).mean()

    return loss if learnt else None


def _values(settings: Fit, labels: Targets, teacher: _Teacher | None) -> Objective:
    scale, distil = _variance(labels.values), settings.distil

    def loss(outputs: Tensors, index: torch.Tensor, seen: Tensors) -> torch.Tensor:
        error = F.mse_loss(outputs[0], labels[index])
        if teacher is not None:
            error = (1 - distil) * error + distil * F.mse_loss(outputs[0], teacher(index, seen)[0])
        return error / scale

    return Objective(loss=loss, targets=labels)


def _classes(settings: Fit, shown: torch.Tensor, labels: Targets, teacher: _Teacher | None, whole: bool) -> Objective:
    axis, warmth, distil = class_axis(shown, labels.values.shape), settings.temperature, settings.distil
    weights = class_weights(labels.values, shown.shape[axis], settings.balance)
    gaps = not whole or bool((labels.values == IGNORED).any()) or (weights is not None and bool((weights == 0).any()))
    rows = _score_rows(shown, axis)
    teacher_rows = rows if teacher is None else _score_rows(teacher.shown[0], axis)

    def loss(outputs: Tensors, index: torch.Tensor, seen: Tensors) -> torch.Tensor:
        scores = rows(outputs[0])
        told = labels[index].flatten()
        if gaps and not count(index):
            hard = scores.sum() * 0.0  # a batch without any target
        else:
            hard = F.cross_entropy(scores, told, weights, label_smoothing=settings.label_smoothing)
        if teacher is None:
            return hard
        mine = F.log_softmax(scores / warmth, 1)
        theirs = F.log_softmax(teacher_rows(teacher(index, seen)[0]) / warmth, 1)
        return (1 - distil) * hard + distil * warmth**2 * F.kl_div(mine, theirs, log_target=True, reduction="batchmean")

    def count(index: torch.Tensor) -> float:
        told = labels[index]
        told = told[told != IGNORED]
        return float(told.numel() if weights is None else weights[told].sum())

    def right(outputs: Tensors, index: torch.Tensor) -> float:
        told = labels[index].flatten()
        found = rows(outputs[0]).argmax(1)[told != IGNORED] == told[told != IGNORED]
        return float(found.float().mean()) if found.numel() else 1.0

    return Objective(loss=loss, count=count, right=right, targets=labels)


def _score_rows(shown: torch.Tensor, axis: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Turns outputs into rows of logits. Probabilities, known by their sum, are logits once their logarithm is taken."""
    shares = shown.movedim(axis, -1)
    probabilities = bool((shares >= 0).all()) and torch.allclose(shares.sum(-1), torch.ones(()).to(shares), atol=1e-3)

    def rows(outputs: torch.Tensor) -> torch.Tensor:
        flat = outputs if outputs.ndim == 2 else outputs.movedim(axis, -1).flatten(0, -2)  # (batch × places, classes)
        return flat.clamp_min(torch.finfo(flat.dtype).tiny).log() if probabilities else flat

    return rows


def _variance(values: torch.Tensor) -> torch.Tensor:
    """Mean over the columns of their variances; 1 where nothing varies."""
    found = (values - values.mean(0)).square().mean()
    return found if found > 0 else torch.ones_like(found)
