"""Optimizers against torch's own, against formulas written naively, and against the authors' packages."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import make_optimizer_references as references
from hasten import optim
from hasten.train.optim.muon import orthogonal

SHAPES = ((7,), (30, 13), (3, 4, 5, 5), (1,), ())

TWINS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adagrad", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.3, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"centered": True, "weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9, "maximize": True}),
    ("RMSprop", {"momentum": 0.9, "centered": True}),
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1, "amsgrad": True}),
    ("Adam", {"lr": torch.tensor(0.01, dtype=torch.float64), "weight_decay": 0.1, "maximize": True, "decoupled_weight_decay": True}),
    ("AdamW", {"lr": 0.01}),
    ("AdamW", {"lr": 0.01, "amsgrad": True, "betas": (0.5, 0.9), "maximize": True}),
    ("NAdam", {}),
    ("NAdam", {"weight_decay": 0.1, "momentum_decay": 6e-3}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True}),
    ("Adafactor", {}),
    ("Adafactor", {"weight_decay": 0.1, "d": 1.5, "beta2_decay": -1.0, "maximize": True}),
    ("Adafactor", {"eps": (0.5, 1e-2)}),
]


def run(make: Any, arguments: dict[str, Any], dtype: torch.dtype, steps: int = 100) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]
    optimizer = make(params, **arguments)
    for step in range(steps):
        for k, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            p.grad = None if (step + k) % 7 == 0 else g
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(("name", "arguments"), TWINS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_it_equals_torch(name: str, arguments: dict[str, Any]) -> None:
    exact = 1e-7 if name == "NAdam" else 1e-11  # torch keeps the product of NAdam's coefficients in single precision
    for dtype, tolerance in ((torch.float64, exact), (torch.float32, 1e-6)):
        ours, theirs = (run(getattr(room, name), arguments, dtype) for room in (optim, torch.optim))
        a, b = (torch.cat([p.flatten() for p in params]) for params in (ours, theirs))
        assert torch.linalg.vector_norm(a - b) <= tolerance * torch.linalg.vector_norm(b), dtype


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_complex_parameters_equal_torch(name: str) -> None:
    ours, theirs = (run(getattr(room, name), {"lr": 0.01}, torch.complex64) for room in (optim, torch.optim))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


def test_layouts_equal_torch() -> None:
    """channels_last, a transposed matrix, a strided slice; gradients in another order."""
    found = []
    for room in (optim, torch.optim):
        torch.manual_seed(0)
        whole = torch.randn(6, 10)
        params = [
            nn.Parameter(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)),
            nn.Parameter(torch.randn(5, 3).T),
            nn.Parameter(whole[:, ::2]),
        ]
        optimizer = room.AdamW(params, lr=0.1)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        found.append([p.detach() for p in params])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_state_of_torch_can_be_loaded() -> None:
    """And goes on as there."""
    for name, arguments in (("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}), ("AdamW", {"lr": 0.1}), ("NAdam", {"lr": 0.1})):
        p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        theirs, ours = getattr(torch.optim, name)([p], **arguments), getattr(optim, name)([q], **arguments)
        p.grad = torch.tensor([0.1, -2.0, 3.0])
        theirs.step()
        ours.load_state_dict(theirs.state_dict())
        q.data.copy_(p.data)
        p.grad = q.grad = torch.tensor([0.3, -0.1, 1.0])
        theirs.step()
        ours.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_momentum_is_an_average_and_not_dampening() -> None:
    """v ← βv + (1 − β)g equals the heavy ball with lr·(1 − β); torch's dampening=β takes a first step that is 1/(1 − β) times as long."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(9, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(50)]
    ends = {}
    for name, make in {
        "ours": lambda p: optim.Momentum(p, lr=0.1, beta=0.9),
        "ball": lambda p: torch.optim.SGD(p, lr=0.1 * (1 - 0.9), momentum=0.9),
        "dampening": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.9),
    }.items():
        p = nn.Parameter(start.clone())
        optimizer = make([p])
        for g in gradients:
            p.grad = g
            optimizer.step()
        ends[name] = p.detach()
    theta, v = start.clone(), torch.zeros(9, dtype=torch.float64)
    for g in gradients:
        v = 0.9 * v + (1 - 0.9) * g
        theta = theta - 0.1 * v
    torch.testing.assert_close(ends["ours"], theta, rtol=0, atol=1e-14)
    torch.testing.assert_close(ends["ours"], ends["ball"], rtol=0, atol=1e-14)
    assert (ends["ours"] - ends["dampening"]).abs().max() > 0.01


