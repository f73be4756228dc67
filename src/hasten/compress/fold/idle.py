"""Calls that change nothing, or that could have been made beforehand, disappear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from hasten.compress import calls
from hasten.compress.fold.carry import IDLE
from hasten.compress.fold.compose import geometry
from hasten.compress.fold.constant import as_layers, fold_constants
from hasten.compress.layers import lifted
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage
from hasten.load.lower import other_batch, shorter
from hasten.load.plain import with_plain_weights

_ATEN = torch.ops.aten
_VIEWS = frozenset({_ATEN.view, _ATEN.reshape, _ATEN._unsafe_view, _ATEN.flatten, _ATEN.unflatten, _ATEN.squeeze, _ATEN.unsqueeze})
_SIZED = frozenset({_ATEN.view, _ATEN.reshape, _ATEN._unsafe_view})  # their arguments tell the whole shape
_IF_SAME_SHAPE = _VIEWS | {_ATEN.expand, _ATEN.slice, _ATEN.alias, _ATEN.to, _ATEN._to_copy, _ATEN.detach}
_NEUTRAL = {_ATEN.add: 0, _ATEN.sub: 0, _ATEN.mul: 1, _ATEN.div: 1, _ATEN.pow: 1}
_PADS = (_ATEN.constant_pad_nd.default, _ATEN.pad.default)


@dataclass(frozen=True, kw_only=True)
class FoldIdle:
    """Takes out what a trained network need not do at every call:

    - identities: dropout (off in eval mode), `nn.Identity`, reshapes to the same shape, x + 0, x·1, casts to the same format;
    - a reshape of a reshape, which is one;
    - zero padding in front of a convolution, equal on both sides, which the convolution does itself;
    - what depends on no input: computed once, and kept as a weight where it depends on one that trains, else as a buffer (not
      where a weight would then be there twice);
    - parametrizations such as weight norm and spectral norm, whose present weight becomes a plain one.

    The network comes back lifted; whether a shape is the same is judged on two batch sizes. A layer that carries hooks is left alone.

    Args:
        dropout: takes dropout out as well; a later fine-tuning then trains without it.

    Raises:
        Unsupported: where nothing is idle.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.FOLD
    lossless: ClassVar[bool] = True
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed"})
    reads_profile: ClassVar[bool] = False

    dropout: bool = True

    def apply(self, network: Network, context: Context) -> Network:
        """The network without them, lifted, in eval mode."""
        del context
        plain, parametrized = with_plain_weights(network)
        module = lifted(plain)
        found = parametrized + _pads(module) + self._identities(module, network)
        before = len(module.graph.nodes)
        names = fold_constants(module)
        found += before - len(module.graph.nodes) if names else 0
        if not found:
            raise Unsupported("FoldIdle needs a call that changes nothing or depends on no input, found none")
        return network.with_body(calls.finish(as_layers(network, module, names)))

    @classmethod
    def space(cls, network: Network) -> Space:
        """Nothing to vary."""
        del network
        return {}

    def _identities(self, module: fx.GraphModule, network: Network) -> int:
        idle = IDLE if self.dropout else (nn.Identity,)
        found = 0
        seen = _both(module, network)
        for node in list(module.graph.nodes):
            if _merge_views(node):
                found += 1
            if _is_idle(module, node, idle) or _changes_nothing(node, seen):
                calls.bypass(node)
                found += 1
        module.graph.eliminate_dead_code()
        return found


def _both(module: fx.GraphModule, network: Network) -> Sequence[dict[fx.Node, Tensor]]:
    """What passes at two batch sizes, or at the only one, and where other axes are open at two lengths."""
    given = [network.example]
    if not network.fixed_batch:
        given.append(other_batch(network.example))
    if any(network.open_axes):
        given.append(shorter(network))
    return [calls.passing(module, arrays) for arrays in given]


def _packet(node: fx.Node) -> Any:
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else None


def _is_idle(module: fx.GraphModule, node: fx.Node, kinds: tuple[type[nn.Module], ...]) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    layer = module.get_submodule(str(node.target))
    return type(layer) in kinds and not calls.altered(layer)


def _changes_nothing(node: fx.Node, seen: Sequence[dict[fx.Node, Tensor]]) -> bool:
    packet, source = _packet(node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not all(node in at and source in at for at in seen):
        return False
    if not all(_alike(at[node], at[source]) for at in seen) or any(_writes(user) for user in node.users):
        return False
    if packet in _IF_SAME_SHAPE:
        return True
    neutral = packet in _NEUTRAL and len(node.args) == 2 and not node.kwargs and isinstance(node.args[1], (int, float))
    return neutral and bool(node.args[1] == _NEUTRAL[packet])


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _merge_views(node: fx.Node) -> bool:
    """A reshape reads what the reshape before it read."""
    inner = node.args[0] if node.args else None
    if _packet(node) not in _SIZED or not isinstance(inner, fx.Node) or _packet(inner) not in _VIEWS or len(inner.users) > 1:
        return False
    node.target = _ATEN.reshape.default
    node.update_arg(0, inner.args[0])
    return True


def _pads(module: fx.GraphModule) -> int:
    """Zero padding becomes a setting of the convolution behind it."""
    found = 0
    for name, node in calls.own_layers(module).items():
        pad = node.args[0]
        layer: Any = module.get_submodule(name)
        if not isinstance(pad, fx.Node) or type(layer) not in calls.CONVOLUTIONS or len(pad.users) > 1:
            continue
        more, seen = _padding(pad, layer.weight.dim() - 2), geometry(layer)
        if more is None or seen is None or (any(seen.padding) and not seen.zeros):
            continue
        settings = seen.settings | {"padding": tuple(a + b for a, b in zip(seen.padding, more, strict=True))}
        calls.replace(module, node, [calls.convolution(layer.weight, layer.bias, like=layer, groups=layer.groups, **settings)])
        calls.bypass(pad)
        found += 1
    return found


def _padding(node: fx.Node, axes: int) -> tuple[int, ...] | None:
    """Zeros added on either side of each of the last `axes` axes; None where `node` is another call, or its sides differ."""
    if node.target not in _PADS or node.kwargs:
        return None
    widths: Any = node.args[1]
    mode = node.args[2] if node.target is _PADS[1] and len(node.args) > 2 else "constant"
    value = node.args[3 if node.target is _PADS[1] else 2 :]
    sides = list(zip(widths[::2], widths[1::2], strict=True))
    plain = all(isinstance(w, int) and w >= 0 for w in widths) and all(a == b for a, b in sides) and len(sides) <= axes
    if mode != "constant" or value not in ((), (0,), (None,)) or not plain:
        return None
    return (0,) * (axes - len(sides)) + tuple(a for a, _ in reversed(sides))
