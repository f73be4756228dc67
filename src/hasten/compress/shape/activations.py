"""Dear activations become cheap ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from hasten.compress import layers
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage

KINDS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
_MAKE: dict[str, Callable[[], Any]] = {**KINDS}


@dataclass(frozen=True, kw_only=True)
class ReplaceActivation:
    """Puts a cheap activation in the place of dearer ones: GELU, SiLU, Mish, Hardswish, … → max(x, 0) or the like.

    Works on the lifted form, so calls such as `F.gelu` are found too. An engine folds ReLU into the layer before it; x·σ(x) and
    its like are passes of their own. The outputs change, by much with "relu": fine-tuning should follow.

    Args:
        to: what comes: one of the names below.
        of: what goes: names among elu, gelu, hardsigmoid, hardswish, hardtanh, leaky_relu, mish, relu, relu6, sigmoid, silu, softplus,
            tanh. An activation that is `to` already stays. Gates (sigmoid, tanh) keep their range only with hardsigmoid or hardtanh.
        only: names or patterns of the activations to replace, as the lifted form names them; empty for all.
        keep: names or patterns of activations to leave alone.

    Raises:
        ValueError: on an activation that is not known, or one that would be replaced by itself alone.

    References:
        A. Howard et al., "Searching for MobileNetV3", 2019, arXiv:1905.02244 (hardswish in the place of x·σ(x)).
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed"})
    reads_profile: ClassVar[bool] = False

    to: str = "relu"
    of: tuple[str, ...] = ("gelu", "silu", "mish", "elu", "softplus", "hardswish")
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("of", "only", "keep"):
            layers.patterns(name, getattr(self, name))
        for kind in (self.to, *self.of):
            if kind not in KINDS:
                raise ValueError(f"activations must be among {', '.join(KINDS)}, got {kind!r}")
        if not set(self.of) - {self.to}:
            raise ValueError(f"of must name an activation other than {self.to!r}, got {self.of}")

    def apply(self, network: Network, context: Context) -> Network:
        """The network in its lifted form with other activations.

        Raises:
            Unsupported: where it has no such activation, or cannot be exported.
            UsageError: where `only` or `keep` meets no layer.
        """
        del context
        module = layers.lifted(network)
        kinds = tuple(KINDS[name] for name in self.of if name != self.to)
        if not (found := layers.named(module, kinds, only=self.only, keep=self.keep)):
            raise Unsupported(f"ReplaceActivation needs one of {', '.join(self.of)}, found none")
        for name in found:
            module.set_submodule(name, _MAKE[self.to]().eval())
        return network.with_body(module)

    @classmethod
    def space(cls, network: Network) -> Space:
        """What comes. Raises Unsupported where nothing would go."""
        step = cls()
        if not layers.named(layers.lifted(network), tuple(KINDS[name] for name in step.of)):
            raise Unsupported(f"ReplaceActivation needs one of {', '.join(step.of)}, found none")
        return {"to": ("relu", "hardswish")}
