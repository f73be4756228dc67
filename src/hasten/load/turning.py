"""Inputs and outputs of an ONNX graph as data has them: the batch first (the state of an LSTM is (layers, batch, width)), in a type that
a data set keeps (a network in whole integers takes int8)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from hasten.core.network import Arrays
from hasten.load.lower import run_graph

__all__ = ["batch_first", "in_kept_types", "outputs_batch_first", "outputs_of_one"]

_IN, _OUT, _CAST, _ONE = "hasten.turned.in.", "hasten.turned.out.", "hasten.cast.in.", "hasten.one.out."
_AXES_ARE_INPUTS = 13  # of Unsqueeze, from this opset on
_T = onnx.TensorProto
_KEPT = dict.fromkeys((_T.INT8, _T.INT16, _T.UINT16, _T.UINT32), _T.INT64) | dict.fromkeys((_T.FLOAT16, _T.DOUBLE), _T.FLOAT)


def batch_first(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The graph with each input's batch in front, and notes of what was turned.

    The batch of an input whose first axis is fixed is the axis that is called as the others' first one, else the only one that
    the file leaves open. A graph with nothing to turn is handed back as it is.
    """
    weights = {i.name for i in graph.graph.initializer}
    inputs = [i for i in graph.graph.input if i.name not in weights]
    firsts = {_open(i)[0] for i in inputs if 0 in _open(i)}
    axes = {i.name: _batch_axis(_open(i), firsts) for i in inputs}
    turned = {name: axis for name, axis in axes.items() if axis}
    if not turned or not firsts:
        return graph, ()
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    nodes = []
    for value in copy.graph.input:
        if value.name in turned:
            rank = len(value.type.tensor_type.shape.dim)
            order = _moved(rank, turned[value.name], 0)
            nodes.append(helper.make_node("Transpose", [value.name], [_IN + value.name], perm=np.argsort(order).tolist()))
            dims = [onnx.TensorShapeProto.Dimension() for _ in range(rank)]
            for dim, at in zip(dims, order, strict=True):
                dim.CopyFrom(value.type.tensor_type.shape.dim[at])
            del value.type.tensor_type.shape.dim[:]
            value.type.tensor_type.shape.dim.extend(dims)
    _led(copy.graph, nodes)
    return copy, tuple(f"the batch of input {name} is its axis {axis} in the file and its first here" for name, axis in turned.items())


def in_kept_types(graph: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The graph with inputs in int64 and float32 in the place of types that data is not kept in, and notes of which."""
    weights = {i.name for i in graph.graph.initializer}
    types = {i.name: i.type.tensor_type.elem_type for i in graph.graph.input if i.name not in weights}
    cast = {name: kind for name, kind in types.items() if kind in _KEPT}
    if not cast:
        return graph, ()
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for value in copy.graph.input:
        if value.name in cast:
            value.type.tensor_type.elem_type = _KEPT[cast[value.name]]
    _led(copy.graph, [helper.make_node("Cast", [name], [_CAST + name], to=kind) for name, kind in cast.items()])

    def said(kind: int) -> str:
        return str(helper.tensor_dtype_to_np_dtype(kind))

    return copy, tuple(f"input {name} is {said(kind)} in the file and takes {said(_KEPT[kind])} here" for name, kind in cast.items())


def outputs_batch_first(graph: onnx.ModelProto, example: Arrays, more: Arrays) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The graph with each output's batch in front: the one axis that grows with the rows, seen by running both examples."""
    rows, grown = len(example[0]), len(more[0])
    shapes = [(a.shape, b.shape) for a, b in zip(run_graph(graph, example), run_graph(graph, more), strict=True)]
    turned = {}
    for value, (a, b) in zip(graph.graph.output, shapes, strict=True):
        growing = [i for i, (s, t) in enumerate(zip(a, b, strict=False)) if (s, t) == (rows, grown)] if len(a) == len(b) else []
        if len(growing) == 1 and growing[0] > 0:
            turned[value.name] = (growing[0], len(a))
    if not turned:
        return graph, ()
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for value in copy.graph.output:
        if value.name in turned:
            axis, rank = turned[value.name]
            copy.graph.node.append(helper.make_node("Transpose", [value.name], [_OUT + value.name], perm=_moved(rank, axis, 0)))
            value.name = _OUT + value.name
            value.type.tensor_type.ClearField("shape")
    said = (f"the batch of output {name} is its axis {axis} in the file and its first here" for name, (axis, _) in turned.items())
    return copy, tuple(said)


def outputs_of_one(graph: onnx.ModelProto, example: Arrays) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The graph of a network for one example, with that example's axis in front of each output that has none, and notes of which."""
    bare = [o.name for o, a in zip(graph.graph.output, run_graph(graph, example), strict=True) if a.ndim == 0 or len(a) != 1]
    if not bare:
        return graph, ()
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    opset = next(o.version for o in graph.opset_import if o.domain in ("", "ai.onnx"))
    axis = _ONE + "axis"
    if opset >= _AXES_ARE_INPUTS:
        copy.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.int64), axis))
    for value in copy.graph.output:
        if value.name in bare:
            made = [_ONE + value.name]
            if opset >= _AXES_ARE_INPUTS:
                copy.graph.node.append(helper.make_node("Unsqueeze", [value.name, axis], made))
            else:
                copy.graph.node.append(helper.make_node("Unsqueeze", [value.name], made, axes=[0]))
            value.name = _ONE + value.name
            value.type.tensor_type.ClearField("shape")
    return copy, tuple(f"output {name} has no axis for the batch in the file and one here" for name in bare)


def _open(value: onnx.ValueInfoProto) -> dict[int, str]:
    """The axes of an input that the file leaves open, with the names that it gives them."""
    return {i: d.dim_param for i, d in enumerate(value.type.tensor_type.shape.dim) if d.dim_value <= 0}


def _batch_axis(axes: dict[int, str], firsts: set[str]) -> int:
    if not axes or 0 in axes:
        return 0
    named = [i for i, name in axes.items() if name and name in firsts]
    candidates = named or list(axes)
    return candidates[0] if len(candidates) == 1 else 0


def _moved(rank: int, source: int, to: int) -> list[int]:
    order = [i for i in range(rank) if i != source]
    order.insert(to, source)
    return order


def _led(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Puts nodes of one input and one output in front; all others read what they give."""
    _renamed(graph, {node.input[0]: node.output[0] for node in nodes})
    own = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *own])


def _renamed(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Lets all nodes read other names, those of subgraphs as well where they mean the values around them."""
    for node in graph.node:
        _swap(node.input, names)
        for inner in (g for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)):
            own = {i.name for i in (*inner.input, *inner.initializer)} | {o for n in inner.node for o in n.output}
            _renamed(inner, {k: v for k, v in names.items() if k not in own})
            for output in inner.output:
                output.name = names.get(output.name, output.name) if output.name not in own else output.name


def _swap(values: Sequence[str], names: dict[str, str]) -> None:
    for at, name in enumerate(values):
        if name in names:
            values[at] = names[name]  # type: ignore[index]
