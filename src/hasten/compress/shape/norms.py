"""Batch norms behind layers that have none.

Shapes: outputs of a layer (batch, channels, …).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from hasten.compress import layers
from hasten.compress.passes import batches
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage

_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.BatchNorm1d,
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d), nn.BatchNorm1d),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), nn.BatchNorm2d),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d), nn.BatchNorm3d),
}
_NORMED = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@dataclass(frozen=True, kw_only=True)
class InsertNorm:
    """Puts a batch norm behind convolutions and linear layers that have none, so that the network trains better.

    y = γ·(x − μ)/√(σ² + ε) + β with μ and σ² the mean and variance of the layer's outputs on the calibrate view, γ = √(σ² + ε) and
    β = μ: at first y = x. It brings nothing by itself: fine-tuning should follow, and engines fold the norm away
    afterwards. Works on the lifted form. Left alone are layers whose output is normalised already, is an output of the
    network, or has a batch axis only in front of others (a linear layer on sequences), and layers that are called more than once.

    Args:
        only: names or patterns of the layers; empty for all.
        keep: names or patterns of layers to leave alone.

    Reference:
        S. Ioffe, C. Szegedy, "Batch Normalization", 2015, arXiv:1502.03167.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    lossless: ClassVar[bool] = True
    aims: ClassVar[frozenset[Aim]] = frozenset({"score"})
    reads_profile: ClassVar[bool] = False

    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("only", "keep"):
            layers.patterns(name, getattr(self, name))

    def apply(self, network: Network, context: Context) -> Network:
        """The network in its lifted form with norms.

        Raises:
            Unsupported: where no layer is left to normalise, where outputs are not finite, and where the network cannot be exported.
            UsageError: where `only` or `keep` meets no layer.
            DataRefused: on too few calibration examples for one batch.
        """
        module = layers.lifted(network)
        calls = _calls(module, self.only, self.keep)
        seen = _moments(module, list(calls), network, context)
        found = {name: calls[name] for name, moments in seen.items() if moments.axes == module.get_submodule(name).weight.dim()}  # type: ignore[operator]
        if not found:
            raise Unsupported("InsertNorm needs a convolution or linear layer without a norm behind it, found none")
        for name, node in found.items():
            _insert(module, node, _free(module, f"{name}_norm"), seen[name].norm(name, module.get_submodule(name)))
        module.graph.lint()
        module.recompile()
        return network.with_body(module)

    @classmethod
    def space(cls, network: Network) -> Space:
        """Nothing to vary. Raises Unsupported on a network without such layers."""
        if not _calls(layers.lifted(network), (), ()):
            raise Unsupported("InsertNorm needs a convolution or linear layer without a norm behind it, found none")
        return {}


def _calls(module: fx.GraphModule, only: tuple[str, ...], keep: tuple[str, ...]) -> dict[str, fx.Node]:
    """The calls of layers that may get a norm, by the layer's name."""
    known = layers.named(module, tuple(_NORMS), only=only, keep=keep)
    uses = Counter(n.target for n in module.graph.nodes if n.op == "call_module")
    calls = {str(n.target): n for n in module.graph.nodes if n.op == "call_module" and n.target in known and uses[n.target] == 1}
    return {name: node for name, node in calls.items() if not any(_normed(module, user) for user in node.users)}


def _normed(module: fx.GraphModule, user: fx.Node) -> bool:
    """Whether a reader normalises what it reads, or is the network's output."""
    return user.op == "output" or (user.op == "call_module" and isinstance(module.get_submodule(str(user.target)), _NORMED))


class _Moments:
    """A hook that adds up the outputs of a layer, channel by channel, and their squares."""

    def __init__(self) -> None:
        self.axes, self.count = 0, 0
        self.sums: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def __call__(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        del layer, inputs
        x = output.detach().double().movedim(1, 0).flatten(1)  # (channels, batch × places)
        self.axes = output.dim()
        self.count += x.shape[1]
        self.sums = self.sums + x.sum(1)
        self.squares = self.squares + x.square().sum(1)

    def norm(self, name: str, layer: nn.Module) -> nn.Module:
        """A norm that changes nothing as long as the statistics hold."""
        mean = torch.as_tensor(self.sums) / self.count
        variance = (torch.as_tensor(self.squares) / self.count - mean.square()).clamp_min(0)
        if not (mean.isfinite().all() and variance.isfinite().all()):
            raise Unsupported(f"InsertNorm needs finite outputs, those of {name!r} are not; name it in keep")
        made: Any = _NORMS[type(layer)](len(mean)).to(layer.weight)  # type: ignore[arg-type]
        with torch.no_grad():
            made.running_mean.copy_(mean)
            made.running_var.copy_(variance)
            made.weight.copy_((variance + made.eps).sqrt())
            made.bias.copy_(mean)
        norm: nn.Module = made.eval()
        return norm


@torch.no_grad()
def _moments(module: fx.GraphModule, names: list[str], network: Network, context: Context) -> dict[str, _Moments]:
    found = {name: _Moments() for name in names}
    hooks = [module.get_submodule(name).register_forward_hook(moments) for name, moments in found.items()]
    try:
        for example in batches(context.calibrate, fixed_batch=network.fixed_batch):
            module(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _insert(module: fx.GraphModule, node: fx.Node, name: str, norm: nn.Module) -> None:
    module.add_submodule(name, norm)
    with module.graph.inserting_after(node):
        call = module.graph.call_module(name, (node,))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)


def _free(module: fx.GraphModule, name: str) -> str:
    """`name`, or the next that no part of the module has."""
    taken = {n for n, _ in module.named_modules()} | {n for n, _ in module.named_parameters()} | {n for n, _ in module.named_buffers()}
    return next(free for i in range(len(taken) + 1) if (free := f"{name}_{i}" if i else name) not in taken)
