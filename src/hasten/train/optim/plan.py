"""A launch kept from step to step. In small networks most of a step would go into finding where the arrays are; here all groups share
one launch, and as long as parameters, states and settings are those of the step before, only gradients and numbers are looked at again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.train.optim.launch import Group, Homeward, State, form_of, kernel_of, row, seed_of

if TYPE_CHECKING:
    from hasten.train.optim.kernel import Kernel
    from hasten.train.optim.machine import Elementwise

_OPTIONS = ("fused", "foreach", "maximize", "state_dtype")


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """One launch for all groups.

    Args:
        run: the kernel.
        params: of all groups, one behind the other.
        counts: how many each group has.
        asked: the settings of the groups that the kernel was chosen by.
        gradient: the type of every gradient.
        states: all that the optimizer has.
        held: what they hold, one state behind the other.
        steps: that each parameter has taken; the states hold views of it.
        buffers: of all parameters, by their place behind parameter and gradient.
        sizes: of the parameters.
    """

    run: Kernel
    params: list[Tensor]
    counts: list[int]
    asked: list[Any]
    gradient: torch.dtype
    states: list[State]
    held: list[Any]
    steps: Tensor
    buffers: list[list[Tensor]]
    sizes: list[int]

    def step(self, optimizer: Elementwise) -> bool:
        """One step of all groups; or nothing, and False, where something is not as it was."""
        gradients = self._gradients()
        if gradients is None or not self._same(optimizer):
            return False
        steps = self.steps.tolist()
        if steps.count(steps[0]) != len(steps):
            return False
        step, numbers = steps[0] + 1, list[float]()
        for group, count in zip(optimizer.param_groups, self.counts, strict=True):
            numbers += [*optimizer.numbers(group, {"step": step}).values()] * count
        self.steps.fill_(step)
        pointers = [t.data_ptr() for tensors in zip(self.params, gradients, *self.buffers, strict=True) for t in tensors]
        self.run(self.sizes, pointers, numbers, seed_of(int(step)), 0)
        return True

    def _gradients(self) -> list[Tensor] | None:
        """The gradients, where each is there and lies as its parameter does."""
        found = []
        for p in self.params:
            g = p.grad
            if g is None or g.layout is not torch.strided or g.dtype is not self.gradient or not g.is_contiguous():
                return None
            found.append(g)
        return found

    def _same(self, optimizer: Elementwise) -> bool:
        """Whether all but the gradients are as they were."""
        groups, states = optimizer.param_groups, optimizer.state
        return (
            [len(group["params"]) for group in groups] == self.counts
            and all(map(is_, chain.from_iterable(group["params"] for group in groups), self.params))
            and len(states) == len(self.states)
            and all(map(is_, states.values(), self.states))
            and sum(map(len, self.states)) == len(self.held)
            and all(map(is_, chain.from_iterable(map(dict.values, self.states)), self.held))
            and [p.numel() for p in self.params if p.is_cpu and p.is_contiguous()] == self.sizes
            and [_asked(optimizer, group) for group in groups] == self.asked
        )


def plan_of(optimizer: Elementwise) -> Plan | None:
    """A plan of the step that was just taken, or None where its tensors do not all lie alike or have no kernel."""
    groups = optimizer.param_groups
    asked = [_asked(optimizer, group) for group in groups]
    if list(optimizer.counters) != ["step"] or any(one != asked[0] for one in asked):
        return None
    kinds = optimizer.buffers(groups[0])
    rows, places = [], set()
    for p in (p for group in groups for p in group["params"]):
        g = p.grad
        if type(p) not in (Tensor, torch.nn.Parameter) or p.is_complex() or not p.numel() or not p.is_contiguous():
            return None
        if g is None or g.layout is not torch.strided or not g.is_contiguous():
            return None
        homeward: Homeward = []
        tensors, place = row(p, optimizer.state[p], kinds, homeward)
        if homeward:  # the plan would keep a copy of the state
            return None
        rows.append(tensors)
        places.add(place)
    if len(places) != 1 or next(iter(places))[0] != "cpu":
        return None
    numbers = list(optimizer.numbers(groups[0], dict.fromkeys(optimizer.counters, 1.0)))
    run = kernel_of(
        form_of(type(optimizer).rule, kinds, places.pop()[1:], numbers, optimizer.flags(groups[0]), groups[0]), groups[0], "cpu"
    )
    if run is None:
        return None
    params, _, *buffers = (list(column) for column in zip(*rows, strict=True))
    counts = [len(group["params"]) for group in groups]
    steps = _gathered([optimizer.state[p] for p in params])
    states = list(optimizer.state.values())
    return Plan(
        run=run,
        params=params,
        counts=counts,
        asked=asked,
        gradient=rows[0][1].dtype,
        states=states,
        held=[value for one in states for value in one.values()],
        steps=steps,
        buffers=buffers,
        sizes=[p.numel() for p in params],
    )


def _asked(optimizer: Elementwise, group: Group) -> Any:
    return optimizer.buffers(group), optimizer.flags(group), [group[name] for name in _OPTIONS]


def _gathered(states: list[State]) -> Tensor:
    """The steps of all parameters side by side, so that one call counts them all; the states keep views."""
    steps = torch.stack([state["step"] for state in states])
    for state, view in zip(states, steps, strict=True):
        state["step"] = view
    return steps
