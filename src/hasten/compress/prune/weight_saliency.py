"""How much each single weight matters.

Shapes: weights (out, in / groups, …), recurrent ones (gates · hidden, in); transposed convolutions (in, out / groups, …).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hasten.compress.passes import batches, gradients
from hasten.compress.prune.weight_places import ATTENTION_OUT, CONVS, Found, each
from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.core.recipe import Context

Saliency = Callable[[nn.Module, Found, Network, Context], dict[str, Tensor]]


def magnitude(module: nn.Module, found: Found, network: Network, context: Context) -> dict[str, Tensor]:
    """|w|."""
    del module, network, context
    return {name: w.value.detach().abs() for name, w in found.items()}


def random(module: nn.Module, found: Found, network: Network, context: Context) -> dict[str, Tensor]:
    """Uniform in (0, 1], and 0 for what is zero already."""
    del module, network
    generator = torch.Generator().manual_seed(context.seed)
    drawn = {name: 1 - torch.rand(w.value.shape, generator=generator).to(w.value) for name, w in found.items()}
    return {name: values * (found[name].value.detach() != 0) for name, values in drawn.items()}


def taylor(module: nn.Module, found: Found, network: Network, context: Context) -> dict[str, Tensor]:
    """Mean over batches of |w · ∂loss/∂w|: what the loss changes by, to first order, when the weight becomes zero."""
    values = list(each(found))
    total = [torch.zeros_like(v) for v in values]
    for grads in gradients(module, values, network, context):
        for sums, value, grad in zip(total, values, grads, strict=True):
            sums += (value.detach() * grad).abs()
    return dict(zip(found, total, strict=True))


@torch.no_grad()
def activation(module: nn.Module, found: Found, network: Network, context: Context) -> dict[str, Tensor]:
    """|w| · ‖x‖₂ with x the input that the weight multiplies, over all examples and positions of *calibrate*."""
    for w in found.values():
        if not isinstance(w.layer, (nn.Linear, *CONVS)) or type(w.layer) is ATTENTION_OUT:
            raise Unsupported(
                f"activation saliency needs to see a layer's input, that of {w.layer_name!r} ({type(w.layer).__name__}) stays "
                "inside; name it in keep or take another saliency"
            )
    seen = {w.layer: _Squares(w.layer_name, torch.zeros(_inputs(w.layer)).to(w.value.device).double()) for w in found.values()}
    training, device = module.training, next(each(found)).device
    hooks = [layer.register_forward_pre_hook(squares) for layer, squares in seen.items()]
    try:
        module.eval()
        for example in batches(context.calibrate, fixed_batch=network.fixed_batch, device=device):
            module(*example)
    finally:
        for hook in hooks:
            hook.remove()
        module.train(training)
    return {name: w.value.detach().abs() * _spread(w.layer, seen[w.layer].norms()).to(w.value) for name, w in found.items()}


class _Squares:
    """A hook that adds up the squares of each input feature or channel."""

    def __init__(self, name: str, total: Tensor) -> None:
        self.name, self.total, self.calls = name, total, 0

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.total += _squares(layer, args[0].detach().double())
        self.calls += 1

    def norms(self) -> Tensor:
        """‖x‖₂ of each. Raises Unsupported on a layer that was never called: its weight is used behind its back."""
        if not self.calls:
            raise Unsupported(f"activation saliency needs to see a layer's input, {self.name!r} was never called; name it in keep")
        return self.total.sqrt()


def _inputs(layer: Any) -> tuple[int, ...]:
    return (layer.in_features,) if isinstance(layer, nn.Linear) else (layer.in_channels,)


def _squares(layer: Any, x: Tensor) -> Tensor:
    """Σ x² for each input feature or channel."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).square().sum(0)
    x = x if x.dim() == layer.weight.dim() else x[None]
    return x.square().sum((0, *range(2, x.dim())))


def _spread(layer: Any, norms: Tensor) -> Tensor:
    """One norm per input, laid out to multiply the weight."""
    if isinstance(layer, nn.Linear):
        return norms
    per_group = norms.view(layer.groups, -1).repeat_interleave(layer.out_channels // layer.groups, 0)  # (out, in / groups)
    return per_group.view(*per_group.shape, *[1] * (layer.weight.dim() - 2))


SALIENCIES: dict[str, Saliency] = {"activation": activation, "magnitude": magnitude, "random": random, "taylor": taylor}
