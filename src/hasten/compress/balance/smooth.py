"""SmoothQuant: outliers of activations move into the weights that read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from hasten.compress import layers
from hasten.compress.balance.chains import incoming, pairs, scale_input, scale_output, unshared
from hasten.core.errors import DataRefused, Unsupported
from hasten.core.names import meets
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage

_BATCH, _BATCHES = 8, 40
_LEAST = 1e-5  # a channel that is never larger, or that no weight reads, stays


@dataclass(frozen=True, kw_only=True)
class Smooth:
    """Divides the inputs of linear layers by a factor per channel, in the norm, scale or linear layer before, and multiplies their weights.

    s_j = max |X_j|^α / max |W_j|^(1−α), X_j channel j of the inputs on the calibrate view, W_j the weights that read it, of all linear
    layers behind one norm together. The function stays. A scale is a weight that a product multiplies each channel with, as at the end
    of an RMS norm that is written out. A norm or scale with any other reader (a shortcut, say) is left alone; between two linear layers
    may lie what `Equalize` allows. The result is in the lifted form.

    Args:
        alpha: share of the outliers' size that moves into the weights, in [0, 1]: 0 leaves it all to the weights' own range, 1 makes all
            channels of the inputs equally large.
        only: patterns of layer names; a group counts where all its linear layers are meant. All where it is empty.
        keep: patterns of layer names to leave alone.

    Raises:
        ValueError: where alpha lies outside its range.

    Reference:
        Guangxuan Xiao, Ji Lin, Mickael Seznec, Hao Wu, Julien Demouth, Song Han, "SmoothQuant: Accurate and Efficient Post-Training
        Quantization for Large Language Models", 2022, arXiv 2211.10438.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.BALANCE
    lossless: ClassVar[bool] = True
    aims: ClassVar[frozenset[Aim]] = frozenset({"score"})
    reads_profile: ClassVar[bool] = False

    alpha: float = 0.5
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        layers.patterns("only", self.only)
        layers.patterns("keep", self.keep)

    def apply(self, network: Network, context: Context) -> Network:
        """The network with smooth activations.

        Raises:
            Unsupported: where no norm, scale or linear layer is read by linear layers alone, where activations are not finite, or
                torch.export cannot follow the module.
            UsageError: where a pattern meets no layer.
            DataRefused: on too few calibration examples for one batch.
        """
        made = layers.lifted(network)
        readable = set(layers.named(made, (nn.Linear,), only=self.only, keep=self.keep))
        found = {s: readers for s, readers in _groups(made, network).items() if set(readers) <= readable}
        groups = {s: readers for s, readers in found.items() if not meets(s, self.keep) and not meets(s.rpartition(".")[0], self.keep)}
        if not groups:
            raise Unsupported("Smooth needs a norm, scale or linear layer that only linear layers read, found none")
        largest = _largest(made, [readers[0] for readers in groups.values()], network, context)
        for source, readers in groups.items():
            _smooth(made, source, readers, largest[readers[0]], self.alpha)
        return network.with_body(made)

    @classmethod
    def space(cls, network: Network) -> Space:
        """How much moves. Raises Unsupported on a network without linear layers."""
        if not any(type(m) is nn.Linear for m in network.module.modules()):
            raise Unsupported("Smooth needs a network with linear layers, found none")
        return {"alpha": (0.5, 0.75, 0.25)}


def _groups(module: fx.GraphModule, network: Network) -> dict[str, tuple[str, ...]]:
    """For each norm, scale (by its path) or linear layer that can give a factor away, the linear layers that read it."""
    free, found = unshared(module), dict[str, tuple[str, ...]]()
    for node in module.graph.nodes:
        source = _scale(module, node) if node.op != "call_module" else _norm(module, node) if str(node.target) in free else ""
        readers = [str(u.target) if u.op == "call_module" else "" for u in node.users]
        if source and readers and all(r in free and type(module.get_submodule(r)) is nn.Linear for r in readers):
            found[source] = tuple(readers)
    for pair in pairs(module, network.example):
        if type(module.get_submodule(pair.first)) is type(module.get_submodule(pair.second)) is nn.Linear:
            found[pair.first] = (pair.second,)
    return found


def _norm(module: fx.GraphModule, node: fx.Node) -> str:
    """The name of a norm over one axis."""
    layer: Any = module.get_submodule(str(node.target))
    return str(node.target) if type(layer) in (nn.LayerNorm, nn.RMSNorm) and len(layer.normalized_shape) == 1 else ""


def _scale(module: fx.GraphModule, node: fx.Node) -> str:
    """The path of a weight, one number for each channel, that a product multiplies with and nothing else reads."""
    if node.target is not torch.ops.aten.mul.Tensor:
        return ""
    held = Counter(id(p) for layer in module.modules() for p in layer.parameters(recurse=False))
    called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    for given in node.all_input_nodes:
        weight = attrgetter(str(given.target))(module) if given.op == "get_attr" else None
        alone = held[id(weight)] == len(given.users) == 1 and str(given.target).rpartition(".")[0] not in called
        if isinstance(weight, nn.Parameter) and weight.dim() == 1 and len(weight) > 1 and alone:
            return str(given.target)
    return ""


def _largest(module: fx.GraphModule, names: Sequence[str], network: Network, context: Context) -> Mapping[str, Tensor]:
    """max |X_j| of the inputs of these layers on the calibrate view."""
    view, batch = context.calibrate, network.fixed_batch or _BATCH
    if len(view) < (network.fixed_batch or 1):
        raise DataRefused(f"calibration needs at least {network.fixed_batch or 1} examples, got {len(view)}")
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del layer
            most = inputs[0].detach().abs().flatten(0, -2).amax(0).double()
            seen[name] = torch.maximum(seen[name], most) if name in seen else most

        return note

    hooks = [module.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    whole = len(view) // batch * batch if network.fixed_batch else len(view)
    pieces = list(view.take(slice(0, min(whole, _BATCHES * batch))).batches(batch))
    try:
        with torch.no_grad():
            for done, piece in enumerate(pieces):
                module(*(torch.from_numpy(np.ascontiguousarray(a)) for a in piece.inputs))
                context.progress((done + 1) / len(pieces), "calibrating")
    finally:
        for hook in hooks:
            hook.remove()
    for name, most in seen.items():
        if not bool(torch.isfinite(most).all()):
            raise Unsupported(f"expected finite activations, but the inputs of {name!r} are not on the calibration data")
    return seen


def _smooth(module: fx.GraphModule, source: str, readers: Sequence[str], largest: Tensor, alpha: float) -> None:
    reading = [module.get_submodule(name) for name in readers]
    weights = torch.stack([incoming(layer, 1) for layer in reading]).amax(0)
    alive = (largest > _LEAST) & (weights > _LEAST)
    factor = torch.where(alive, largest.where(alive, 1.0) ** alpha / weights.where(alive, 1.0) ** (1 - alpha), 1.0)
    if isinstance(scale := attrgetter(source)(module), nn.Parameter):
        with torch.no_grad():
            scale.copy_(scale.double() / factor)
    else:
        scale_output(scale, 1 / factor)
    for layer in reading:
        scale_input(layer, factor, 1)
