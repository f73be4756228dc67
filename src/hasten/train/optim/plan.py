"""A launch kept from step to step. In small networks most of a step would go into finding where the arrays are; here all groups share
one launch, and as long as parameters, states and settings are those of the step before, only gradients and numbers are looked at again.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.train.optim.launch import Group, State, form_of, kernel_of, row, seed_of

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
        states: of the parameters.
        names: of what a state holds.
        held: what the states hold, by name.
        counters: of all parameters, one tensor by name; the states hold views of them.
        buffers: of all parameters, by their place behind parameter and gradient.
        sizes: of the parameters.
    """

    run: Kernel
    params: list[Tensor]
    counts: list[int]
    asked: list[Any]
    gradient: torch.dtype
    states: list[State]
    names: list[str]
    held: dict[str, list[Tensor]]
    counters: dict[str, Tensor]
    buffers: list[list[Tensor]]
    sizes: list[int]

    def step(self, optimizer: Elementwise) -> bool:
        """One step of all groups; or nothing, and False, where something is not as it was."""
        gradients = self._gradients()
        if gradients is None or not self._same(optimizer):
            return False
        known = {name: values.tolist() for name, values in self.counters.items()}
        if any(values.count(values[0]) != len(values) for values in known.values()):
            return False
        counters = {name: values[0] for name, values in known.items()}
        numbers: list[float] = []
        for group, count in zip(optimizer.param_groups, self.counts, strict=True):
            after = optimizer.advance(group, counters)
            numbers += [*optimizer.numbers(group, after).values()] * count
        for name, values in self.counters.items():
            values.fill_(after[name])
        pointers = [t.data_ptr() for tensors in zip(self.params, gradients, *self.buffers, strict=True) for t in tensors]
        self.run(self.sizes, pointers, numbers, seed_of(int(after["step"])), 0)
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
        groups, state = optimizer.param_groups, optimizer.state
        return (
            [len(group["params"]) for group in groups] == self.counts
            and all(map(is_, (p for group in groups for p in group["params"]), self.params))
            and all(map(is_, (state[p] for p in self.params), self.states))
            and all(all(map(is_, [one.get(name) for one in self.states], self.held[name])) for name in self.names)
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
        tensors, place = row(p, optimizer.state[p], kinds, [])
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
    states = [optimizer.state[p] for p in params]
    counters = {name: _gathered(states, name) for name in optimizer.counters}
    names = list(states[0])
    return Plan(
        run=run,
        params=params,
        counts=counts,
        asked=asked,
        gradient=rows[0][1].dtype,
        states=states,
        names=names,
        held={name: [one[name] for one in states] for name in names},
        counters=counters,
        buffers=buffers,
        sizes=[p.numel() for p in params],
    )


def _asked(optimizer: Elementwise, group: Group) -> Any:
    return optimizer.buffers(group), optimizer.flags(group), [group[name] for name in _OPTIONS]


def _gathered(states: list[State], name: str) -> Tensor:
    """A counter of all parameters side by side, so that one call moves it; the states keep views."""
    values = torch.stack([state[name] for state in states])
    for state, view in zip(states, values, strict=True):
        state[name] = view
    return values
