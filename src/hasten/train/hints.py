"""Hidden values of a network beside its outputs, so that a student can follow a teacher inside as well.

What is compared is what a layer *reads*: it stays the same when a batch norm folds into the layer before, and a layer that was
pruned, factorized or replaced under its name still reads it.

Shapes: hidden values (batch, channels, places…) in front of convolutions, (batch, …, channels) in front of all other layers.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.errors import Unsupported, UsageError
from hasten.core.names import meets, nearest
from hasten.train.outputs import Tensors, outputs_of
from hasten.train.settings import Hints

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_READERS = (nn.Linear, *_CONVOLUTIONS, nn.LSTM, nn.GRU, nn.RNN)
_ROWS = 8192  # that a first linear map is fitted to
_RIDGE = 1e-4  # of the mean square of the student's channels


class Watched(nn.Module):
    """A network that gives its outputs and, behind them, what `reads` makes of the values that the named layers read."""

    def __init__(self, module: nn.Module, reads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.module = module
        self.names = tuple(reads)
        self.reads = nn.ModuleList(reads.values())

    def forward(self, *inputs: torch.Tensor) -> Tensors:
        """(outputs…, hidden values…)."""
        with _reading(self.module, self.names) as seen:
            outputs = outputs_of(self.module, inputs)
        for name in self.names:
            if len(seen.get(name, ())) != 1:
                raise Unsupported(f"the layer {name!r} must be called once to show what it reads, got {len(seen.get(name, ()))} calls")
        return (*outputs, *(read(seen[name][0]) for name, read in zip(self.names, self.reads, strict=True)))


def bare(module: nn.Module) -> nn.Module:
    """The network itself, whose layers people name, without what shows its hidden values around it."""
    return module.module if isinstance(module, Watched) else module


class Map(nn.Module):
    """A learnt linear map of the channels, a 1×1 convolution at any rank. It begins as the least-squares fit."""

    def __init__(self, mine: torch.Tensor, theirs: torch.Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        a, b = (h.detach().movedim(axis, -1).flatten(0, -2) for h in (mine, theirs))
        every = max(1, len(a) // _ROWS)
        a, b = a[::every].double(), b[::every].double()
        centred = a - a.mean(0)
        square = centred.T @ centred
        ridge = _RIDGE * square.diagonal().mean() + torch.finfo(torch.float32).tiny
        weight = torch.linalg.solve(square + ridge * torch.eye(len(square)).to(square), centred.T @ (b - b.mean(0)))
        self.weight = nn.Parameter(weight.T.to(mine))
        self.bias = nn.Parameter((b.mean(0) - a.mean(0) @ weight).to(mine))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The teacher's width, in the same layout."""
        return F.linear(hidden.movedim(self.axis, -1), self.weight, self.bias).movedim(-1, self.axis)


class Attend(nn.Module):
    """Where a network looks, whatever its width.

    Images and sequences in front of convolutions: Q/‖Q‖ with Q = Σ_c a_c² at each place. Tokens: the cosines between all pairs
    of tokens, divided by the number of tokens.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, places), or (batch, tokens, tokens)."""
        if self.axis == 1:
            return F.normalize(hidden.square().sum(1).flatten(1), dim=1)
        tokens = F.normalize(hidden.flatten(1, -2), dim=-1)
        return tokens @ tokens.transpose(1, 2) / tokens.shape[1]


