"""Layers that a file spells out in simpler operators, put back together: linear, GELU, SiLU, Mish, layer norm.

A rule looks at the node that ends a pattern and gives the node that replaces it, or None. What nobody reads then is dropped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.load.importer.table import Array

if TYPE_CHECKING:
    from hasten.load.importer.nodes import Node


class Pattern:
    """Who makes each value of a graph, who reads it, and which are constants."""

    def __init__(self, nodes: tuple[Node, ...], constants: dict[str, Array], outputs: tuple[str, ...]) -> None:
        self.made = {o: n for n in nodes for o in n.outputs if o}
        self.constants = constants | {n.outputs[0]: n.attributes["value"] for n in nodes if n.op == "Constant" and "value" in n.attributes}
        self.readers = Counter(name for node in nodes for name in read(node)) + Counter(outputs)

    def op(self, name: str, *ops: str) -> Node | None:
        """The node that makes a value, if it is one of these operators."""
        node = self.made.get(name)
        return node if node is not None and node.op in ops else None

    def number(self, name: str) -> float | None:
        """A constant of one element."""
        value = self.constants.get(name)
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 and value.dtype.kind in "fiu" else None

    def sides(self, node: Node) -> Iterator[tuple[str, str]]:
        """The two operands of a node, in both orders."""
        if len(node.inputs) == 2:
            yield node.inputs[0], node.inputs[1]
            yield node.inputs[1], node.inputs[0]

    def row(self, name: str) -> bool:
        """Whether a value is a constant row of floats."""
        value = self.constants.get(name)
        return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind == "f"

    def alone(self, name: str) -> bool:
        """Whether one node reads the value and nothing else does."""
        return self.readers[name] == 1


def read(node: Node) -> Iterator[str]:
    """The values that a node reads, those that its subgraphs take from around them counted."""
    yield from filter(None, node.inputs)
    for value in node.attributes.values():
        if hasattr(value, "nodes"):
            yield from (name for inner in value.nodes for name in read(inner))
            yield from value.outputs


def fused(nodes: tuple[Node, ...], constants: dict[str, Array], outputs: tuple[str, ...]) -> tuple[Node, ...]:
    """The nodes with every pattern that is found replaced by one node."""
    for rule in (_linear, _gelu, _gated, _layer_norm):
        pattern = Pattern(nodes, constants, outputs)
        nodes = tuple(rule(pattern, node) or node for node in nodes)
        nodes = _read_only(nodes, outputs)
    return nodes


def _read_only(nodes: tuple[Node, ...], outputs: tuple[str, ...]) -> tuple[Node, ...]:
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted.intersection(node.outputs):
            wanted.update(read(node))
            kept.append(node)
    return tuple(reversed(kept))


def _linear(pattern: Pattern, node: Node) -> Node | None:
    """x @ w + b."""
    for product, bias in pattern.sides(node) if node.op == "Add" else ():
        before = pattern.op(product, "MatMul")
        if before is not None and pattern.alone(product) and pattern.row(bias):
            return replace(before, op="hasten.Linear", number=node.number, inputs=(*before.inputs, bias), outputs=node.outputs)
    return None


def _gelu(pattern: Pattern, node: Node) -> Node | None:
    """x · ½ · (1 + erf(x / √2)), its factors in any order."""
    factors = list(_factors(pattern, node.outputs[0])) if node.op == "Mul" else []
    numbers = [v for v in map(pattern.number, factors) if v is not None]
    rest = [f for f in factors if pattern.number(f) is None]
    if len(rest) != 2 or not math.isclose(math.prod(numbers), 0.5, rel_tol=1e-5):
        return None
    for x, other in (rest, rest[::-1]):
        one = pattern.op(other, "Add")
        for error, unit in pattern.sides(one) if one is not None else ():
            erf = pattern.op(error, "Erf")
            if erf is not None and pattern.number(unit) == 1 and _scaled(pattern, erf.inputs[0], x):
                return replace(node, op="Gelu", inputs=(x,), attributes={})
    return None


def _factors(pattern: Pattern, name: str, depth: int = 0) -> Iterator[str]:
    """The factors of a product, its own products taken apart where nobody else reads them."""
    node = pattern.op(name, "Mul")
    if node is None or depth > 2 or (depth and not pattern.alone(name)):
        yield name
    else:
        for side in node.inputs:
            yield from _factors(pattern, side, depth + 1)


def _scaled(pattern: Pattern, name: str, x: str) -> bool:
    """Whether a value is x / √2."""
    for op, factor in (("Mul", math.sqrt(0.5)), ("Div", math.sqrt(2))):
        node = pattern.op(name, op)
        for a, b in pattern.sides(node) if node is not None else ():
            if a == x and (found := pattern.number(b)) is not None and math.isclose(found, factor, rel_tol=1e-4):
                return node is not None and (op == "Mul" or node.inputs[0] == x)
    return False


def _gated(pattern: Pattern, node: Node) -> Node | None:
    """x · sigmoid(x) and x · tanh(softplus(x))."""
    for x, gate in pattern.sides(node) if node.op == "Mul" else ():
        sigmoid, tanh = pattern.op(gate, "Sigmoid"), pattern.op(gate, "Tanh")
        if sigmoid is not None and sigmoid.inputs == (x,):
            return replace(node, op="Swish", inputs=(x,), attributes={})
        soft = None if tanh is None else pattern.op(tanh.inputs[0], "Softplus")
        if soft is not None and soft.inputs == (x,):
            return replace(node, op="Mish", inputs=(x,), attributes={})
    return None


def _layer_norm(pattern: Pattern, node: Node) -> Node | None:
    """(x − mean) / √(mean of squares + ε) · w + b over the last axis."""
    for scaled, bias in pattern.sides(node) if node.op == "Add" else ():
        times = pattern.op(scaled, "Mul")
        if times is None or not pattern.row(bias) or not pattern.alone(scaled):
            continue
        for divided, weight in pattern.sides(times):
            found = _standardised(pattern, divided) if pattern.row(weight) else None
            if found is not None:
                attributes: dict[str, Any] = {"epsilon": found[1], "axis": -1}
                return replace(node, op="LayerNormalization", name=times.name, inputs=(found[0], weight, bias), attributes=attributes)
    return None


def _standardised(pattern: Pattern, name: str) -> tuple[str, float] | None:
    """x and ε, where a value is (x − mean(x)) / √(var(x) + ε)."""
    divide = pattern.op(name, "Div")
    root = None if divide is None else pattern.op(divide.inputs[1], "Sqrt")
    added = None if root is None else pattern.op(root.inputs[0], "Add")
    centred = None if divide is None else pattern.op(divide.inputs[0], "Sub")
    if added is None or centred is None or divide is None or not _is_mean(pattern, centred.inputs[1], centred.inputs[0]):
        return None
    for variance, epsilon in pattern.sides(added):
        squares = pattern.op(variance, "ReduceMean")
        square = None if squares is None else pattern.op(squares.inputs[0], "Pow", "Mul")
        if square is None or (small := pattern.number(epsilon)) is None or not _is_mean(pattern, variance, square.outputs[0]):
            continue
        twice = square.inputs == (divide.inputs[0],) * 2 if square.op == "Mul" else pattern.number(square.inputs[1]) == 2
        source = pattern.op(square.inputs[0], "Sub")
        if twice and source is not None and source.inputs == centred.inputs:
            return centred.inputs[0], small
    return None


def _is_mean(pattern: Pattern, name: str, x: str) -> bool:
    """Whether a value is the mean of x over its last axis."""
    node = pattern.op(name, "ReduceMean")
    if node is None or node.inputs[0] != x or node.attributes.get("keepdims", 1) != 1:
        return False
    axes = node.attributes.get("axes")
    if len(node.inputs) > 1:
        value = pattern.constants.get(node.inputs[1])
        axes = None if value is None else value.reshape(-1).tolist()
    return axes == [-1]
