"""One launch: the tensors of a group are laid side by side with their states and handed to a kernel, or to the plain path."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from hasten.core.errors import BackendMissing, Unsupported, UsageError
from hasten.train.optim import plain
from hasten.train.optim.expression import Rule, traced
from hasten.train.optim.kernel import Kernel, kernel
from hasten.train.optim.source import BLOCK, Form

Kind = Literal["signed", "square", "weight"]
"""What a buffer holds: numbers around 0, numbers never below 0, or weights, which are never stored small."""
Numbers = dict[str, float]
State = dict[str, Any]
Group = dict[str, Any]

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def empty_buffer(kind: Kind, dtype: torch.dtype | None, p: Tensor) -> Tensor:
    """Zeros for a buffer of `p`."""
    if dtype is not None and (p.is_complex() or p.dtype == torch.float64):
        raise Unsupported(f"state_dtype needs real parameters of at most single precision, got {p.dtype}; leave it at None")
    if kind == "weight" or dtype is None:
        return torch.zeros_like(p, memory_format=torch.preserve_format)
    if dtype == torch.int8 and kind == "square":
        dtype = torch.uint8
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def seed_of(step: int) -> int:
    """A number of 32 bits that looks random; every element's noise is shifted by it (a finalizer of MurmurHash3)."""
    h = step * 0x9E3779B9 & 0xFFFFFFFF
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    return h ^ (h >> 13)


