"""The machine that runs the rules: gathers the tensors of a group, and hands them to a kernel or to the plain path."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypedDict, cast

import torch
from torch import Tensor

from hasten.core.errors import BackendMissing, Unsupported, UsageError
from hasten.train.optim import plain
from hasten.train.optim.expression import Rule, traced
from hasten.train.optim.kernel import kernel
from hasten.train.optim.source import BLOCK, Form

Kind = Literal["signed", "square", "weight"]
"""What a buffer holds: numbers around 0, numbers never below 0, or weights, which are never stored small."""
Numbers = dict[str, float]
State = dict[str, Any]
Group = dict[str, Any]

_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ONE = torch.tensor(1.0)  # a number would be made a tensor once for each parameter
_STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.int8)


class Options(TypedDict, total=False):
    """What every optimizer takes, keyword only.

    Args:
        maximize: climbs instead of descending.
        fused: True insists on the compiled kernel, False on the plain path; None takes the kernel for dense parameters on a CPU.
        foreach: True asks for the plain path, as torch's argument of this name asks for lists of tensors.
        state_dtype: of averages of gradients and their squares; None for that of the parameter, or torch.float32, torch.bfloat16,
            torch.int8 (with a scale for every 256 elements).
        capturable, differentiable: must be False.
    """

    maximize: bool
    fused: bool | None
    foreach: bool | None
    state_dtype: torch.dtype | None
    capturable: bool
    differentiable: bool


_DEFAULTS = Options(maximize=False, fused=None, foreach=None, state_dtype=None, capturable=False, differentiable=False)


def check(name: str, value: float, *, within: bool, expected: str) -> None:
    """Raises UsageError with torch's words in front, so that what matched them still does."""
    if not within:
        raise UsageError(f"Invalid {name}: {value}; expected {expected}")


def check_betas(betas: Sequence[float]) -> None:
    """Both in [0, 1)."""
    for index, beta in enumerate(betas):
        check(f"beta parameter at index {index}", beta, within=0 <= beta < 1, expected="a number in [0, 1)")


def check_shared(group: Mapping[str, Any]) -> None:
    """What every optimizer takes."""
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise UsageError(f"Tensor lr must be 1-element, got {tuple(group['lr'].shape)}")
    check("learning rate", group["lr"], within=group["lr"] >= 0, expected="a number of at least 0")
    for name, words in (("weight_decay", "weight_decay value"), ("eps", "epsilon value")):
        if group.get(name) is not None:
            check(words, group[name], within=group[name] >= 0, expected="a number of at least 0")
    if "betas" in group:
        check_betas(group["betas"])
    if group["differentiable"]:
        raise UsageError("`fused` does not support `differentiable`, nor does the plain path; use torch.optim for it")
    if group["capturable"]:
        raise UsageError("capturable must be False: CUDA graphs are not supported; use torch.optim for them")
    if group["fused"] and group["foreach"]:
        raise UsageError("`fused` and `foreach` cannot be `True` together.")
    if group["state_dtype"] not in _STATE_DTYPES:
        raise UsageError(f"state_dtype must be one of {list(_STATE_DTYPES)}, got {group['state_dtype']}")


