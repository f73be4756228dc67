"""What a network computes from its weights alone, computed once."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from hasten.compress.calls import finish, free_name
from hasten.compress.layers import lifted
from hasten.core.network import Network
from hasten.load.lift import lift
from hasten.load.lower import quiet
from hasten.load.program import export_program

_ATEN = torch.ops.aten
_PRODUCTS = frozenset({_ATEN.conv1d, _ATEN.conv2d, _ATEN.conv3d, _ATEN.convolution, _ATEN.linear})
_LARGEST = 2**20  # numbers; a larger table than its sources is slower to read than to make


def constants(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """The values of all nodes that depend on no input. Random calls, and calls that write, are none."""
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(module)
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes) and _pure(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    return values


def fold_constants(module: fx.GraphModule) -> list[str]:
    """Puts the values of constant calls in the place of the calls; gives the names under which they lie now.

    A value that depends on a weight which trains becomes one that trains. A call stays where its weight is read elsewhere too, or
    where its value is large and larger than what it is made of.
    """
    values = constants(module)
    made = []
    for node in [n for n in values if n.op == "call_function" and any(user not in values for user in n.users)]:
        sources = list(_sources(node))
        if not isinstance(values[node], Tensor) or any(_writes(user) for user in node.users) or not _worth(node, values, sources, module):
            continue
        name = _place(module, node, sources)
        parent, _, last = name.rpartition(".")
        home = module.get_submodule(parent)
        learns = any(isinstance(values[s], nn.Parameter) and values[s].requires_grad for s in sources)
        value = values[node].detach().clone()
        if learns:
            home.register_parameter(last, nn.Parameter(value))
        else:
            home.register_buffer(last, value)
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name), delete_user_cb=lambda user: user not in values)
        made.append(name)
    finish(module)
    return made


def as_layers(network: Network, module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """The module, lifted anew where a convolution or a product reads one of these as its weight: it is a layer now."""
    new = [n for n in module.graph.nodes if n.op == "get_attr" and n.target in names]
    if not any(multiplies(user) for n in new for user in n.users):
        return module
    with quiet():
        return lift(export_program(network.with_body(module)))


def with_made_weights(network: Network) -> Network | None:
    """The network where weights of convolutions and products that are computed from others are made once, or None where there are none."""
    module = lifted(network)
    names = fold_constants(module)
    return network.with_body(as_layers(network, module, names)) if names else None


def multiplies(node: fx.Node) -> bool:
    """Whether it is a convolution or product that is no layer, as one whose weight is computed."""
    return getattr(node.target, "overloadpacket", None) in _PRODUCTS


def _pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _writes(node: fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _sources(node: fx.Node) -> Iterable[fx.Node]:
    """The weights that a constant call depends on."""
    found: dict[fx.Node, None] = {}
    todo = [node]
    while todo:
        at = todo.pop()
        if at.op == "get_attr":
            found[at] = None
        todo.extend(at.all_input_nodes)
    return found


def _worth(node: fx.Node, values: dict[fx.Node, Any], sources: list[fx.Node], module: fx.GraphModule) -> bool:
    """Not where a weight would be there twice, or a large table would be read instead of made."""
    reads = {n: [other for other in module.graph.nodes if other.op == "get_attr" and values.get(other) is values[n]] for n in sources}
    called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    layers = {id(p) for name in called for p in module.get_submodule(name).parameters()}
    for source in sources:
        shared = any(user not in values for other in reads[source] for user in other.users)
        if isinstance(values[source], nn.Parameter) and (shared or id(values[source]) in layers):
            return False
    size: int = values[node].numel()
    return size <= max(_LARGEST, sum(int(values[s].numel()) for s in sources if isinstance(values[s], Tensor)))


def _place(module: fx.GraphModule, node: fx.Node, sources: list[fx.Node]) -> str:
    """A free name: a weight normed by hand lies where the layer keeps its weight."""
    parents = {str(s.target).rpartition(".")[0] for s in sources}
    base = f"{parents.pop()}.weight" if len(parents) == 1 and "" not in parents else f"{node.name}_value"
    return free_name(module, base)
