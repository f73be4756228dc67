"""Weights that are computed from others at each call (weight norm, spectral norm, `torch.nn.utils.parametrize`) as plain ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from hasten.core.network import Network


def copied(module: nn.Module) -> nn.Module:
    """A deep copy in eval mode; of tensors that a layer keeps of its last call, such as a computed weight, their values."""
    kept = [v for part in module.modules() for v in vars(part).values() if isinstance(v, Tensor) and not v.is_leaf]
    return copy.deepcopy(module, {id(v): v.detach().clone() for v in kept}).eval()


def settled(network: Network) -> tuple[Network, int]:
    """The network with plain weights instead of computed ones, and how many there were."""
    if not any(map(_computes, network.module.modules())):
        return network, 0
    module = copied(network.module)
    found = sum(_settle(part) + _settle_hooks(part) for part in list(module.modules()))
    return network.with_body(module), found


def _computes(part: nn.Module) -> bool:
    return parametrize.is_parametrized(part) or bool(_hooks(part))


def _hooks(part: nn.Module) -> list[WeightNorm | SpectralNorm]:
    """Of the older functions `weight_norm` and `spectral_norm`."""
    return [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, WeightNorm | SpectralNorm)]


def _settle(part: nn.Module) -> int:
    if not parametrize.is_parametrized(part):
        return 0
    with torch.no_grad():
        values = {name: getattr(part, name).detach().clone() for name in part.parametrizations}  # type: ignore[union-attr]
    learns = {name: any(p.requires_grad for p in part.parametrizations[name].parameters()) for name in values}  # type: ignore[index,union-attr]
    # Not remove_parametrizations: it deletes from the class, which the copy shares with the user's layer.
    part.__class__ = part.__class__.__bases__[0]
    del part.parametrizations
    for name, value in values.items():
        part.register_parameter(name, nn.Parameter(value, requires_grad=learns[name]))
    return len(values)


def _settle_hooks(part: nn.Module) -> int:
    hooks = _hooks(part)
    for hook in hooks:
        remove = remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm
        remove(part, hook.name)
    return len(hooks)