class Optimizer(torch.optim.Optimizer):
    """What all optimizers here share: options checked for each group, closures, state that keeps its types."""

    def __init__(self, params: Any, defaults: Mapping[str, Any], options: Options) -> None:
        unknown = set(options) - set(_DEFAULTS)
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no {sorted(unknown)}; it takes {sorted([*defaults, *_DEFAULTS])}")
        super().__init__(params, {**defaults, **_DEFAULTS, **options})

    def add_param_group(self, param_group: Group) -> None:
        """As in torch; the settings are checked first."""
        if isinstance(param_group, dict):
            self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def check(self, group: Mapping[str, Any]) -> None:
        """Raises UsageError on a setting outside its range."""
        check_shared(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; with a closure, which computes the gradients, its loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_all()
        return loss

    def update_all(self) -> None:
        """One step of all groups."""
        for group in self.param_groups:
            self.update(group)

    def update(self, group: Group) -> None:
        """One step of one group."""
        raise NotImplementedError

    def refuse(self, group: Mapping[str, Any], *names: str) -> None:
        """Raises UsageError where an option is set that this optimizer has no use for."""
        for name in names:
            if group[name]:
                raise UsageError(f"{type(self).__name__} has no {name}, got {name}={group[name]}; leave it at None")

    def given(self, group: Group) -> list[Tensor]:
        """The parameters that have a gradient, which must be dense."""
        found = [p for p in group["params"] if p.grad is not None]
        if any(p.grad.layout != torch.strided for p in found):
            raise Unsupported(f"{type(self).__name__} does not support sparse gradients")
        return found

    def whole(self, group: Group) -> Iterator[tuple[Tensor, Tensor, State]]:
        """Parameters with a gradient, the gradient to descend along, and the state; for rules that look at whole tensors."""
        for p in self.given(group):
            for wrong, words in (
                (p.is_complex(), "complex parameters"),
                (local(p) is not p, "distributed tensors: its rule looks at whole tensors"),
            ):
                if wrong:
                    raise Unsupported(f"{type(self).__name__} does not support {words}")
            assert p.grad is not None
            yield p, -p.grad if group["maximize"] else p.grad, self.state[p]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but buffers keep the type they were saved in (torch casts them to the parameter's)."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:  # a state of torch's lacks what only ours have
            group.update({name: value for name, value in self.defaults.items() if name not in group})
        ours = [p for group in self.param_groups for p in group["params"]]
        theirs = [key for group in state_dict["param_groups"] for key in group["params"]]
        for p, key in zip(ours, theirs, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().clone() if value.ndim == 0 else value.detach().to(p.device, copy=True)


class Elementwise(Optimizer):
    """An optimizer whose rule treats every element by itself. A subclass gives the rule and what it needs."""

    counters: ClassVar[Numbers] = {"step": 0.0}

    def buffers(self, group: Group) -> dict[str, Kind]:
        """The arrays that the rule of this group keeps beside the parameter."""
        raise NotImplementedError

    def numbers(self, group: Group, counters: Numbers) -> Numbers:
        """What the rule reads as h.NAME, with the counters of this very step."""
        raise NotImplementedError

    @staticmethod
    def rule(x: Any, h: Any) -> None:
        """The formula, for one element; see `expression.py`."""
        raise NotImplementedError

    def flags(self, group: Group) -> dict[str, bool]:
        """What the rule branches on."""
        return {"decays": group["weight_decay"] != 0}

    def begin(self, group: Group, name: str, p: Tensor) -> Tensor:
        """A buffer before the first step."""
        return empty_buffer(self.buffers(group)[name], group["state_dtype"], p)

    def takes_sparse(self, group: Group) -> bool:
        """Whether a row without a gradient would stay as it is, so that only the others need be looked at."""
        del group
        return False

    def advance(self, group: Group, counters: Numbers) -> Numbers:
        """The counters of the next step."""
        del group
        return {name: value + 1 for name, value in counters.items()}

    def update(self, group: Group) -> None:
        """One step of one group: one launch for all tensors whose counters are the same."""
        kinds = self.buffers(group)
        alike: dict[tuple[float, ...], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided and not self.takes_sparse(group):
                raise Unsupported(f"{type(self).__name__} does not support sparse gradients with these settings")
            state = self.state[p]
            if len(state) < len(kinds) + len(self.counters):
                self._prepare(group, kinds, p)
            alike.setdefault(tuple(state[c].item() for c in self.counters), []).append(p)
        for values, params in alike.items():
            states = [self.state[p] for p in params]
            counters = self._count(group, dict(zip(self.counters, values, strict=True)), states)
            members = list(zip(params, states, strict=True))
            numbers, flags = self.numbers(group, counters), self.flags(group)
            launch(
                type(self).rule,
                group,
                kinds,
                members,
                numbers=numbers,
                flags=flags,
                step=int(counters["step"]) if "step" in counters else group["k"],
            )

    def _prepare(self, group: Group, kinds: dict[str, Kind], p: Tensor) -> None:
        state = self.state[p]
        begun = any(state.get(name) is not None for name in kinds)
        for name, value in self.counters.items():
            state.setdefault(name, torch.tensor(float(begun) if name == "step" else value))
        for name in kinds:
            if state.get(name) is None:  # torch keeps None where there was no gradient yet
                state[name] = self.begin(group, name, p)
                if state[name].dtype in (torch.int8, torch.uint8):
                    state[f"{name}_scale"] = _scales(p)

    def _count(self, group: Group, counters: Numbers, states: list[State]) -> Numbers:
        found = self.advance(group, counters)
        for name in self.counters:
            if name == "step":
                torch._foreach_add_([s["step"] for s in states], _ONE, alpha=1.0)
            else:
                for state in states:
                    state[name].fill_(found[name])
                found[name] = states[0][name].item()
        return found


def empty_buffer(kind: Kind, dtype: torch.dtype | None, p: Tensor) -> Tensor:
    """Zeros for a buffer of `p`."""
    if dtype is not None and (p.is_complex() or p.dtype == torch.float64):
        raise Unsupported(f"state_dtype needs real parameters of at most single precision, got {p.dtype}; leave it at None")
    if kind == "weight" or dtype is None:
        return torch.zeros_like(p, memory_format=torch.preserve_format)
    if dtype == torch.int8 and kind == "square":
        dtype = torch.uint8
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


def _seed(step: int) -> int:
    """A number of 32 bits that looks random; every element's noise is shifted by it (a finalizer of MurmurHash3)."""
    h = step * 0x9E3779B9 & 0xFFFFFFFF
    h = (h ^ (h >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    return h ^ (h >> 13)


def _scales(p: Tensor) -> Tensor:
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
        row, where = _row(p, state, kinds, back)
        if not row[0].numel():
            continue
        rows.setdefault(where, []).append(row)
    truths = tuple({**flags, "maximize": group["maximize"]}.items())
    given = list(numbers.values())
    sums: Numbers = {}
    for (device, *storages), tensors in rows.items():
        form = Form(rule, tuple(zip(("p", "g", *kinds), storages, strict=True)), tuple(numbers), truths)
        _run(form, group, device, tensors, given, _seed(step), sums)
    for home, where, value in reversed(back):
        home[where] = value
    return sums


def _run(form: Form, group: Group, device: str, rows: list[list[Tensor]], numbers: list[float], seed: int, sums: Numbers) -> None:
    fused = _kernel(form, group, device)
    if fused is None:
        for row in rows:
            plain.run(form, [t.as_strided((t.numel(),), (1,)) for t in row], numbers, seed, sums)
        return
    names = _sums(form)
    found = fused([row[0].numel() for row in rows], [t.data_ptr() for row in rows for t in row], numbers, seed, len(names))
    for name, value in zip(names, found, strict=True):
        sums[name] = sums.get(name, 0.0) + value


@functools.cache
def _sums(form: Form) -> tuple[str, ...]:
    ends = traced(form.rule, [n for n, _ in form.arrays], form.numbers, {n: v for n, v in form.flags if n != "maximize"})[1]
    return tuple(name.removeprefix("sum ") for name in ends if name.startswith("sum "))


def _kernel(form: Form, group: Group, device: str):  # type: ignore[no-untyped-def]
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


def _row(p: Tensor, state: State, kinds: Mapping[str, Kind], back: Homeward) -> tuple[list[Tensor], tuple[str, ...]]:
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
    row, storages, scales = [p, _laid(g, p, None)], [p.device.type, _NAMES[p.dtype], _NAMES[g.dtype]], []
    for name in kinds:
        buffer = _laid(state[name], p, back)
        row.append(buffer)
        if buffer.dtype in (torch.int8, torch.uint8):
            scales.append(state[f"{name}_scale"])
            storages.append("signed" if buffer.dtype == torch.int8 else "square")
        else:
            storages.append(_NAMES[buffer.dtype])
    return row + scales, tuple(storages)


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
    """`t` in the order of `p`, itself if it is; where it is not, the copy is brought home afterwards through `back`."""
    if t.is_contiguous() if p.is_contiguous() else t.stride() == p.stride():
        return t
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