def empty_scales(p: Tensor) -> Tensor:
    """The scales of an 8-bit buffer of `p`, one for every 256 elements."""
    if local(p) is not p:
        raise Unsupported("state_dtype=torch.int8 is not supported for distributed tensors; take torch.bfloat16")
    return torch.zeros(-(-p.numel() // BLOCK), dtype=torch.float32, device=p.device)


def launch(
    rule: Rule,
    group: Group,
    kinds: Mapping[str, Kind],
    members: Iterable[tuple[Tensor, State]],
    *,
    numbers: Numbers,
    flags: Mapping[str, bool],
    step: int = 0,
) -> Numbers:
    """Runs a rule once over all members, each a parameter with a gradient and its state; the sums that the rule asks for."""
    rows: dict[tuple[str, ...], list[list[Tensor]]] = {}
    back: Homeward = []
    for p, state in members:
        tensors, where = row(p, state, kinds, back)
        if not tensors[0].numel():
            continue
        rows.setdefault(where, []).append(tensors)
    given = list(numbers.values())
    sums: Numbers = {}
    for (device, *storages), alike in rows.items():
        form = form_of(rule, kinds, storages, numbers, flags, group)
        _run(form, group, device, alike, given, seed_of(step), sums)
    for home, where, value in reversed(back):
        home[where] = value
    return sums


def form_of(
    rule: Rule, kinds: Mapping[str, Kind], storages: Sequence[str], numbers: Iterable[str], flags: Mapping[str, bool], group: Group
) -> Form:
    """What the kernel is made for."""
    truths = tuple({**flags, "maximize": group["maximize"]}.items())
    return Form(rule, tuple(zip(("p", "g", *kinds), storages, strict=True)), tuple(numbers), truths)


def _run(form: Form, group: Group, device: str, rows: list[list[Tensor]], numbers: list[float], seed: int, sums: Numbers) -> None:
    fused = kernel_of(form, group, device)
    if fused is None:
        for tensors in rows:
            plain.run(form, [t.as_strided((t.numel(),), (1,)) for t in tensors], numbers, seed, sums)
        return
    names, pointers = _sums(form), [t.data_ptr() for tensors in rows for t in tensors]
    found = fused([tensors[0].numel() for tensors in rows], pointers, numbers * len(rows), seed, len(names))
    for name, value in zip(names, found, strict=True):
        sums[name] = sums.get(name, 0.0) + value


@functools.cache
def _sums(form: Form) -> tuple[str, ...]:
    ends = traced(form.rule, [n for n, _ in form.arrays], form.numbers, {n: v for n, v in form.flags if n != "maximize"})[1]
    return tuple(name.removeprefix("sum ") for name in ends if name.startswith("sum "))


def kernel_of(form: Form, group: Group, device: str) -> Kernel | None:
    """The kernel, or None where the plain path is taken."""
    if group["fused"] is False or group["foreach"]:
        return None
    if device != "cpu" or "float16" in (storage for _, storage in form.arrays):
        if group["fused"]:
            raise Unsupported(f"fused=True needs float32, float64 or bfloat16 on a CPU, got {form.arrays[0][1]} on {device}")
        return None
    try:
        return kernel(form)
    except BackendMissing as why:
        if group["fused"]:
            raise
        _say(str(why))
        return None


@functools.cache
def _say(why: str) -> None:
    warnings.warn(f"the plain path of the optimizers is taken, which is slower: {why}", RuntimeWarning, stacklevel=2)


Homeward = list[tuple[Tensor, Any, Tensor]]
"""What was computed on a copy: (the tensor, where in it, the new values)."""


def row(p: Tensor, state: State, kinds: Mapping[str, Kind], back: Homeward) -> tuple[list[Tensor], tuple[str, ...]]:
    """The flat local tensors of one parameter in the order of the rule, and where and how they are stored."""
    g = p.grad
    assert g is not None
    if g.layout != torch.strided:
        p, g, state = _named_rows(p, g.coalesce(), state, kinds, back)
    if type(p) is not torch.nn.Parameter and type(p) is not Tensor:
        g, state = _local_gradient(p, g), {name: local(value) for name, value in state.items()}
        p = local(p)
    if p.is_complex():
        g, p = torch.view_as_real(g), torch.view_as_real(p)
        state = {name: torch.view_as_real(v) if name in kinds else v for name, v in state.items()}
    if not dense(p):
        p = _laid(p, torch.empty_like(p), back)
    tensors, storages, scales = [p, _laid(g, p, None)], [p.device.type, _NAMES[p.dtype], _NAMES[g.dtype]], []
    for name in kinds:
        buffer = _laid(state[name], p, back)
        tensors.append(buffer)
        if buffer.dtype in (torch.int8, torch.uint8):
            scales.append(state[f"{name}_scale"])
            storages.append("signed" if buffer.dtype == torch.int8 else "square")
        else:
            storages.append(_NAMES[buffer.dtype])
    return tensors + scales, tuple(storages)


def _named_rows(p: Tensor, g: Tensor, state: State, kinds: Mapping[str, Kind], back: Homeward) -> tuple[Tensor, Tensor, State]:
    """The rows that a sparse gradient names, as dense tensors."""
    where = tuple(g.indices())
    part, kept = p.detach()[where], {name: state[name][where] for name in kinds}
    if any(value.dtype in (torch.int8, torch.uint8) for value in kept.values()):
        raise Unsupported("state_dtype=torch.int8 is not supported with sparse gradients; take torch.bfloat16")
    back += [(p, where, part), *((state[name], where, value) for name, value in kept.items())]
    return part, g.values(), kept


def dense(t: Tensor) -> bool:
    """Whether the elements lie side by side in some order of the axes."""
    if t.is_contiguous():
        return True
    axes = sorted(range(t.ndim), key=t.stride, reverse=True)
    return t.permute(axes).is_contiguous()


def _laid(t: Tensor, p: Tensor, back: Homeward | None) -> Tensor:
    """`t` in the order of `p`, itself if it is; where it is not, the copy is brought home afterwards through `back`.

    Raises:
        UsageError: where it has another shape than the parameter, as a state of another network; or holds integers in another order.
    """
    if t.shape != p.shape:
        raise UsageError(f"a gradient or a state must have the shape of its parameter, {tuple(p.shape)}, got {tuple(t.shape)}")
    if t.is_contiguous() if p.is_contiguous() else t.stride() == p.stride():
        return t
    if t.dtype in (torch.int8, torch.uint8):
        raise UsageError("a state of int8 must lie in memory as its parameter does; bring the parameter into the layout it was saved in")
    copy = torch.empty_like(p, dtype=t.dtype).copy_(t)
    if back is not None:
        back.append((t, ..., copy))
    return copy


def local(t: Any) -> Any:
    """The part of a distributed tensor that this process holds; anything else as it is."""
    module = sys.modules.get("torch.distributed.tensor")
    return t.to_local() if module and isinstance(t, module.DTensor) else t


def _local_gradient(p: Tensor, g: Tensor) -> Tensor:
    module = sys.modules.get("torch.distributed.tensor")
    if module and isinstance(p, module.DTensor) and isinstance(g, module.DTensor) and g.placements != p.placements:
        g = g.redistribute(p.device_mesh, p.placements)
    return cast(Tensor, local(g))
