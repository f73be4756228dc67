"""The standardization of the inputs goes into the first layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from hasten.compress import calls
from hasten.compress.fold.compose import after_affine, takes_shift
from hasten.compress.fold.constant import constants
from hasten.compress.layers import lifted
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage

_ATEN = torch.ops.aten
_LAYERS = (nn.Linear, *calls.CONVOLUTIONS)
_STEPS = (_ATEN.sub.Tensor, _ATEN.add.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor)
_CASTS = frozenset({_ATEN.to, _ATEN._to_copy})


@dataclass(frozen=True, kw_only=True)
class FoldInput:
    """Folds (x − mean)/std on an input into the first linear layer or convolution.

    What the network itself does to an input with constants (x − c, x + c, x·c, x/c, in any order, up to the first layer, through
    flattening too) is one scale and one shift per channel or feature, s·x + t, and the layer takes them: W' = W·s,
    b' = b + Σ W·t, in 64 bits. A convolution that pads with zeros pads the standardized values, so the shift cannot go into its
    bias; there the scale folds and one addition, x + t/s, stays. The network comes back lifted.

    Args:
        mean, std: where given, the standardization that was done outside until now, one number per channel or feature (or one for
            all); std above 0. The new network takes raw values, and so does its example. This changes what the data must be:
            in a search, whose data stay as they are, leave both empty.

    Raises:
        Unsupported: where no input is standardized by constants in front of a linear layer or a convolution, where nothing but a shift
            in front of zero padding is left, or where mean and std are given for a network of several inputs.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.FOLD
    lossless: ClassVar[bool] = True
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed"})
    reads_profile: ClassVar[bool] = False

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not all(np.isfinite(self.mean)) or not all(np.isfinite(self.std)) or not all(s > 0 for s in self.std):
            raise ValueError(f"mean must be finite and std finite and above 0, got {self.mean} and {self.std}")
        if len(self.mean) > 1 and len(self.std) > 1 and len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have the same length, got {len(self.mean)} and {len(self.std)}")

    def apply(self, network: Network, context: Context) -> Network:
        """The network whose first layer standardizes, lifted, in eval mode."""
        del context
        module = lifted(network)
        if self.mean or self.std:
            network = self._raw(module, network)
        passing = calls.passing(module, network.example)
        shapes = {n: tuple(t.shape) for n, t in passing.items() if t.is_floating_point()}
        values = constants(module)
        reasons = [_fold(module, chain, shapes) for chain in _chains(module, values, shapes)]
        if all(reasons):
            found = next(iter(reasons), None) or "found none"
            raise Unsupported(f"FoldInput needs an input that constants scale or shift before the first layer: {found}")
        return network.with_body(calls.finish(module))

    @classmethod
    def space(cls, network: Network) -> Space:
        """Nothing to vary."""
        del network
        return {}

    def _raw(self, module: fx.GraphModule, network: Network) -> Network:
        """Puts the standardization into the graph; gives the network with a raw example."""
        entries = [n for n in module.graph.nodes if n.op == "placeholder"]
        if len(entries) != 1 or network.example[0].dtype.kind != "f" or network.example[0].ndim < 2:
            kinds = ", ".join(str(a.dtype) for a in network.example)
            raise Unsupported(f"mean and std need a network of one input of floats with channels, got {len(entries)} of {kinds}")
        (x,) = network.example
        mean, std = (self._shaped(name, x) for name in ("mean", "std"))
        node = entries[0]
        after = list(node.users)
        value: fx.Node = node
        for base, target, array in (("input_mean", _ATEN.sub.Tensor, mean), ("input_std", _ATEN.div.Tensor, std)):
            name = calls.free_name(module, base)
            module.register_buffer(name, torch.from_numpy(array))
            with module.graph.inserting_after(value):
                constant = module.graph.get_attr(name)
            with module.graph.inserting_after(constant):
                value = module.graph.call_function(target, (value, constant))
        for user in after:
            user.replace_input_with(node, value)
        return replace(network, example=(np.asarray(x * std + mean, x.dtype),))

    def _shaped(self, name: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        given = getattr(self, name) or ((0.0,) if name == "mean" else (1.0,))
        if len(given) not in (1, x.shape[1]):
            raise Unsupported(f"{name} must have 1 or {x.shape[1]} numbers, one per channel of the input, got {len(given)}")
        return np.asarray(given, x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))


@dataclass(frozen=True, kw_only=True)
class _Chain:
    """Calls between an input and a layer: layer(scale·source + shift), both as large as one row of the source."""

    source: fx.Node
    nodes: list[fx.Node]
    layer: fx.Node | None
    scale: Tensor
    shift: Tensor