def watched(hints: Hints, student: nn.Module, teacher: nn.Module, inputs: Tensors) -> tuple[Watched, Watched]:
    """The student (itself, not a copy) and a copy of the teacher, both showing what layers of the same names read.

    Args:
        hints: which layers, and what is compared.
        inputs: one batch, to see what both networks do.

    Raises:
        UsageError: a pattern that meets no layer.
        Unsupported: a layer that cannot be compared, or no layer that can.
    """
    teacher = copy.deepcopy(teacher).eval().to(inputs[0].device)
    known = {name: layer for name, layer in teacher.named_modules() if isinstance(layer, _READERS)}
    with torch.enable_grad(), _reading(student, [n for n, _ in student.named_modules() if n in known]) as mine:
        outputs_of(student, inputs)
    with torch.no_grad(), _reading(teacher, known) as theirs:
        outputs_of(teacher, inputs)
    axes = {name: 1 if isinstance(layer, _CONVOLUTIONS) else -1 for name, layer in known.items()}
    asked = _asked(hints, known)
    reasons = {name: _unfit(name, mine, theirs, axes[name], hints) for name in asked}
    if hints.only and (wrong := next((name for name, why in reasons.items() if why), None)):
        raise Unsupported(f"the layer {wrong!r} cannot be matched: {reasons[wrong]}")
    fit = [name for name in theirs if reasons.get(name, "") is None]
    chosen = fit if hints.only else _last_of_each_size(fit, theirs, axes)
    if not chosen:
        why = next((f"; {name!r}: {why}" for name, why in reasons.items() if why), "")
        raise Unsupported(f"matching {hints.match} needs a layer of one name in the original and in this network, found none{why}")
    if hints.match == "attention":
        return tuple(Watched(m, {n: Attend(axes[n]) for n in chosen}) for m in (student, teacher))  # type: ignore[return-value]
    maps = {n: _onto(mine[n][0], theirs[n][0], axes[n]) for n in chosen}
    return Watched(student, maps), Watched(teacher, {n: nn.Identity() for n in chosen})


def _asked(hints: Hints, known: Iterable[str]) -> list[str]:
    names = list(known)
    for pattern in hints.only:
        if not fnmatch.filter(names, pattern):
            raise UsageError(f"the original has no linear, convolutional or recurrent layer {pattern!r}; {nearest(pattern, names)}")
    return [n for n in names if not hints.only or meets(n, hints.only)]


def _unfit(
    name: str, mine: Mapping[str, list[torch.Tensor]], theirs: Mapping[str, list[torch.Tensor]], axis: int, hints: Hints
) -> str | None:
    """Why what this layer reads cannot be compared, or None."""
    if name not in mine:
        return "this network calls no layer of that name"
    if name not in theirs:
        return "the original does not call it"
    if len(mine[name]) > 1 or len(theirs[name]) > 1:
        return "it is called more than once"
    ours, goal = mine[name][0], theirs[name][0]
    if not ours.requires_grad:
        return "no weight comes before it"
    if _places(ours, axis) != _places(goal, axis):
        return f"it reads {tuple(ours.shape)} here and {tuple(goal.shape)} in the original"
    if hints.match == "attention" and goal.ndim < 3:
        return "it reads no places to attend to"
    return None


def _places(hidden: torch.Tensor, axis: int) -> tuple[int, ...]:
    shape = list(hidden.shape)
    del shape[axis]
    return tuple(shape)


def _last_of_each_size(names: list[str], theirs: Mapping[str, list[torch.Tensor]], axes: Mapping[str, int]) -> list[str]:
    """The end of each stage: of all layers that read maps of one size, the last that is called."""
    last = {(axes[n], _places(theirs[n][0], axes[n])): n for n in names}
    return list(last.values())


def _onto(mine: torch.Tensor, theirs: torch.Tensor, axis: int) -> nn.Module:
    return nn.Identity() if mine.shape == theirs.shape else Map(mine, theirs, axis)


@contextlib.contextmanager
def _reading(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What the named layers read while the block runs, one entry per call, in the order of the first calls."""
    seen: dict[str, list[torch.Tensor]] = {}

    def note(name: str) -> object:
        def hook(_: nn.Module, given: tuple[object, ...]) -> None:
            if given and isinstance(given[0], torch.Tensor):
                seen.setdefault(name, []).append(given[0])

        return hook

    hooks = [module.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]  # type: ignore[arg-type]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
