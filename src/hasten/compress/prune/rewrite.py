"""Smaller tensors, and a graph that knows their sizes."""

from __future__ import annotations

import copy
import math
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from hasten.compress.prune import recurrent
from hasten.compress.prune.operators import FILLED, reduced
from hasten.compress.prune.trace import Trace
from hasten.compress.prune.units import Axes, Ids
from hasten.core.errors import Unsupported
from hasten.load.layers import arguments

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SIZES = {"view": "size", "reshape": "shape", "_unsafe_view": "size", "unflatten": "sizes", "expand": "size"}
_SIZES |= dict.fromkeys(FILLED, "size")


def without(module: fx.GraphModule, trace: Trace, gone: Ids) -> fx.GraphModule:
    """A copy of a traced network without the units in `gone` (roots)."""
    new = copy.deepcopy(module)
    groups = {name: layer.num_channels // layer.num_groups for name, layer in new.named_modules() if isinstance(layer, nn.GroupNorm)}
    _slice(new, trace, gone)
    for name, layer in new.named_modules():
        _tell_sizes(layer, groups.get(name, 1))
    for old, node in zip(module.graph.nodes, list(new.graph.nodes), strict=True):
        if old.op == "call_function" and isinstance(old.target, torch._ops.OpOverload):
            _rewrite(trace, old, node, gone)
    new.graph.lint()
    new.recompile()
    return new


def _slice(module: nn.Module, trace: Trace, gone: Ids) -> None:
    """Cuts every stored tensor once, and puts it wherever it was."""
    tensors = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    smaller: dict[int, Tensor] = {}
    for place, ids in trace.axes():
        tensor = tensors[place.path]
        stays = np.flatnonzero(~np.isin(trace.units.find(ids), gone))
        if len(stays) < len(ids):
            cut = smaller.get(id(tensor), tensor.detach())
            smaller[id(tensor)] = cut.index_select(place.axis, torch.from_numpy(stays))
    made: dict[int, Tensor] = {}
    for layer in module.modules():
        for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            if id(tensor) not in smaller:
                continue
            if id(tensor) not in made:
                cut = smaller[id(tensor)]
                made[id(tensor)] = nn.Parameter(cut, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut
            setattr(layer, name, made[id(tensor)])


def _tell_sizes(layer: Any, per_group: int) -> None:
    """The settings of a layer follow from its weights."""
    if type(layer) is nn.Linear:
        layer.out_features, layer.in_features = layer.weight.shape
    elif type(layer) in _CONVOLUTIONS:
        depthwise = layer.in_channels == layer.groups > 1
        multiplier = layer.out_channels // layer.groups
        layer.out_channels = layer.weight.shape[0]
        layer.groups = layer.out_channels // multiplier if depthwise else layer.groups
        layer.in_channels = layer.weight.shape[1] * layer.groups
    elif type(layer) in _TRANSPOSED:
        depthwise = layer.in_channels == layer.groups == layer.out_channels > 1
        layer.in_channels = layer.weight.shape[0]
        layer.groups = layer.in_channels if depthwise else layer.groups
        layer.out_channels = layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.weight is not None or layer.running_mean is not None):
        layer.num_features = len(layer.weight if layer.weight is not None else layer.running_mean)
    elif type(layer) is nn.GroupNorm:
        layer.num_channels = len(layer.weight)
        layer.num_groups = layer.num_channels // per_group
    elif type(layer) is nn.RMSNorm:
        _tell_of_squares(layer)
    elif type(layer) is nn.Embedding:
        layer.embedding_dim = layer.weight.shape[1]
    elif type(layer) in recurrent.KINDS and not layer.proj_size:
        layer.input_size, layer.hidden_size = int(layer.weight_ih_l0.size(1)), int(layer.weight_hh_l0.size(1))
    elif type(layer) is nn.PReLU:
        layer.num_parameters = layer.weight.numel()


@torch.no_grad()
def _tell_of_squares(layer: nn.RMSNorm) -> None:
    """Of m, the mean over a share of what was there: x / √(share · m + ε) = x / √(m + ε / share) / √share."""
    share = layer.weight.numel() / math.prod(layer.normalized_shape)
    eps = torch.finfo(layer.weight.dtype).eps if layer.eps is None else layer.eps
    layer.normalized_shape = tuple(layer.weight.shape)
    if share < 1:
        layer.eps = eps / share
        layer.weight.mul_(share**-0.5)


def _rewrite(trace: Trace, old: fx.Node, node: fx.Node, gone: Ids) -> None:
    """Sizes that are written into a call."""
    name = str(old.target.overloadpacket).removeprefix("aten.")  # type: ignore[union-attr]
    result = trace.results[old]
    if name in _SIZES and isinstance(result, Axes):
        _resize(node, _SIZES[name], result, result.sizes(trace.units, gone), offset=_first_axis(trace, old, name))
    elif name in ("split", "split_with_sizes", "chunk") and isinstance(result, list):
        dim = arguments(old)["dim"] % len(result[0].shape)
        sizes = [part.sizes(trace.units, gone)[dim] for part in result]
        if sizes != [part.shape[dim] for part in result]:
            node.target = torch.ops.aten.split_with_sizes.default
            node.args, node.kwargs = (node.args[0], sizes, dim), {}
    elif name == "slice":
        _cut(trace, old, node, gone)
    elif name == "mean":
        _tell_of_zeros(trace, old, node, gone)


def _first_axis(trace: Trace, node: fx.Node, name: str) -> int:
    """The axis of the result that the first written size is of."""
    return arguments(node)["dim"] % len(trace.of(node.args[0]).shape) if name == "unflatten" else 0


def _resize(node: fx.Node, argument: str, axes: Axes, sizes: tuple[int, ...], offset: int) -> None:
    written = list(arguments(node)[argument])
    before = list(written)
    for i, size in enumerate(written):
        axis = i + offset
        if sizes[axis] == axes.shape[axis] or size == -1:
            continue
        if not isinstance(size, int) and -1 in written:
            raise Unsupported(f"{node.name} computes two of its sizes")
        written[i] = sizes[axis] if isinstance(size, int) else -1
    if written != before:
        _set(node, argument, written)


def _cut(trace: Trace, old: fx.Node, node: fx.Node, gone: Ids) -> None:
    given = arguments(old)
    x = trace.of(old.args[0])
    dim = given["dim"] % len(x.shape)
    ids = x.plain[dim]
    if ids is None:
        return
    stays = ~np.isin(trace.units.find(ids), gone)
    for name in ("start", "end"):
        bound = given[name]
        if isinstance(bound, int):
            inside = min(max(bound + len(stays) if bound < 0 else bound, 0), len(stays))
            _set(node, name, int(stays[:inside].sum()))


def _tell_of_zeros(trace: Trace, old: fx.Node, node: fx.Node, gone: Ids) -> None:
    """A mean is over all that were there: those that are gone were zero."""
    x = trace.of(old.args[0])
    over, sizes = reduced(arguments(old).get("dim"), len(x.shape)), x.sizes(trace.units, gone)
    share = math.prod(sizes[a] for a in over) / math.prod(x.shape[a] for a in over)
    if share == 1:
        return
    with node.graph.inserting_after(node):
        told = node.graph.call_function(torch.ops.aten.mul.Tensor, (node, share))
    node.replace_all_uses_with(told, delete_user_cb=lambda user: user is not told)


def _set(node: fx.Node, argument: str, value: Any) -> None:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(argument)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(argument, value)


def flatten(module: fx.GraphModule) -> fx.GraphModule:
    """Calls of an `nn.Sequential` become calls of its parts, in place."""
    while found := [n for n in module.graph.nodes if n.op == "call_module" and type(module.get_submodule(str(n.target))) is nn.Sequential]:
        for node in found:
            _spell_out(module, node)
    module.recompile()
    return module


def _spell_out(module: fx.GraphModule, node: fx.Node) -> None:
    value = node.args[0]
    for name in module.get_submodule(str(node.target))._modules:
        with module.graph.inserting_before(node):
            value = module.graph.call_module(f"{node.target}.{name}", (value,))
    node.replace_all_uses_with(value)  # type: ignore[arg-type]
    module.graph.erase_node(node)


def unstack(module: fx.GraphModule) -> fx.GraphModule:
    """Recurrent modules of several layers become one module per layer, in place, where only their outputs are read.

    Then every layer has a width of its own. Dropout between the layers becomes `nn.Dropout`.
    """
    for node in [n for n in module.graph.nodes if n.op == "call_module"]:
        layer = module.get_submodule(str(node.target))
        single = sum(other.op == "call_module" and other.target == node.target for other in module.graph.nodes) == 1
        outputs_only = all(u.target is operator.getitem and u.args[1] == 0 for u in node.users)
        if isinstance(layer, recurrent.KINDS) and layer.num_layers > 1 and single and outputs_only and len(node.all_input_nodes) == 1:
            _unstack(module, node, layer)
    module.graph.lint()
    module.recompile()
    return module


def _unstack(module: fx.GraphModule, node: fx.Node, layer: Any) -> None:
    value: Any = node.args[0]
    width = layer.hidden_size * (1 + layer.bidirectional) if not layer.proj_size else layer.proj_size * (1 + layer.bidirectional)
    home = nn.Module()
    module.set_submodule(str(node.target), home)
    for i in range(layer.num_layers):
        with torch.device("meta"):
            one = type(layer)(
                layer.input_size if i == 0 else width,
                layer.hidden_size,
                bias=layer.bias,
                batch_first=layer.batch_first,
                bidirectional=layer.bidirectional,
                **{name: getattr(layer, name) for name in ("proj_size", "nonlinearity") if getattr(layer, name, None)},
            )
        for name, _ in list(one.named_parameters()):
            setattr(one, name, getattr(layer, name.replace("_l0", f"_l{i}")))
        home.add_module(f"layer{i}", one.train(layer.training))
        with module.graph.inserting_before(node):
            call = module.graph.call_module(f"{node.target}.layer{i}", (value,))
            value = module.graph.call_function(operator.getitem, (call, 0))
            if layer.dropout and i + 1 < layer.num_layers:
                home.add_module(f"dropout{i}", nn.Dropout(layer.dropout).train(layer.training))
                value = module.graph.call_module(f"{node.target}.dropout{i}", (value,))
    for user in list(node.users):
        user.replace_all_uses_with(value)
        module.graph.erase_node(user)
    module.graph.erase_node(node)
