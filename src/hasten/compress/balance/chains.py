"""Which layers of a lifted network can hand a factor per channel to one another.

Between a layer and the next lie only operators f with f(s·x) = s·f(x) for s > 0 that keep channels apart: ReLU, LeakyReLU, PReLU,
dropout, pooling, flattening. Weights that another layer or another call uses too are left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from hasten.core.network import Arrays

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
_ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_POOLS = tuple(f"aten.{kind}{axes}d" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool") for axes in (1, 2, 3))
_FLATTENS = ("aten.flatten", "aten.view", "aten.reshape", "aten._unsafe_view")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two layers by name; input `i` of the second is channel `i // block` of the first."""

    first: str
    second: str
    block: int


def pairs(module: fx.GraphModule, example: Arrays) -> list[Pair]:
    """The pairs in the order of the graph."""
    shapes = seen_shapes(module, example)
    free = unshared(module)
    found = []
    for node in module.graph.nodes:
        if node.op == "call_module" and str(node.target) in free and type(module.get_submodule(str(node.target))) in LAYERS:
            pair = _follow(module, node, shapes, free)
            if pair is not None:
                found.append(pair)
    return found


def seen_shapes(module: fx.GraphModule, example: Arrays) -> dict[fx.Node, tuple[int, ...]]:
    """The shapes of all tensors in a run on the example."""
    seen: dict[fx.Node, tuple[int, ...]] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            made = super().run_node(n)
            if isinstance(made, Tensor):
                seen[n] = tuple(made.shape)
            return made

    with torch.no_grad():
        Watching(module).run(*(torch.from_numpy(np.ascontiguousarray(a)) for a in example))
    return seen


def unshared(module: fx.GraphModule) -> set[str]:
    """Names of the layers that are called once and whose weights nothing else holds or reads."""
    calls = Counter(str(n.target) for n in module.graph.nodes if n.op == "call_module")
    read = {str(n.target).rpartition(".")[0] for n in module.graph.nodes if n.op == "get_attr"}
    named = [(name, layer) for name, layer in module.named_modules(remove_duplicate=False) if name in calls]
    holders = Counter(id(p) for layer in module.modules() for p in layer.parameters(recurse=False))
    free = {name for name, layer in named if all(holders[id(p)] == 1 for p in layer.parameters(recurse=False))}
    return {name for name in free if calls[name] == 1} - read


def _follow(module: fx.GraphModule, node: fx.Node, shapes: dict[fx.Node, tuple[int, ...]], free: set[str]) -> Pair | None:
    """From a layer through what passes a factor on to the next layer."""
    first, here = str(node.target), node
    spatial = not isinstance(module.get_submodule(first), nn.Linear)
    block = 1
    while len(here.users) == 1:
        after = next(iter(here.users))
        if after.op == "call_module" and str(after.target) in free:
            layer = module.get_submodule(str(after.target))
            if type(layer) in LAYERS:
                fits = isinstance(layer, nn.Linear) != spatial
                return Pair(first=first, second=str(after.target), block=block) if fits else None
        if not _passes(module, after, here):
            widened = _flattened(after, here, shapes) if spatial else 0
            if not widened and not (spatial and _pools(after, here, shapes)):
                return None
            if widened or len(shapes.get(after, ())) == 2:
                spatial = False
                block = widened or 1
        here = after
    return None


def _passes(module: fx.GraphModule, node: fx.Node, source: fx.Node) -> bool:
    if node.all_input_nodes != [source]:
        return False
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) in _ELEMENTWISE
    return _name(node) in ("aten.relu", "aten.clone", "aten.contiguous")


def _pools(node: fx.Node, source: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]) -> bool:
    """Pooling over positions: the channels stay where they are."""
    if node.op != "call_function" or node.args[0] is not source:
        return False
    if _name(node) == "aten.mean":
        axes = node.args[1] if len(node.args) > 1 else None
        before = len(shapes[source])
        return isinstance(axes, (list, tuple)) and all(isinstance(a, int) and a % before > 1 for a in axes)
    return _name(node) in _POOLS and len(shapes[source]) == len(shapes[node])


def _flattened(node: fx.Node, source: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]) -> int:
    """Positions of a channel that lie side by side in (batch, channels · positions); 0 where the node does not make that."""
    if node.op != "call_function" or _name(node) not in _FLATTENS or node.args[0] is not source:
        return 0
    before, after = shapes[source], shapes[node]
    if len(after) != 2 or after[0] != before[0] or after[1] != int(np.prod(before[1:])):
        return 0
    return after[1] // before[1]


def _name(node: fx.Node) -> str:
    return str(node.target.overloadpacket) if isinstance(node.target, torch._ops.OpOverload) else ""


def outgoing(layer: nn.Module) -> Tensor:
    """max |weight| of each output channel, in 64 bits."""
    return _by_output(layer).abs().flatten(1).amax(1)


def incoming(layer: nn.Module, block: int) -> Tensor:
    """max |weight| that reads each channel of the layer before, in 64 bits."""
    return _by_input(layer).abs().flatten(1).amax(1).view(-1, block).amax(1)


@torch.no_grad()
def scale_output(layer: Any, factor: Tensor) -> None:
    """Multiplies each output channel."""
    groups = layer.groups if isinstance(layer, TRANSPOSED) else 1
    spread = factor.view(groups, 1, -1, *[1] * (layer.weight.dim() - 2)) if isinstance(layer, TRANSPOSED) else None
    weight = layer.weight.double()
    if spread is None:
        scaled = weight * factor.view(-1, *[1] * (weight.dim() - 1))
    else:
        scaled = (weight.unflatten(0, (groups, -1)) * spread).flatten(0, 1)
    layer.weight.copy_(scaled)
    if getattr(layer, "bias", None) is not None:
        layer.bias.copy_(layer.bias.double() * factor)


@torch.no_grad()
def scale_input(layer: Any, factor: Tensor, block: int) -> None:
    """Multiplies the weights that read each channel of the layer before."""
    factor = factor.repeat_interleave(block)
    weight = layer.weight.double()
    rest = [1] * (weight.dim() - 2)
    if isinstance(layer, TRANSPOSED):
        scaled = weight * factor.view(-1, 1, *rest)
    else:
        groups = getattr(layer, "groups", 1)
        scaled = (weight.unflatten(0, (groups, -1)) * factor.view(groups, 1, -1, *rest)).flatten(0, 1)
    layer.weight.copy_(scaled)


def _by_output(layer: Any) -> Tensor:
    """(outputs, …)"""
    weight: Tensor = layer.weight.detach().double()
    return _sides_swapped(weight, layer.groups) if isinstance(layer, TRANSPOSED) else weight


def _by_input(layer: Any) -> Tensor:
    """The weights that read each input, (inputs, …)."""
    weight: Tensor = layer.weight.detach().double()
    return weight if isinstance(layer, TRANSPOSED) else _sides_swapped(weight, getattr(layer, "groups", 1))


def _sides_swapped(weight: Tensor, groups: int) -> Tensor:
    """(groups · a, b, …) → (groups · b, a, …)"""
    a, b, *rest = weight.shape
    return weight.reshape(groups, a // groups, b, *rest).transpose(1, 2).reshape(groups * b, a // groups, *rest)
