"""How long a step is for each parameter, and how that changes: lr/(√v + eps) of Adagrad, RMSprop and Adam.

    python examples/effective_steps.py

Two parameters of one quadratic, ½·(100·a² + b²): the gradients of a are a hundred times those of b. A method with one rate must take the
one that a bears; these take a rate for each, from the size of its own gradients.
"""

from __future__ import annotations

import math

import torch

from hasten import optim

CURVATURE = torch.tensor([100.0, 1.0])


def rates(optimizer: torch.optim.Optimizer, p: torch.Tensor) -> list[float]:
    """What a unit of gradient moves each element by, now."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    squares = next(state[name] for name in ("sum", "square_avg", "exp_avg_sq") if name in state)
    corrected = 1 - group["betas"][1] ** state["step"].item() if "betas" in group else 1.0
    return (group["lr"] / ((squares / corrected).sqrt() + group["eps"])).tolist()


def main(steps: int = 300) -> dict[str, list[list[float]]]:
    """Prints the rates at steps 1, 10, 100, … and gives all of them."""
    found: dict[str, list[list[float]]] = {}
    for kind in (optim.Adagrad, optim.RMSprop, optim.Adam):
        p = torch.nn.Parameter(torch.ones(2))
        optimizer = kind([p], lr=0.05)
        found[kind.__name__] = []
        for step in range(1, steps + 1):
            p.grad = CURVATURE * p.detach()
            optimizer.step()
            found[kind.__name__].append(rates(optimizer, p))
            if step == steps or math.log10(step).is_integer():
                a, b = found[kind.__name__][-1]
                print(f"{kind.__name__:8} step {step:4}  rate of a {a:8.5f}  of b {b:8.5f}  a = {p[0].item():9.2e}  b = {p[1].item():9.2e}")
    return found


if __name__ == "__main__":
    main()
