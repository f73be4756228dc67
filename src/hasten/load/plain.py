"""A user's module without what only training needs: wrappers, weights that are computed from others at each call, bfloat16."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.optim.swa_utils import AveragedModel

from hasten.core.network import Network

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def copied(module: nn.Module) -> nn.Module:
    """A deep copy in eval mode; of tensors that a layer keeps of its last call, such as a computed weight, their values."""
    kept = [v for part in module.modules() for v in vars(part).values() if isinstance(v, Tensor) and not v.is_leaf]
    return copy.deepcopy(module, {id(v): v.detach().clone() for v in kept}).eval()


def unwrapped(module: nn.Module) -> nn.Module:
    """What a wrapper that changes no output holds: of torch.compile, of data parallel training, of an average of weights."""
    while isinstance(module, _WRAPPERS) or "_orig_mod" in module._modules:  # torch.compile's; importing its class takes seconds
        module = module.module if isinstance(module, _WRAPPERS) else module._orig_mod  # type: ignore[assignment]
    return module


def settled(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """`module` itself, changed: plain weights instead of computed ones, float32 instead of bfloat16; and what to say about it.

    NumPy and ONNX Runtime on a processor know no bfloat16; its values are values of float32.
    """
    notes: tuple[str, ...] = ()
    if computed := _settle_all(module):
        notes = (f"{computed} weights that are computed from others (weight norm, …) are what they come to now",)
    if any(p.dtype is torch.bfloat16 for p in module.parameters()):
        module, notes = module.float(), (*notes, "its bfloat16 weights are taken as float32")
    return module, notes


def with_plain_weights(network: Network) -> tuple[Network, int]:
    """The network with plain weights instead of computed ones, and how many there were."""
    if not any(map(_computes, network.module.modules())):
        return network, 0
    module = copied(network.module)
    return network.with_body(module), _settle_all(module)


def _computes(part: nn.Module) -> bool:
    return parametrize.is_parametrized(part) or bool(_hooks(part))


def _hooks(part: nn.Module) -> list[WeightNorm | SpectralNorm]:
    """Of the older functions `weight_norm` and `spectral_norm`."""
    return [hook for hook in part._forward_pre_hooks.values() if isinstance(hook, WeightNorm | SpectralNorm)]


def _settle_all(module: nn.Module) -> int:
    return sum(_settle(part) + _settle_hooks(part) for part in list(module.modules()))


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
