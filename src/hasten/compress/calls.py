"""The calls of a lifted network: who reads whom, what shapes pass, and how one call is replaced by others."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as tree

from hasten.core.network import Arrays, Network

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Shapes = dict[fx.Node, tuple[int, ...]]


def shapes(module: fx.GraphModule, network: Network) -> Shapes:
    """The shape of every tensor that passes while the module runs on one row of the network's example, or on its fixed batch."""
    rows = network.fixed_batch or 1
    return {n: tuple(t.shape) for n, t in passing(module, tuple(a[:rows] for a in network.example)).items()}


def passing(module: fx.GraphModule, arrays: Arrays) -> dict[fx.Node, Tensor]:
    """Every tensor that passes while the module runs on these inputs, without its values."""
    return {node: result for node, result in results(module, arrays).items() if isinstance(result, Tensor)}


def results(module: fx.GraphModule, arrays: Arrays) -> dict[fx.Node, Any]:
    """What every call gives while the module runs on these inputs: tensors without their values, alone or in tuples."""
    seen = _Passing(module)
    with torch.no_grad():
        seen.run(*inputs(module, arrays))
    return seen.found


def inputs(module: nn.Module, arrays: Arrays) -> tuple[Tensor, ...]:
    """The arrays as tensors, floats in the format of the weights."""
    kind = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    tensors = tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)
    return tuple(t.to(kind) if t.is_floating_point() else t for t in tensors)


class _Passing(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.found[n] = tree.tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), result)
        return result


def own_layers(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The layers that may be changed, by name, with their call.

    Each is called once and on one value; no other layer and no call reads its weights; it has neither hooks nor parametrizations.
    """
    calls = Counter(n.target for n in module.graph.nodes if n.op == "call_module")
    holders = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    found = {}
    for node in module.graph.nodes:
        if node.op != "call_module" or calls[node.target] > 1 or len(node.args) != 1 or node.kwargs:
            continue
        layer, name = module.get_submodule(str(node.target)), str(node.target)
        private = all(holders[id(p)] == 1 for p in layer.parameters())
        if private and not altered(layer) and not any(r.startswith(name + ".") for r in read) and isinstance(node.args[0], fx.Node):
            found[name] = node
    return found


def read_shapes(own: Mapping[str, fx.Node], seen: Shapes) -> dict[str, tuple[int, ...]]:
    """The shape that each layer reads. To be asked before any of them is replaced."""
    return {name: seen[node.all_input_nodes[0]] for name, node in own.items() if node.all_input_nodes[0] in seen}


def altered(layer: nn.Module) -> bool:
    """Whether calling the layer does more than its class says: hooks or parametrizations."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks) or nn.utils.parametrize.is_parametrized(layer)


def reader(node: fx.Node) -> fx.Node | None:
    """The only node that reads this one, None where there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def replace(module: fx.GraphModule, node: fx.Node, parts: Sequence[nn.Module]) -> None:
    """Puts a chain of layers in the place of the layer that `node` calls: under its name, or under name.0, name.1, …."""
    name = str(node.target)
    if len(parts) == 1:
        module.set_submodule(name, parts[0])
        return
    module.set_submodule(name, nn.Sequential(*parts).eval())
    value = node.args[0]
    for i in range(len(parts)):
        with module.graph.inserting_before(node):
            value = module.graph.call_module(f"{name}.{i}", (value,))
    node.replace_all_uses_with(value)  # type: ignore[arg-type]
    module.graph.erase_node(node)


def free_name(module: nn.Module, base: str) -> str:
    """`base`, or the next free name near it, for a new weight or layer."""
    parent, _, last = base.rpartition(".")
    home = module.get_submodule(parent)
    names = (last if count == 0 else f"{last}_{count}" for count in itertools.count())
    return ".".join(filter(None, (parent, next(n for n in names if not hasattr(home, n)))))


def bypass(node: fx.Node) -> None:
    """Lets the readers of `node` read its first argument instead, and erases it."""
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def finish(module: fx.GraphModule) -> fx.GraphModule:
    """Drops calls, layers and weights that nothing reads any more, and makes the code new."""
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    holders = [name for name, part in module.named_modules() if not any(name == c or name.startswith(c + ".") for c in called)]
    for name in holders:
        part = module.get_submodule(name)
        for weight in [*part._parameters, *part._buffers]:
            if ".".join(filter(None, (name, weight))) not in read:
                delattr(part, weight)
    module.graph.lint()
    module.recompile()
    return module


def built(kind: type[nn.Module], weight: Tensor, bias: Tensor | None, *, like: Any, **settings: Any) -> nn.Module:
    """A layer with these weights, in the number format of the layer `like`, and trained where that one is."""
    with torch.device("meta"):  # no random number is drawn for weights that are replaced
        layer: Any = kind(**settings, bias=bias is not None)
    learns, form = like.weight.requires_grad, like.weight.dtype
    layer.weight = nn.Parameter(weight.detach().to(form).contiguous(), requires_grad=learns)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(form).contiguous(), requires_grad=learns)
    return layer.eval()  # type: ignore[no-any-return]


def linear(weight: Tensor, bias: Tensor | None, *, like: Any) -> nn.Module:
    """A linear layer with the weight (out, in)."""
    return built(nn.Linear, weight, bias, like=like, in_features=weight.shape[1], out_features=weight.shape[0])


def convolution(weight: Tensor, bias: Tensor | None, *, like: Any, groups: int = 1, **settings: Any) -> nn.Module:
    """A convolution with the weight (out, in / groups, …) of the class of `like`."""
    sizes = {"in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0], "kernel_size": tuple(weight.shape[2:])}
    return built(type(like), weight, bias, like=like, groups=groups, **sizes, **settings)


def numbers(layer: nn.Module) -> int:
    """How many numbers its parameters hold."""
    return sum(p.numel() for p in layer.parameters())


def multiply_adds(layer: Any, output: tuple[int, ...]) -> int:
    """Multiply-adds of a linear layer or a convolution that gives one output of this shape; 0 for another layer."""
    if type(layer) is nn.Linear or type(layer) in CONVOLUTIONS:
        return math.prod((*output, *layer.weight.shape[1:]))
    return 0
