"""What a training step computes in and how much it remembers: number formats, layout, checkpointed activations, compilation."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hasten.core.errors import UsageError
from hasten.core.names import check_met, meets, patterns
from hasten.train.outputs import outputs_of

Format = Literal["float32", "bfloat16", "float16"]
_MMAP_THRESHOLD, _LARGE, _LIMIT = -3, 1 << 20, 32 << 20  # of glibc's mallopt; bytes
_WIDE = 16  # channels; fewer of them are slower together
_FLOATS: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What a training step computes in, and what it keeps for the way back. Weights stay in 32 bits.

    Args:
        format: "bfloat16" and "float16" compute matrix products and convolutions in 16 bits (autocast); with "float16" the
            loss is scaled, and a step whose scaled gradient overflows is left out.
        channels_last: while training, 4-D inputs and kernels lie with their channels together. None: on a CPU, where all 2-D
            convolutions that slide have 16 channels or more, for there it is the faster layout (`benchmarks/training_layout.py`),
            and the network's code bears it.
        checkpoint: patterns of layers whose inner activations are computed again on the way back in the place of being kept,
            or a whole number k: a `Sequential` keeps what passes between runs of k children, of another network every k-th
            child is computed again; lists and dictionaries of layers stand for what is in them. Same bytes out, less memory, more
            time: the allocator also gives large blocks back at once.
        compile: through `torch.compile`; what that cost is `Fitted.compile_seconds`.

    Raises:
        UsageError: on a value outside its range.

    References:
        P. Micikevicius et al., "Mixed Precision Training", 2017, arXiv:1710.03740.
        T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174.
    """

    format: Format = "float32"
    channels_last: bool | None = None
    checkpoint: tuple[str, ...] | int = ()
    compile: bool = False

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise UsageError(f"format must be one of {list(get_args(Format))}, got {self.format!r}")
        if isinstance(self.checkpoint, int):
            if self.checkpoint < 1:
                raise UsageError(f"checkpoint must be at least 1 for every k-th child, got {self.checkpoint}")
        else:
            patterns("checkpoint", self.checkpoint)

    def cast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """What the way forward runs in."""
        if self.format == "float32":
            return contextlib.nullcontext()
        return torch.autocast(device.type, _FLOATS[self.format])

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Scales the loss where the format is "float16", else does nothing."""
        return torch.amp.GradScaler(device.type, enabled=self.format == "float16")

    def settled(self, module: nn.Module, inputs: Sequence[torch.Tensor]) -> Precision:
        """The same with the layout decided. `inputs`: of at least one example each; `module` stays as it is."""
        if self.channels_last is not None:
            return self
        on_cpu = next(module.parameters()).device.type == "cpu"
        sliding = [m.out_channels for m in module.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
        wanted = on_cpu and min(sliding, default=0) >= _WIDE
        return replace(self, channels_last=wanted and _bears(replace(self, channels_last=True), module, inputs))

    def laid_out(self, values: torch.Tensor) -> torch.Tensor:
        """The inputs in the layout that was asked for."""
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last and values.ndim == 4 else values

    @contextlib.contextmanager
    def prepared(self, module: nn.Module, *, of: nn.Module | None = None) -> Iterator[Any]:
        """What is called in the place of `module`, which is as it was after the block.

        `of`: the network whose layers are meant, where `module` holds it.
        """
        layout = _together(module) if self.channels_last else contextlib.nullcontext()
        with layout, self._forgetting(of or module), _giving_back(bool(self.checkpoint)):
            yield torch.compile(module) if self.compile else module

    def _forgetting(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.checkpoint, int) and type(module).forward is nn.Sequential.forward:
            assert isinstance(module, nn.Sequential)
            return _in_runs(module, self.checkpoint)
        return _checkpointed(self._chosen(module))

    def _chosen(self, module: nn.Module) -> list[nn.Module]:
        if isinstance(self.checkpoint, int):
            children = [layer for child in module.children() for layer in _called(child)]
            return children[self.checkpoint - 1 :: self.checkpoint]
        names = [name for name, _ in module.named_modules() if name]
        check_met(self.checkpoint, names)
        named = [layer for name, layer in module.named_modules() if name and meets(name, self.checkpoint)]
        return list(dict.fromkeys(layer for one in named for layer in _called(one)))


def _called(layer: nn.Module) -> list[nn.Module]:
    """The layer; of one that is never called, a list or a dictionary of layers, those in it."""
    if type(layer).forward is not nn.Module.forward:
        return [layer]
    return [inside for child in layer.children() for inside in _called(child)]


@contextlib.contextmanager
def _together(module: nn.Module) -> Iterator[None]:
    """Kernels of 2-D convolutions have their channels together inside: `module.to` refuses where there are kernels of more axes.

    Those of a single channel as well, whose strides alone tell the two layouts apart: the layers behind them take theirs from there.
    """
    kernels = [kernel for kernel in module.parameters() if kernel.ndim == 4]
    apart = [kernel for kernel in kernels if kernel.is_contiguous()]
    for kernel in kernels:
        kernel.data = kernel.data.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for kernel in apart:
            kernel.data = kernel.data.to(memory_format=torch.contiguous_format)


def _bears(precision: Precision, module: nn.Module, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether a copy of the network can be run there and back in that layout: `x.view(n, -1)` behind a convolution cannot."""
    tried = copy.deepcopy(module)
    with _together(tried), torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            outputs = outputs_of(tried, tuple(map(precision.laid_out, inputs)))
            torch.autograd.backward([o.sum() for o in outputs if o.requires_grad])
        except Exception:  # whatever it is, the training itself says it if it is no matter of the layout
            return False
    return True


@contextlib.contextmanager
def _giving_back(wanted: bool) -> Iterator[None]:
    """Freed memory goes back to the system at once, where the C library can be told so (glibc).

    Its limit between what it keeps for itself and what it gives back grows with every large block that is freed, up to 32 MiB: after a
    while the holes that activations leave are kept, and a training takes half as much again as it uses.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if wanted and sys.platform == "linux" else None
    if mallopt:
        mallopt(_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        if mallopt:
            mallopt(_MMAP_THRESHOLD, _LIMIT)


@contextlib.contextmanager
def _in_runs(module: nn.Sequential, length: int) -> Iterator[None]:
    """Runs of so many layers recompute their inside on the way back, all but the last, which the way back begins with."""
    layers = list(module)
    *runs, last = [nn.Sequential(*layers[at : at + length]) for at in range(0, len(layers), length)]

    def forward(x: Any) -> Any:
        for run in runs:
            x = checkpoint(run, x, use_reentrant=False, context_fn=functools.partial(_twice, run))
        return last(x)

    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward  # the attribute in front of the class's own


@contextlib.contextmanager
def _checkpointed(layers: list[nn.Module]) -> Iterator[None]:
    """The layers recompute their inside on the way back, as long as the block lasts."""
    inside = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    outermost = [layer for layer in layers if id(layer) not in inside]
    for layer in outermost:
        contexts = functools.partial(_twice, layer)
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for layer in outermost:
            del layer.forward  # the attribute in front of the class's own


def _twice(layer: nn.Module) -> tuple[Any, Any]:
    """What the first and the second way forward run in."""
    return contextlib.nullcontext(), _still(layer)


@contextlib.contextmanager
def _still(layer: nn.Module) -> Iterator[None]:
    """Batch norms inside, run a second time, do not move their statistics: a step of momentum 0 writes the same bytes."""
    norms = [m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    kept = [(m, m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)
