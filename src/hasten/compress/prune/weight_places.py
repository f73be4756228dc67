"""Where a network multiplies by weights of its own: the tensors that single weights are pruned or shared in.

Shapes: weights (out, in / groups, …), recurrent ones (gates · hidden, in); transposed convolutions (in, out / groups, …); matrices
that calls multiply by (in, out) or (out, in).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from hasten.compress.layers import is_lifted, lifted, own_copy
from hasten.core.errors import Unsupported
from hasten.core.names import check_met, meets
from hasten.core.network import Network

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
ATTENTION_OUT = nn.modules.linear.NonDynamicallyQuantizableLinear
LAYERS = (nn.Linear, ATTENTION_OUT, *CONVS, *TRANSPOSED, *RECURRENT, nn.MultiheadAttention)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_ATEN = torch.ops.aten
# Calls that multiply by a matrix: its place among their arguments, and the axis of it that runs over the inputs.
_PRODUCTS = {
    _ATEN.addmm.default: (2, 0),
    _ATEN.mm.default: (1, 0),
    _ATEN.matmul.default: (1, 0),
    _ATEN.linear.default: (1, 1),
}
_TURNS = (_ATEN.t.default, _ATEN.transpose.int, _ATEN.numpy_T.default, _ATEN.permute.default)


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """One weight of a layer: where it is, and the axis that runs over the layer's inputs."""

    layer: nn.Module
    layer_name: str
    attribute: str
    inputs_axis: int

    @property
    def value(self) -> Tensor:
        """The parameter itself."""
        return getattr(self.layer, self.attribute)  # type: ignore[no-any-return]


Found = dict[str, Weight]


def reachable(network: Network, *, only: tuple[str, ...] = (), keep: tuple[str, ...] = ()) -> tuple[nn.Module, Found]:
    """An own copy of the module, and its weights that can be worked on one by one.

    Where code of the user's own holds weights, the copy is in lifted form, if torch.export can follow the network and shows more weights
    that way: there they are layers, or matrices that a call multiplies by. The patterns speak of the names in the module as given.

    Raises:
        UsageError: where a pattern meets no layer; it names the nearest.
    """
    module = own_copy(network)
    names = [name for name, _ in module.named_modules() if name]
    check_met((*only, *keep), names)
    found = _wanted(weights(module), names, only, keep)
    if is_lifted(module) or not _hides(module):
        return module, found
    try:
        other = lifted(network)
    except Unsupported:
        return module, found
    more = _wanted(weights(other), names, only, keep)
    return (other, more) if _size(more) > _size(found) else (module, found)


def weights(module: nn.Module) -> Found:
    """The weights of linear, convolutional, recurrent and attention layers by name, each once; in lifted form also the matrices that
    calls multiply by.

    A class of the user's own counts as the layer that it is made from, where it computes what that one does. Left out are weights that
    an embedding shares, and those that are computed from others (weight norm, parametrizations).
    """
    taken = {id(p) for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in m.parameters()}
    found: Found = {}
    for weight in (*_of_layers(module), *_of_calls(module)):
        value = weight.layer._parameters.get(weight.attribute)
        if value is not None and id(value) not in taken:
            taken.add(id(value))
            found[f"{weight.layer_name}.{weight.attribute}" if weight.layer_name else weight.attribute] = weight
    return found


def again(found: Found, module: nn.Module) -> Found:
    """The same weights in a copy of their module."""
    return {name: replace(w, layer=module.get_submodule(w.layer_name)) for name, w in found.items()}


def each(found: Found) -> Iterator[Tensor]:
    """The parameters themselves."""
    return (w.value for w in found.values())


def _of_layers(module: nn.Module) -> Iterator[Weight]:
    for name, layer in module.named_modules():
        if _plain(layer):
            axis = 0 if isinstance(layer, TRANSPOSED) else 1
            for attribute in _attributes(layer):
                yield Weight(layer=layer, layer_name=name, attribute=attribute, inputs_axis=axis)


def _of_calls(module: nn.Module) -> Iterator[Weight]:
    if not isinstance(module, fx.GraphModule):
        return
    for node in module.graph.nodes:
        if node.target not in _PRODUCTS:
            continue
        place, axis = _PRODUCTS[node.target]
        matrix, turned = node.args[place], 0
        while isinstance(matrix, fx.Node) and matrix.target in _TURNS:
            matrix, turned = matrix.args[0], 1 - turned
        if isinstance(matrix, fx.Node) and matrix.op == "get_attr":
            holder, _, attribute = str(matrix.target).rpartition(".")
            weight = Weight(layer=module.get_submodule(holder), layer_name=holder, attribute=attribute, inputs_axis=axis ^ turned)
            if weight.value.ndim == 2:
                yield weight


def _plain(layer: nn.Module) -> bool:
    """Whether the layer computes what the class of torch does, with weights that are its own."""
    if parametrize.is_parametrized(layer):
        return False
    kind = type(layer)
    base = next((b for b in (kind, *kind.__mro__) if b in LAYERS), None)
    return base is not None and all(getattr(kind, f, None) is getattr(base, f, None) for f in ("forward", "_conv_forward"))


def _attributes(layer: nn.Module) -> Sequence[str]:
    if isinstance(layer, RECURRENT):
        return [name for name in layer._flat_weights_names if name.startswith("weight_")]
    return _ATTENTION if isinstance(layer, nn.MultiheadAttention) else ["weight"]


def _hides(module: nn.Module) -> bool:
    """Whether code that is not torch's holds a tensor of weights that is not among those found."""
    known = {id(v) for v in each(weights(module))}
    return any(
        p.ndim > 1 and id(p) not in known
        for m in module.modules()
        if not type(m).__module__.startswith("torch.nn.")
        for p in m.parameters(recurse=False)
    )


def _wanted(found: Found, names: Iterable[str], only: tuple[str, ...], keep: tuple[str, ...]) -> Found:
    """Those whose layer the patterns take. A layer that lifting made of a bare weight goes by the name of what held it."""
    known = set(names)
    own = {n: w.layer_name if w.layer_name in known else w.layer_name.rpartition(".")[0] for n, w in found.items()}
    return {n: w for n, w in found.items() if (not only or meets(own[n], only)) and not meets(own[n], keep)}


def _size(found: Found) -> int:
    return sum(v.numel() for v in each(found))
