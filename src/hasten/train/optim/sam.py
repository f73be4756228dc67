"""SAM: any optimizer, with the gradient taken where the loss is worst nearby."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hasten.core.errors import UsageError


class SAM(torch.optim.Optimizer):
    """e = rho·g/‖g‖;  the optimizer's step at p with the gradient at p + e. It costs two gradients a step.

    Args:
        base: an optimizer; its groups, state and learning rates are those of this one.
        rho: radius, ≥ 0.
        adaptive: measures in units of the weights: e = rho·p²g/‖p·g‖.

    `step` needs a closure that clears the gradients, computes them and returns the loss; it is called twice, and the first loss is
    returned. Batch norms see both calls.

    Raises:
        UsageError: rho below 0; a step without closure.

    References:
        P. Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", 2020, arXiv:2010.01412.
        J. Kwon et al., "ASAM", 2021, arXiv:2102.11600 (adaptive).
    """

    def __init__(self, base: torch.optim.Optimizer, rho: float = 0.05, *, adaptive: bool = False) -> None:
        if not rho >= 0:
            raise UsageError(f"rho must be a number of at least 0, got {rho}")
        self.base, self.rho, self.adaptive = base, rho, adaptive
        super().__init__([p for group in base.param_groups for p in group["params"]], {})
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, base.defaults

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the loss at the point where it began."""
        if closure is None:
            raise UsageError("SAM needs a closure that computes the gradients, got none; call step(closure)")
        with torch.enable_grad():
            loss = closure()
        moved = [(p, p.detach().clone()) for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._climb([p for p, _ in moved])
        try:
            with torch.enable_grad():
                closure()
        finally:
            for p, before in moved:
                p.copy_(before)
        self.base.step()
        return loss

    def _climb(self, params: list[Tensor]) -> None:
        grads = [p.grad.coalesce() if p.grad.is_sparse else p.grad for p in params if p.grad is not None]
        scaled = [_times(p, g) for p, g in zip(params, grads, strict=True)] if self.adaptive else grads
        norms = [torch.linalg.vector_norm(g.values() if g.is_sparse else g) for g in scaled]
        if not norms:
            return
        length = self.rho / (torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])) + 1e-12).item()
        for p, g in zip(params, scaled, strict=True):
            p.add_(_times(p, g) if self.adaptive else g, alpha=length)

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "rho": self.rho, "adaptive": self.adaptive}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # torch keeps groups and state only, and the base has these

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The optimizer's own."""
        self.base.load_state_dict(state_dict)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The optimizer's own."""
        if hasattr(self, "param_groups") and self.param_groups is self.base.param_groups:
            self.base.add_param_group(param_group)
        else:
            super().add_param_group(param_group)


def _times(p: Tensor, g: Tensor) -> Tensor:
    """|p|·g; of a sparse g, whose rows are named once each, the rows that it names."""
    if not g.is_sparse:
        return p.abs() * g
    values = p[tuple(g.indices())].abs() * g.values()
    return torch.sparse_coo_tensor(g.indices(), values, g.shape, is_coalesced=True, check_invariants=False)
