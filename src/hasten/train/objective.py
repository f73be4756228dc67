"""What a network learns: a loss of its outputs against labels, a teacher's outputs, or both.

Shapes: outputs (batch, …); class scores (batch, classes, …) or (batch, …, classes), labels the same without the classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.data import Array
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.train.hints import Watched
from hasten.train.outputs import Tensors, outputs_of
from hasten.train.settings import Fit, Hints

Objective = Callable[[Tensors, torch.Tensor, Tensors], torch.Tensor]
"""The loss of (outputs, index of the examples, inputs as the network saw them)."""

_KEPT_BYTES = 1 << 28  # of a teacher's outputs


def objective(settings: Fit, module: nn.Module, teacher: nn.Module | None, inputs: Tensors, labels: Array | None) -> Objective:
    """The loss that `settings` ask for, after a look at what `module` (in eval mode) gives on one batch.

    With hints both networks are `Watched`: their hidden values lie behind their outputs.
    """
    index = probe(settings, inputs)
    hidden = len(module.names) if isinstance(module, Watched) else 0
    with torch.no_grad():
        given = outputs_of(module, tuple(a[index] for a in inputs))
    shown = given[: len(given) - hidden]
    lesson = None
    if teacher is not None:
        lesson = _Teacher(teacher, inputs, index, repeats=settings.augmentation == "none", hidden=hidden)
    if lesson is not None and [o.shape for o in lesson.shown] != [o.shape for o in shown]:
        shapes = [[tuple(o.shape) for o in outputs] for outputs in (shown, lesson.shown)]
        raise UsageError(f"a teacher must give outputs of the network's shapes {shapes[0]}, got {shapes[1]}")
    taught = lesson if settings.loss == "original" or settings.distil else None
    plain = _of_outputs(settings, shown, taught, labels)
    return plain if settings.hints is None or lesson is None else _hinted(settings.hints, plain, lesson)


def probe(settings: Fit, inputs: Tensors) -> torch.Tensor:
    """The places of one batch from all over the data."""
    return torch.linspace(0, len(inputs[0]) - 1, min(settings.batch, len(inputs[0]))).long()


def _of_outputs(settings: Fit, shown: Tensors, lesson: _Teacher | None, labels: Array | None) -> Objective:
    if settings.loss == "original":
        assert lesson is not None  # `fit` has seen to it
        return _original(lesson)
    if labels is None:
        raise DataRefused(f"training with the loss {settings.loss!r} needs labels, got none; learn from the original instead")
    if settings.loss == "values":
        return _values(settings, _as_values(labels, shown[0]), lesson)
    return _classes(settings, shown[0], _as_classes(labels, shown[0]), lesson)


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
            self._known = self._all(given, inputs, size)

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
            for whole, piece in zip(known, self._ask(tuple(a[part] for a in inputs)), strict=True):
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

    return loss


def _original(teacher: _Teacher) -> Objective:
    learnt = [i for i, o in enumerate(teacher.shown) if o.is_floating_point()]
    scales = [_variance(teacher.shown[i]) for i in learnt]
    if not learnt:
        raise Unsupported("learning from the original needs an output of floating-point numbers, all of them are integers")

    def loss(outputs: Tensors, index: torch.Tensor, seen: Tensors) -> torch.Tensor:
        goal = teacher(index, seen)
        parts = [F.mse_loss(outputs[i], goal[i]) / scale for i, scale in zip(learnt, scales, strict=True)]
        return torch.stack(parts).mean()

    return loss


def _values(settings: Fit, labels: torch.Tensor, teacher: _Teacher | None) -> Objective:
    scale, distil = _variance(labels), settings.distil

    def loss(outputs: Tensors, index: torch.Tensor, seen: Tensors) -> torch.Tensor:
        error = F.mse_loss(outputs[0], labels[index])
        if teacher is not None:
            error = (1 - distil) * error + distil * F.mse_loss(outputs[0], teacher(index, seen)[0])
        return error / scale

    return loss


def _classes(settings: Fit, shown: torch.Tensor, labels: torch.Tensor, teacher: _Teacher | None) -> Objective:
    axis, warmth, distil = _class_axis(shown, labels), settings.temperature, settings.distil
    rows = _score_rows(shown, axis)
    teacher_rows = rows if teacher is None else _score_rows(teacher.shown[0], axis)

    def loss(outputs: Tensors, index: torch.Tensor, seen: Tensors) -> torch.Tensor:
        scores = rows(outputs[0])
        hard = F.cross_entropy(scores, labels[index].flatten(), label_smoothing=settings.label_smoothing)
        if teacher is None:
            return hard
        mine = F.log_softmax(scores / warmth, 1)
        theirs = F.log_softmax(teacher_rows(teacher(index, seen)[0]) / warmth, 1)
        return (1 - distil) * hard + distil * warmth**2 * F.kl_div(mine, theirs, log_target=True, reduction="batchmean")

    return loss


def _score_rows(shown: torch.Tensor, axis: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Turns outputs into rows of logits. Probabilities, known by their sum, are logits once their logarithm is taken."""
    shares = shown.movedim(axis, -1)
    probabilities = bool((shares >= 0).all()) and torch.allclose(shares.sum(-1), torch.ones(()).to(shares), atol=1e-3)

    def rows(outputs: torch.Tensor) -> torch.Tensor:
        flat = outputs.movedim(axis, -1).flatten(0, -2)  # (batch × places, classes)
        return flat.clamp_min(torch.finfo(flat.dtype).tiny).log() if probabilities else flat

    return rows


def _class_axis(shown: torch.Tensor, labels: torch.Tensor) -> int:
    return 1 if shown.shape[2:] == labels.shape[1:] else -1


def _as_classes(labels: Array, shown: torch.Tensor) -> torch.Tensor:
    if labels.dtype.kind not in "iub":
        raise DataRefused(f"the loss 'classes' needs integer labels, got {labels.dtype}")
    if shown.ndim < 2 or labels.shape[1:] not in (shown.shape[2:], shown.shape[1:-1]):
        raise DataRefused(
            "labels must have the shape of the outputs without the classes' axis, "
            f"got labels {labels.shape} and outputs {('n', *shown.shape[1:])}"
        )
    found = torch.from_numpy(labels.astype(np.int64)).to(shown.device)
    classes = shown.shape[_class_axis(shown, found)]
    if classes < 2:
        raise Unsupported("the loss 'classes' needs one output per class, got 1; give the network two, or learn values")
    if found.min() < 0 or found.max() >= classes:
        raise DataRefused(f"labels must lie in 0 … {classes - 1}, got {int(found.min())} … {int(found.max())}")
    return found


def _as_values(labels: Array, shown: torch.Tensor) -> torch.Tensor:
    """(n, …) as the outputs; without this (n,) labels would be spread over (n, 1) outputs into an n × n table."""
    found = torch.from_numpy(np.array(labels)).to(shown)
    if found[0].numel() != shown[0].numel():
        raise DataRefused(f"labels must have as many values as the outputs {tuple(shown.shape)}, got {tuple(found.shape)}")
    return found.reshape(-1, *shown.shape[1:])


def _variance(values: torch.Tensor) -> torch.Tensor:
    """Mean over the columns of their variances; 1 where nothing varies."""
    found = (values - values.mean(0)).square().mean()
    return found if found > 0 else torch.ones_like(found)
