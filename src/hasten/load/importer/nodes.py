"""An ONNX graph as plain values: nodes with their attributes read, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, numpy_helper

from hasten.core.errors import Unsupported
from hasten.load.importer.fusing import fused
from hasten.load.importer.table import Array


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node: its operator with the domain in front where it is not ONNX's own. `number`: its place in the body."""

    op: str
    name: str
    number: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.op} {self.name!r}" if self.name else f"{self.op} (node {self.number})"


@dataclass(frozen=True, kw_only=True)
class Body:
    """A graph, a subgraph or a function. `opset` is None where it is that of the graph around it."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Array] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    opset: int | None = None


@dataclass(frozen=True)
class Reference:
    """An attribute of a node in a function that is given by the caller of the function."""

    name: str


def read_model(model: onnx.ModelProto) -> tuple[Body, dict[str, Body]]:
    """The main graph, and the model's own functions by operator name."""
    body = replace(read_graph(model.graph), opset=_opset(model.opset_import))
    functions = {_op(f.domain, f.name): read_function(f) for f in model.functions}
    return body, functions


def read_graph(graph: onnx.GraphProto) -> Body:
    """A graph or subgraph."""
    if graph.sparse_initializer:
        raise Unsupported(f"expected dense weights, got sparse ones in graph {graph.name!r}")
    constants = {i.name: array(i) for i in graph.initializer}
    outputs = tuple(o.name for o in graph.output)
    inputs = tuple(i.name for i in graph.input if i.name not in constants)
    return Body(nodes=fused(tuple(_nodes(graph.node)), constants, outputs), inputs=inputs, outputs=outputs, constants=constants)


def read_function(function: onnx.FunctionProto) -> Body:
    """A function; its attributes without a value of the caller get their defaults."""
    return Body(
        nodes=tuple(_nodes(function.node)),
        inputs=tuple(function.input),
        outputs=tuple(function.output),
        defaults=dict.fromkeys(function.attribute) | {a.name: _attribute(a) for a in function.attribute_proto},
        opset=_opset(function.opset_import),
    )


def array(tensor: onnx.TensorProto) -> Array:
    """A constant of the file; texts are refused where they are used."""
    return np.asarray(numpy_helper.to_array(tensor))


def _opset(imports: Any) -> int | None:
    return next((i.version for i in imports if i.domain in ("", "ai.onnx")), None)


def _op(domain: str, name: str) -> str:
    return name if domain in ("", "ai.onnx") else f"{domain}.{name}"


def _nodes(nodes: Any) -> Iterator[Node]:
    for number, node in enumerate(nodes):
        attributes = {a.name: _attribute(a) for a in node.attribute}
        yield Node(
            op=_op(node.domain, node.op_type),
            name=node.name,
            number=number,
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            attributes=attributes,
        )


def _attribute(attribute: AttributeProto) -> Any:
    if attribute.ref_attr_name:
        return Reference(attribute.ref_attr_name)
    if attribute.type == AttributeProto.GRAPH:
        return read_graph(attribute.g)
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == AttributeProto.TENSOR:
        return array(value)
    if attribute.type == AttributeProto.STRING:
        return value.decode("utf-8", "replace")
    if attribute.type == AttributeProto.STRINGS:
        return [v.decode("utf-8", "replace") for v in value]
    return list(value) if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS) else value
