"""The optimizers' table: one row each, and what the tests make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hasten import optim


@dataclass(frozen=True, kw_only=True)
class Row:
    """One optimizer as the laws see it.

    Args:
        make: from parameters or groups, and options.
        lr: with which it goes down a quadratic.
        closure: a step needs one.
        kernel: it has a part that is compiled.
        small: types its state can have.
        alike: settings beside the defaults that the laws are also held with.
    """

    make: Callable[..., torch.optim.Optimizer]
    lr: float = 0.05
    closure: bool = False
    kernel: bool = True
    small: tuple[torch.dtype, ...] = (torch.bfloat16, torch.int8)
    options: dict[str, Any] = field(default_factory=dict)


def sam(params: Any, **options: Any) -> torch.optim.Optimizer:
    """SAM around SGD."""
    return optim.SAM(optim.SGD(params, **{"lr": 0.1, "momentum": 0.9, **options}))


BF16 = (torch.bfloat16,)
ROWS = {
    "SGD": Row(make=optim.SGD, small=()),
    "SGD, momentum": Row(make=optim.SGD, lr=0.02, options={"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}),
    "Momentum": Row(make=optim.Momentum, lr=0.1),
    "Adagrad": Row(make=optim.Adagrad, lr=0.5),
    "RMSprop": Row(make=optim.RMSprop, lr=0.02),
    "RMSprop, centered": Row(make=optim.RMSprop, lr=0.01, options={"centered": True, "momentum": 0.5}, small=()),
    "Adam": Row(make=optim.Adam, options={"amsgrad": True}),
    "AdamW": Row(make=optim.AdamW),
    "NAdam": Row(make=optim.NAdam),
    "Lion": Row(make=optim.Lion, lr=0.04),
    "ScheduleFreeSGD": Row(make=optim.ScheduleFreeSGD, lr=0.2, small=()),
    "ScheduleFreeAdamW": Row(make=optim.ScheduleFreeAdamW, lr=0.1),
    "Prodigy": Row(make=optim.Prodigy, lr=1.0, options={"d0": 1e-3}, small=BF16),
    "Adafactor": Row(make=optim.Adafactor, lr=0.3, kernel=False, small=()),
    "Muon": Row(make=optim.Muon, lr=0.2, options={"weight_decay": 1e-3}, small=BF16),
    "SOAP": Row(make=optim.SOAP, kernel=False, small=()),
    "SAM": Row(make=sam, lr=0.02, closure=True),
}
"""Adding an optimizer is one row here."""


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A few shapes: a convolution, matrices, vectors, one number."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 6), nn.PReLU(), nn.Linear(6, 1)).to(dtype)


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (24, 2, 4, 4) and targets (24, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(24, 2, 4, 4, generator=generator), torch.randn(24, 1, generator=generator)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, start: int = 0, gaps: bool = False) -> None:
    """Steps on one batch after another; with `gaps`, some gradients are None in some steps."""
    for step in range(start, start + steps):
        x, y = (t.to(next(module.parameters()).dtype) for t in problem(step))

        def closure(x: torch.Tensor = x, y: torch.Tensor = y, step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (module(x) - y).square().mean()
            loss.backward()
            for k, p in enumerate(module.parameters()):
                if gaps and (step + k) % 4 == 1:
                    p.grad = None
            return loss

        optimizer.step(closure)


def weights(module: nn.Module) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])
