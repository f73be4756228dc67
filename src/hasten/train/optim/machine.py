"""What all optimizers share: settings checked for each group, closures, state, and the counting of steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from hasten.core.errors import Unsupported, UsageError
from hasten.train.optim.launch import Group, Kind, Numbers, State, empty_buffer, empty_scales, launch, local
from hasten.train.optim.plan import Plan, plan_of

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


def _looked_at(step: Callable[..., Any], wrapped: Callable[..., Any]) -> Callable[..., Any]:
    """`wrapped` where a profiler or a hook looks on, else `step`."""

    @functools.wraps(wrapped)  # with torch's mark on it that a step is wrapped
    def taken(self: Optimizer, *args: Any, **named: Any) -> Any:
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        everywhere = _global_optimizer_pre_hooks or _global_optimizer_post_hooks
        seen = hooks or everywhere or torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        return (wrapped if seen else step)(self, *args, **named)

    return taken


class Optimizer(torch.optim.Optimizer):
    """What all optimizers here share: options checked for each group, closures, state that keeps its types."""

    def __init__(self, params: Any, defaults: Mapping[str, Any], options: Options) -> None:
        unknown = set(options) - set(_DEFAULTS)
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no {sorted(unknown)}; it takes {sorted([*defaults, *_DEFAULTS])}")
        super().__init__(params, {**defaults, **_DEFAULTS, **options})

    def _patch_step_function(self) -> None:
        """torch wraps each step for profilers and hooks, which takes as long as a small step itself: only while there are some."""
        kind: Any = type(self)
        step = kind.step
        super()._patch_step_function()
        if kind.step is not step:
            kind.step = _looked_at(step, kind.step)

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
        seen: list[dict[str, Any]] = []  # what hooks that were registered before made of it
        last = self.register_load_state_dict_pre_hook(lambda _, given: seen.append(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        state_dict = seen[-1]
        for group in self.param_groups:  # a state of torch's lacks what only ours have
            group.update({name: value for name, value in self.defaults.items() if name not in group})
        ours = [p for group in self.param_groups for p in group["params"]]
        theirs = [key for group in state_dict["param_groups"] for key in group["params"]]
        for p, key in zip(ours, theirs, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().clone() if value.ndim == 0 else _laid_as(p, value.detach().to(p.device, copy=True))


def _laid_as(p: Tensor, value: Tensor) -> Tensor:
    """A buffer in the layout of its parameter, but for integers, whose scales go by the order in memory."""
    if value.shape != p.shape or value.stride() == p.stride() or value.dtype in (torch.int8, torch.uint8) or local(p) is not p:
        return value
    return torch.empty_like(p, dtype=value.dtype).copy_(value)


class Elementwise(Optimizer):
    """An optimizer whose rule treats every element by itself. A subclass gives the rule and what it needs."""

    counters: ClassVar[Numbers] = {"step": 0.0}
    _plan: Plan | None = None

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
        """What the rule branches on. One group's decay lets all decay, some by 0: so they share a kernel and a launch."""
        del group
        return {"decays": any(one["weight_decay"] != 0 for one in self.param_groups)}

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

    def update_all(self) -> None:
        """One step of all groups, in one launch where they can share it, else group by group."""
        if self._plan is not None and self._plan.step(self):
            return
        super().update_all()
        self._plan = plan_of(self)

    def update(self, group: Group) -> None:
        """One step of one group: one launch for all tensors whose counters are the same."""
        kinds = self.buffers(group)
        alike: dict[tuple[float, ...], list[tuple[Tensor, State]]] = {}
        for p in group["params"]:
            g = p.grad
            if g is None:
                continue
            if g.layout != torch.strided and not self.takes_sparse(group):
                raise Unsupported(f"{type(self).__name__} does not support sparse gradients with these settings")
            state = self.state[p]
            if len(state) < len(kinds) + len(self.counters):
                self._prepare(group, kinds, p)
            alike.setdefault(tuple([state[c].item() for c in self.counters]), []).append((p, state))
        for values, members in alike.items():
            counters = self._count(group, dict(zip(self.counters, values, strict=True)), [state for _, state in members])
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
                    state[f"{name}_scale"] = empty_scales(p)

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