def _chains(module: fx.GraphModule, values: dict[fx.Node, Any], shapes: calls.Shapes) -> Iterator[_Chain]:
    own = calls.own_layers(module)
    entries = [n for n in module.graph.nodes if n.op == "placeholder"]
    entries += [n for n in module.graph.nodes if _is_cast(n) and n.args[0] in entries]
    for source in [n for n in entries if n in shapes]:
        for first in [n for n in source.users if _constant(n, values) is not None]:
            chain = _chain(source, first, values, shapes)
            if any(chain.layer is call and type(module.get_submodule(name)) in _LAYERS for name, call in own.items()):
                yield chain


def _is_cast(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in _CASTS


def _constant(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The number or tensor that `node` adds, subtracts, multiplies or divides its first argument by; None for another call."""
    if node.target not in _STEPS or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if node.target in (_ATEN.add.Tensor, _ATEN.mul.Tensor) and left in values:
        left, right = right, left
    if not isinstance(left, fx.Node) or left in values:
        return None
    return values.get(right) if isinstance(right, fx.Node) else right


def _chain(source: fx.Node, first: fx.Node, values: dict[fx.Node, Any], shapes: calls.Shapes) -> _Chain:
    """Follows the calls with one reader each to the first that is no step."""
    row = (1, *shapes[source][1:])
    scale, shift = torch.ones(row, dtype=torch.float64), torch.zeros(row, dtype=torch.float64)
    nodes: list[fx.Node] = []
    node: fx.Node | None = first
    while node is not None:
        constant = _constant(node, values)
        flat = node.target is _ATEN.flatten.using_ints and node.args[1:] in ((1,), (1, -1))
        if flat:
            scale, shift = scale.flatten(1), shift.flatten(1)
        elif constant is None or shapes.get(node, ())[1:] != tuple(scale.shape[1:]):
            break
        else:
            step = torch.as_tensor(constant).double()
            if step.dim() == scale.dim() and step.shape[0] != 1:
                break
            scale, shift = _stepped(node.target, scale, shift, step)
        nodes.append(node)
        node = calls.reader(node)
    return _Chain(source=source, nodes=nodes, layer=node, scale=scale, shift=shift)


def _stepped(target: Any, scale: Tensor, shift: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    if target is _ATEN.add.Tensor:
        return scale, shift + step
    if target is _ATEN.sub.Tensor:
        return scale, shift - step
    return (scale * step, shift * step) if target is _ATEN.mul.Tensor else (scale / step, shift / step)


def _fold(module: fx.GraphModule, chain: _Chain, shapes: calls.Shapes) -> str | None:
    """Folds a chain into its layer; the reason why not, where it cannot."""
    call = chain.layer
    assert call is not None
    name = str(call.target)
    layer: Any = module.get_submodule(name)
    scale, shift = _per_input(layer, chain.scale), _per_input(layer, chain.shift)
    if scale is None or shift is None:
        return f"the constants in front of {name} differ inside a channel"
    whole = takes_shift(layer) or not bool(shift.any())
    if whole:
        made, value = after_affine(layer, scale, shift), _without(module, chain)
    elif bool((scale == 1).all()) or not bool(scale.all()):
        return f"{name} pads with zeros, so a shift in front of it cannot go into its bias"
    else:
        made, value = after_affine(layer, scale, torch.zeros_like(shift)), _without(module, chain)
        value = _add(module, call, value, shift / scale, shapes)
    call.update_arg(0, value)
    module.set_submodule(name, made)
    return None


def _per_input(layer: Any, values: Tensor) -> Tensor | None:
    """One number per input channel or feature; None where they differ inside one."""
    rows = values.reshape(-1, values.shape[-1]) if type(layer) is nn.Linear else values.flatten(2)[0].T  # (places, channels)
    return rows[0].clone() if bool((rows == rows[0]).all()) else None


def _without(module: fx.GraphModule, chain: _Chain) -> fx.Node:
    """The source, flattened where the chain flattened it."""
    value = chain.source
    for node in [n for n in chain.nodes if n.target is _ATEN.flatten.using_ints]:
        with module.graph.inserting_before(chain.nodes[-1]):
            value = module.graph.call_function(_ATEN.flatten.using_ints, (value, *node.args[1:]))
    return value


def _add(module: fx.GraphModule, layer: fx.Node, value: fx.Node, shift: Tensor, shapes: calls.Shapes) -> fx.Node:
    axes = len(shapes[layer]) - 2
    weight: Any = module.get_submodule(str(layer.target)).weight
    name = calls.free_name(module, f"{str(layer.target).replace('.', '_')}_shift")
    module.register_buffer(name, shift.to(weight.dtype).view(1, -1, *[1] * axes))
    with module.graph.inserting_before(layer):
        return module.graph.call_function(_ATEN.add.Tensor, (value, module.graph.get_attr(name)))
