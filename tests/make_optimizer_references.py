"""Writes tests/golden/optimizers.json: where the authors' own packages end. Run by hand, in an environment that has them:

pip install schedulefree==1.4.1 prodigyopt lion-pytorch pytorch-optimizer optax jax
python tests/make_optimizer_references.py
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHAPES = ((5,), (4, 6), (3, 2))
STEPS = 100
FILE = Path(__file__).parent / "golden" / "optimizers.json"

# name: (package, class, arguments there, class here, arguments here, whether some gradients are None)
CASES: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any], bool]] = {
    "Lion": ("lion_pytorch", "Lion", {"lr": 0.01, "weight_decay": 0.1}, "Lion", {"lr": 0.01, "weight_decay": 0.1}, True),
    "ScheduleFreeAdamW": (
        "schedulefree",
        "AdamWScheduleFree",
        {"lr": 0.02, "weight_decay": 0.1, "warmup_steps": 10, "r": 0.5, "foreach": False},
        "ScheduleFreeAdamW",
        {"lr": 0.02, "weight_decay": 0.1, "warmup_steps": 10, "r": 0.5},
        True,
    ),
    "ScheduleFreeSGD": (
        "schedulefree",
        "SGDScheduleFree",
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1, "foreach": False},
        "ScheduleFreeSGD",
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1},
        True,
    ),
    "Prodigy": ("prodigyopt", "Prodigy", {"weight_decay": 0.1}, "Prodigy", {"weight_decay": 0.1}, True),
    "Prodigy, bounded": (
        "prodigyopt",
        "Prodigy",
        {"weight_decay": 0.1, "decouple": False, "use_bias_correction": True, "d0": 1e-3, "growth_rate": 1.05, "d_coef": 2.0},
        "Prodigy",
        {"weight_decay": 0.1, "decouple": False, "use_bias_correction": True, "d0": 1e-3, "growth_rate": 1.05, "d_coef": 2.0},
        False,
    ),
    "SOAP": (
        "pytorch_optimizer",
        "SOAP",
        {"lr": 0.01, "precondition_frequency": 7},
        "SOAP",
        {"lr": 0.01, "precondition_frequency": 7},
        False,
    ),
    "SOAP, short axes": (
        "pytorch_optimizer",
        "SOAP",
        {"lr": 0.01, "max_precondition_dim": 4, "weight_decay": 0.0},
        "SOAP",
        {"lr": 0.01, "max_precondition_dim": 4, "weight_decay": 0.0},
        False,
    ),
}


def walk(make: Any, *, gaps: bool) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    """The parameters after 100 steps on gradients of ½‖p − target‖² with noise, in double precision."""
    rng = np.random.default_rng(0)
    params = [torch.nn.Parameter(torch.from_numpy(rng.standard_normal(s))) for s in SHAPES]
    targets = [torch.from_numpy(rng.standard_normal(s)) for s in SHAPES]
    optimizer = make(params)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in range(STEPS):
        for k, (p, target) in enumerate(zip(params, targets, strict=True)):
            noise = torch.from_numpy(rng.standard_normal(p.shape))
            p.grad = None if gaps and (step + k) % 7 == 3 else (p.detach() - target) + 0.1 * noise
        optimizer.step()
    return params, optimizer


def flat(params: list[torch.nn.Parameter]) -> list[float]:
    """All elements in one list."""
    return torch.cat([p.detach().flatten() for p in params]).tolist()


def orthogonalized() -> dict[str, list[list[float]]]:
    """Newton–Schulz steps of optax, in double precision."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from optax.contrib import _muon

    given = np.random.default_rng(1).standard_normal((6, 4))
    coefficients = jax.numpy.asarray((3.4445, -4.7750, 2.0315))
    found = _muon.orthogonalize_via_newton_schulz(jax.numpy.asarray(given), coefficients, 5, eps=0.0)
    return {"given": given.tolist(), "found": np.asarray(found).tolist()}


def main() -> None:
    """Runs them all."""
    found: dict[str, Any] = {}
    for name, (package, kind, arguments, *_, gaps) in CASES.items():
        module = __import__(package)
        params, optimizer = walk(lambda p, m=module, k=kind, a=arguments: getattr(m, k)(p, **a), gaps=gaps)
        found[name] = {"package": f"{package} {version(package.replace('_', '-'))}", "ends": flat(params)}
        if hasattr(optimizer, "eval"):
            optimizer.eval()
            found[name]["evaluated"] = flat(params)
    found["orthogonal"] = {"package": f"optax {version('optax')}", **orthogonalized()}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
