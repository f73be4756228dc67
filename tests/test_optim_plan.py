"""A launch kept from step to step gives the bytes of one made anew, whatever happens to the tensors in between."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hasten import optim
from hasten.train.optim import machine
from optimizers import ROWS, network, problem, weights

PLANNED = ("SGD", "SGD, momentum", "Momentum", "Adagrad", "RMSprop", "RMSprop, centered", "Adam", "AdamW", "Lion")


def made(name: str, module: nn.Module, **more: Any) -> torch.optim.Optimizer:
    """In two groups, of which one decays."""
    wide, narrow = ([p for p in module.parameters() if (p.ndim >= 2) == side] for side in (True, False))
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": narrow, "weight_decay": 0.0}]
    return ROWS[name].make(groups, **{"lr": ROWS[name].lr, **ROWS[name].options, **more})


def stepped(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    x, y = problem(step)
    (module(x) - y).square().mean().backward()
    optimizer.step()


def none(module: nn.Module, optimizer: Any) -> None:
    """Nothing happens."""


def no_gradient(module: nn.Module, optimizer: Any) -> None:
    for p in module.parameters():
        p.grad = None
    next(module.parameters()).grad = torch.ones_like(next(module.parameters()))
    optimizer.step()


def turned_gradient(module: nn.Module, optimizer: Any) -> None:
    for p in module.parameters():
        p.grad = torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape[::-1]).permute(*range(p.ndim)[::-1]) / p.numel()
    optimizer.step()


def moved(module: nn.Module, optimizer: Any) -> None:
    for p in module.parameters():
        p.data = p.data.clone()


def turned(module: nn.Module, optimizer: Any) -> None:
    p = next(module.parameters())
    p.data = p.data.transpose(0, 1).contiguous().transpose(0, 1)


def loaded(module: nn.Module, optimizer: Any) -> None:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


def other_state(module: nn.Module, optimizer: Any) -> None:
    for state in optimizer.state.values():
        state.update({name: value.clone() / 2 for name, value in state.items()})


def one_step_ahead(module: nn.Module, optimizer: Any) -> None:
    optimizer.state[next(module.parameters())]["step"].add_(3)


def other_numbers(module: nn.Module, optimizer: Any) -> None:
    for factor, group in enumerate(optimizer.param_groups, start=2):
        group["lr"] /= factor
        group["weight_decay"] *= factor


def no_decay(module: nn.Module, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0


def uphill(module: nn.Module, optimizer: Any) -> None:
    optimizer.param_groups[0]["maximize"] = True


def plain_path(module: nn.Module, optimizer: Any) -> None:
    optimizer.param_groups[1]["fused"] = False


def one_more(module: nn.Module, optimizer: Any) -> None:
    more = nn.Parameter(torch.ones(3))
    more.grad = torch.full_like(more, 0.5)
    module.register_parameter("more", more)
    optimizer.add_param_group({"params": [more], "weight_decay": 0.2})


def started_anew(module: nn.Module, optimizer: Any) -> None:
    optimizer.state.clear()


QUIET: tuple[Callable[..., None], ...] = (none, moved, other_numbers)  # the plan stays
EVENTS = (
    *QUIET,
    no_gradient,
    turned_gradient,
    turned,
    loaded,
    other_state,
    one_step_ahead,
    no_decay,
    uphill,
    plain_path,
    one_more,
    started_anew,
)


def run(name: str, event: Callable[..., None], **more: Any) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(0)
    module = network()
    optimizer = made(name, module, **more)
    for step in range(9):
        if step in (3, 6):
            event(module, optimizer)
        stepped(module, optimizer, step)
    return weights(module), optimizer


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("name", PLANNED)
def test_the_bytes_are_those_without_a_plan(name: str, event: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    found, optimizer = run(name, event)
    monkeypatch.setattr(machine, "plan_of", lambda optimizer: None)
    wanted, plain = run(name, event)
    assert torch.equal(found, wanted)
    for mine, theirs in zip(optimizer.state.values(), plain.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_small_state_has_a_plan_too(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found, optimizer = run("AdamW", none, state_dtype=dtype)
    assert optimizer._plan is not None
    monkeypatch.setattr(machine, "plan_of", lambda optimizer: None)
    assert torch.equal(found, run("AdamW", none, state_dtype=dtype)[0])


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_a_plan_is_kept_as_long_as_it_holds(event: Callable[..., None]) -> None:
    module = network()
    optimizer = made("AdamW", module)
    stepped(module, optimizer, 0)
    plan = optimizer._plan  # type: ignore[attr-defined]
    assert plan is not None
    event(module, optimizer)
    stepped(module, optimizer, 1)
    assert (optimizer._plan is plan) == (event in QUIET)  # type: ignore[attr-defined]


def test_a_copy_makes_a_plan_of_its_own() -> None:
    module = network()
    optimizer = made("AdamW", module)
    stepped(module, optimizer, 0)
    before = copy.deepcopy(optimizer.state_dict())
    twin_module, twin = copy.deepcopy((module, optimizer))
    stepped(twin_module, twin, 1)
    assert all(value["step"] == 1 for value in optimizer.state_dict()["state"].values())
    assert str(before) == str(optimizer.state_dict())
    stepped(module, optimizer, 1)
    assert torch.equal(weights(module), weights(twin_module))


def test_hooks_and_profilers_see_a_step() -> None:
    module, told = network(), []
    optimizer = made("AdamW", module)
    stepped(module, optimizer, 0)
    hooks = [
        optimizer.register_step_pre_hook(lambda *_: told.append("before")),
        optimizer.register_step_post_hook(lambda *_: told.append("after")),
    ]
    stepped(module, optimizer, 1)
    assert told == ["before", "after"]
    for hook in hooks:
        hook.remove()
    with torch.profiler.profile() as profile:
        stepped(module, optimizer, 2)
    assert told == ["before", "after"]
    assert "Optimizer.step#AdamW.step" in {event.name for event in profile.events()}


def test_subclasses_with_a_step_of_their_own_call_hooks_once() -> None:
    w, told = nn.Parameter(torch.ones(2)), []
    optimizer = optim.ScheduleFreeSGD([w])
    optimizer.register_step_post_hook(lambda *_: told.append(1))
    w.grad = torch.ones(2)
    optimizer.step()
    assert told == [1]


@pytest.mark.parametrize("fused", [True, False])
def test_a_block_of_vanishing_numbers_is_zero_in_8_bits(fused: bool) -> None:
    w = nn.Parameter(torch.ones(300))
    optimizer = optim.Lion([w], lr=0.0, state_dtype=torch.int8, fused=fused)
    w.grad = torch.zeros(300)
    w.grad[7] = 1e-36
    optimizer.step()
    assert not optimizer.state[w]["exp_avg"].any()
    w.grad[7] = 1e-3
    optimizer.step()
    assert optimizer.state[w]["exp_avg"][7] == 127
