"""Which input is which, where the data and the network both have names for them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from torch import fx

from hasten.core.data import View
from hasten.load.examples import Loaded


def places(wanted: Sequence[str], names: Sequence[str]) -> tuple[int, ...] | None:
    """Where each wanted name lies among `names`; None where these are other names, or there is nothing to change.

    >>> places(["left", "right"], ["right", "left"])
    (1, 0)
    """
    if sorted(wanted) != sorted(names) or list(wanted) == list(names) or len(set(names)) < len(names):
        return None
    return tuple(list(names).index(name) for name in wanted)


def arranged(data: Loaded, wanted: Sequence[str]) -> Loaded:
    """The data with its inputs in the wanted order, where they are the same by name."""
    found = places(wanted, data.names)
    if found is None:
        return data
    view = View(inputs=tuple(data.view.inputs[at] for at in found), labels=data.view.labels)
    return Loaded(view=view, classes=data.classes, groups=data.groups, notes=data.notes, names=tuple(wanted))


def said(names: Sequence[str]) -> str:
    """The note on a network whose inputs were put in the order of the data."""
    return f"the inputs are taken by their names, in the order of the data: {', '.join(names)}"


def graph_in_order(graph: onnx.ModelProto, names: Sequence[str]) -> tuple[str, ...]:
    """Puts the inputs of a graph in the order of `names`, in place, where they are the same; what is to be noted about that."""
    weights = {i.name for i in graph.graph.initializer}
    inputs = {i.name: i for i in graph.graph.input if i.name not in weights}
    if places(names, list(inputs)) is None:
        return ()
    others = [i for i in graph.graph.input if i.name in weights]
    ordered = [*(onnx.ValueInfoProto.FromString(inputs[name].SerializeToString()) for name in names), *others]
    del graph.graph.input[:]
    graph.graph.input.extend(ordered)
    return (said(names),)


def module_in_order(module: fx.GraphModule, names: Sequence[str]) -> tuple[int, ...] | None:
    """The same for a module that was lifted: where each of its inputs now comes from, or None where nothing changed."""
    nodes = {str(n.target): n for n in module.graph.nodes if n.op == "placeholder"}
    found = places(names, list(nodes))
    if found is None:
        return None
    anchor = next(n for n in module.graph.nodes if n.op != "placeholder")
    for name in names:
        anchor.prepend(nodes[name])
    module.recompile()
    return found