@pytest.mark.parametrize("name", references.CASES)
def test_it_ends_where_the_authors_package_ends(name: str) -> None:
    """Recorded by make_optimizer_references.py."""
    *_, kind, arguments, gaps = references.CASES[name]
    found = json.loads(references.FILE.read_text())[name]
    params, optimizer = references.walk(lambda p: getattr(optim, kind)(p, **arguments), gaps=gaps)
    close = 1e-5 if kind == "SOAP" else 1e-6  # the package rounds its bases to single precision
    torch.testing.assert_close(references.flat(params), found["ends"], rtol=close, atol=close)
    if "evaluated" in found:
        optimizer.eval()  # type: ignore[attr-defined]
        torch.testing.assert_close(references.flat(params), found["evaluated"], rtol=1e-6, atol=1e-6)
        optimizer.train()  # type: ignore[attr-defined]
        torch.testing.assert_close(references.flat(params), found["ends"], rtol=1e-6, atol=1e-6)


def test_muon_makes_orthogonal_as_optax_does() -> None:
    found = json.loads(references.FILE.read_text())["orthogonal"]
    given = torch.tensor(found["given"], dtype=torch.float64)
    ours = orthogonal(given, 5, (3.4445, -4.7750, 2.0315), 0.0)
    torch.testing.assert_close(ours, torch.tensor(found["found"], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    values = torch.linalg.svdvals(ours)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_muon_equals_the_formula() -> None:
    """A matrix in double precision; a convolution is the matrix of its filters; a vector takes AdamW's step."""
    torch.manual_seed(0)
    shapes = ((6, 4), (3, 2, 2, 2), (5,))
    params = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    twin = nn.Parameter(params[2].detach().clone())
    theta = [p.detach().clone() for p in params[:2]]
    m = [torch.zeros_like(t) for t in theta]
    optimizer = optim.Muon(params, lr=0.05, weight_decay=0.1)
    adam = torch.optim.AdamW([twin], lr=0.05, weight_decay=0.1, betas=(0.9, 0.95))
    for _ in range(20):
        for p in params:
            p.grad = torch.randn_like(p)
        twin.grad = params[2].grad
        optimizer.step()
        adam.step()
        for k, p in enumerate(params[:2]):
            m[k] = 0.95 * m[k] + 0.05 * p.grad
            u = (0.95 * m[k] + 0.05 * p.grad).flatten(1)
            rows, columns = u.shape
            u = orthogonal(u, 5, (3.4445, -4.7750, 2.0315), 1e-7).view(p.shape)
            theta[k] = theta[k] * (1 - 0.05 * 0.1) - 0.05 * max(1, rows / columns) ** 0.5 * u
    torch.testing.assert_close([p.detach() for p in params[:2]], theta, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(params[2], twin, rtol=1e-10, atol=1e-10)


def test_muon_is_near_torchs() -> None:
    """Which rounds the Newton–Schulz steps to bfloat16: each singular value is off by a few parts in a hundred."""
    ends = []
    for room in (optim, torch.optim):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(16, 24))
        optimizer = room.Muon([p], lr=0.1)
        for _ in range(5):
            p.grad = torch.randn(16, 24)
            optimizer.step()
        ends.append(p.detach())
    assert (ends[0] - ends[1]).norm() < 0.05 * ends[1].norm()


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_equals_the_formula(adaptive: bool) -> None:
    """On ½(Ap)²: e = ρ·g/‖g‖, or ρ·p²g/‖p·g‖, and the gradient at p + e."""
    torch.manual_seed(0)
    matrix = torch.randn(4, 4, dtype=torch.float64)
    p = nn.Parameter(torch.randn(4, dtype=torch.float64))
    theta = p.detach().clone()
    optimizer = optim.SAM(optim.SGD([p], lr=0.05), rho=0.3, adaptive=adaptive)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (matrix @ p).square().sum()
        loss.backward()
        return loss

    for _ in range(10):
        expected = 0.5 * (matrix @ theta).square().sum()
        loss = optimizer.step(closure)
        g = matrix.T @ matrix @ theta
        e = 0.3 * (theta**2 * g / (theta * g).norm() if adaptive else g / g.norm())
        theta = theta - 0.05 * (matrix.T @ matrix @ (theta + e))
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(p.detach(), theta)
