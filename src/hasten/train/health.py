"""Whether gradients are well: their size layer by layer, where a NaN was born, whether the loss has settled."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal, get_args

import torch
from torch import nn

from hasten.core.errors import UsageError
from hasten.train.clip import numbers

NonFinite = Literal["raise", "skip", "roll back"]
Trend = Literal["settled", "falling", "rising", "too short"]
_LEAST = 1e-3  # weights smaller than this, root mean square, count as this


@dataclass(frozen=True, kw_only=True)
class Health:
    """What is done about sick gradients.

    Args:
        nonfinite: where the loss or its gradient is NaN or infinite: "raise"; "skip" the step, weights and statistics as
            before; "roll back" to a copy at most `snapshot` steps old and go on at half the learning rate.
        most: skips or returns before it raises all the same, >= 1.
        snapshot: steps between two such copies, >= 1.
        every: steps between two looks at the norm of each layer's gradient, 0 for none.
        vanishing: a layer's gradient, root mean square, is below this share of the largest layer's; > 0.
        exploding: a layer's gradient is above this many times its weights, both root mean square; > 0.

    Raises:
        UsageError: on a value outside its range.
    """

    nonfinite: NonFinite = "raise"
    most: int = 5
    snapshot: int = 100
    every: int = 0
    vanishing: float = 1e-5
    exploding: float = 1e2

    def __post_init__(self) -> None:
        if self.nonfinite not in get_args(NonFinite):
            raise UsageError(f"nonfinite must be one of {list(get_args(NonFinite))}, got {self.nonfinite!r}")
        for name, least in (("most", 1), ("snapshot", 1), ("every", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("vanishing", "exploding"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be a finite number above 0, got {getattr(self, name)}")

    def findings(self, step: int, norms: dict[str, Norms]) -> list[Finding]:
        """The layers whose gradient vanishes or explodes."""
        largest = max((n.gradient for n in norms.values()), default=0.0)
        found = []
        for layer, one in norms.items():
            if one.gradient < self.vanishing * largest:
                found.append(Finding(step=step, layer=layer, what="vanishing", size=one.gradient))
            if one.gradient > self.exploding * max(one.weights, _LEAST):
                found.append(Finding(step=step, layer=layer, what="exploding", size=one.gradient))
        return found


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Root mean squares over the parameters that a layer itself holds."""

    gradient: float
    weights: float


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A layer whose gradient was sick at a step; `size` is its root mean square."""

    step: int
    layer: str
    what: Literal["vanishing", "exploding"]
    size: float

    def __str__(self) -> str:
        return f"step {self.step}: the gradient of {self.layer!r} is {self.what}, {self.size:.2g}"


@torch.no_grad()
def layer_norms(module: nn.Module) -> dict[str, Norms]:
    """The size of the gradient and of the weights of each layer that has a gradient."""
    found = {}
    for name, layer in module.named_modules():
        held = [p for p in layer.parameters(recurse=False) if p.grad is not None]
        if held:
            count = sum(p.numel() for p in held)
            gradients = [numbers(p.grad) for p in held if p.grad is not None]
            sizes = [nn.utils.get_total_norm(values).item() / math.sqrt(count) for values in (gradients, held)]
            found[name or "the network"] = Norms(gradient=sizes[0], weights=sizes[1])
    return found


@torch.no_grad()
def layer_activations(module: nn.Module, *inputs: torch.Tensor) -> dict[str, float]:
    """Root mean square of what each innermost layer gives, in the order of their calls; of several calls the last.

    The network, its statistics and the random state stay. Call it from `Trainer.after_step` to follow a training.

    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
    >>> net[0].weight.data[:] = -2
    >>> layer_activations(net, torch.ones(3, 1))
    {'0': 2.0, '1': 0.0}
    """
    found: dict[str, float] = {}

    def note(name: str, outputs: tuple[torch.Tensor, ...]) -> None:
        found[name] = float(torch.cat([o.flatten() for o in outputs]).float().square().mean().sqrt())

    with kept_buffers(module), torch.random.fork_rng(devices=[]), _hooked(module, note):
        module(*inputs)
    return found


def birthplace(module: nn.Module, inputs: Sequence[torch.Tensor], loss: Callable[[], torch.Tensor]) -> str:
    """Where the first value that is not finite comes from, on the way forward, else on the way back.

    `loss` runs the network and gives the loss; gradients must be those of that loss. Statistics and random state stay.
    """
    if not all(_finite(a) for a in inputs):
        return "the inputs"
    if sick := next((n for n, p in module.named_parameters() if not _finite(p)), None):
        return f"the weights {sick!r}"
    called: list[str] = []
    born: list[str] = []

    def note(name: str, outputs: tuple[torch.Tensor, ...]) -> None:
        called.append(name)
        if not all(_finite(o) for o in outputs):
            born.append(name)

    with kept_buffers(module), torch.random.fork_rng(devices=[]), torch.no_grad(), _hooked(module, note):
        value = loss()
    if born:
        return f"the layer {born[0]!r}"
    if not _finite(value):
        return "the loss, of finite outputs"
    layers = dict(module.named_modules())
    for name in reversed(called):
        if any(p.grad is not None and not _finite(p.grad) for p in layers[name].parameters(recurse=False)):
            return f"the gradient of the layer {name!r}"
    return "a value that was finite when it was computed again"


@contextlib.contextmanager
def _hooked(module: nn.Module, note: Callable[[str, tuple[torch.Tensor, ...]], None]) -> Iterator[None]:
    """Tells what each innermost layer gives while the block runs."""

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, __: object, outputs: object) -> None:
            parts = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
            note(name, tuple(o for o in parts if isinstance(o, torch.Tensor)))

        return look

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in module.named_modules() if not list(layer.children())]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@contextlib.contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Buffers, such as the statistics of norms, are after the block what they were before."""
    kept = copied_buffers(module)
    try:
        yield
    finally:
        put_buffers(module, kept)


def copied_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every buffer, the unsaved ones too."""
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


@torch.no_grad()
def put_buffers(module: nn.Module, kept: dict[str, torch.Tensor]) -> None:
    """Writes back what `copied_buffers` gave."""
    for name, buffer in module.named_buffers():
        buffer.copy_(kept[name])


def _finite(values: torch.Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(numbers(values)).all())


def trend(losses: Sequence[float]) -> Trend:
    """What the loss did at the end: the mean of its last tenth against that of the tenth before.

    A difference counts where it is above three standard errors and one part in a thousand of the level.

    >>> trend([1 / t for t in range(1, 101)]), trend([0.5] * 100), trend([t * t for t in range(100)])
    ('falling', 'settled', 'rising')
    """
    size = len(losses) // 10
    if size < 2:
        return "too short"
    before, last = losses[-2 * size : -size], losses[-size:]
    moved = fmean(last) - fmean(before)
    error = math.sqrt((stdev(before) ** 2 + stdev(last) ** 2) / size)
    if abs(moved) <= max(3 * error, 1e-3 * abs(fmean(before))):
        return "settled"
    return "falling" if moved < 0 else "rising"
