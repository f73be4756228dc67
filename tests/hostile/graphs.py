"""ONNX graphs that are more than they look: depth, functions, names, tensors, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hostile.cases import Make, add_all

FLOAT, LONG = TensorProto.FLOAT, TensorProto.INT64
HUGE = 2**40


def model(nodes: list[onnx.NodeProto], weights: dict[str, Any] | None = None, *, functions: Any = (), **about: Any) -> bytes:
    """y = nodes(x), x (n, 3), opset 18; `weights` are arrays or finished tensors."""
    tensors = [w if isinstance(w, TensorProto) else numpy_helper.from_array(np.asarray(w), n) for n, w in (weights or {}).items()]
    x = helper.make_tensor_value_info("x", about.pop("input_type", FLOAT), about.pop("shape", ["n", 3]))
    y = helper.make_tensor_value_info("y", about.pop("output_type", FLOAT), None)
    graph = helper.make_graph(nodes, "g", [x], [y], tensors, sparse_initializer=about.pop("sparse", []))
    opsets = [helper.make_opsetid("", about.pop("opset", 18)), helper.make_opsetid("own", 1)]
    made = helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)
    return made.SerializeToString()


def node(kind: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def function(name: str, calls: list[str]) -> onnx.FunctionProto:
    """name(a) = calls one after the other."""
    steps = [helper.make_node(c, [f"v{i}"], [f"v{i + 1}"], domain="own") for i, c in enumerate(calls)]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["v0"], [f"v{len(calls)}"], steps, opsets)


def calling(*functions: onnx.FunctionProto) -> Make:
    return lambda _: model([helper.make_node(functions[0].name, ["x"], ["y"], domain="own")], functions=functions)


def branch(inner: onnx.GraphProto | None) -> onnx.GraphProto:
    out = helper.make_tensor_value_info("b", FLOAT, None)
    last = node("Neg", "x", "b") if inner is None else node("If", "c", "b", then_branch=inner, else_branch=inner)
    return helper.make_graph([last], "b", [], [out])


def nested(levels: int) -> Make:
    def make(_: Path) -> bytes:
        inner = None
        for _ in range(levels):
            made = branch(None)
            if inner is not None:
                made.node[0].CopyFrom(helper.make_node("If", ["c"], ["b"], then_branch=inner, else_branch=branch(None)))
            inner = made
        return model([node("If", "c", "y", then_branch=inner, else_branch=branch(None))], {"c": np.array(True)})

    return make


def many(_: Path) -> bytes:
    """2^20 nodes, written as bytes: a message may be given in parts, and its lists grow."""
    one = model([node("Neg", "x", "y")])
    graph = helper.make_graph([node("Neg", "x", "unused")] * 2**10, "g", [], [])
    part = onnx.ModelProto(graph=graph)
    part.graph.ClearField("name")
    return one + part.SerializeToString() * 2**10


def raw(name: str, dims: list[int], data: bytes = b"", kind: int = FLOAT) -> TensorProto:
    return TensorProto(name=name, dims=dims, data_type=kind, raw_data=data)


def added(tensor: TensorProto) -> Make:
    return lambda _: model([node("Add", "x w")], {"w": tensor})


def held(tensor: TensorProto) -> Make:
    return lambda _: model([node("Constant", "", "w", value=tensor), node("Add", "x w")])


def sparse(dims: list[int], places: list[int], values: int = 1) -> Make:
    def make(_: Path) -> bytes:
        made = onnx.SparseTensorProto(
            values=numpy_helper.from_array(np.ones(values, np.float32), "w"),
            indices=numpy_helper.from_array(np.array(places, np.int64), "w_places"),
            dims=dims,
        )
        return model([node("Add", "x w")], sparse=[made])

    return make


def renamed(name: str) -> Make:
    return lambda _: model([helper.make_node("Missing" + name, ["x"], ["y"], name=name)])


def unended(_: Path) -> bytes:
    return model([node("Neg", "x")])[:-1] + b"\xff" * 9


def deep_message(_: Path) -> bytes:
    """A type inside a type, 10,000 times."""
    inner = b""
    for _ in range(3000):
        inner = b"\x0a" + _length(len(inner)) + inner
        inner = b"\x22" + _length(len(inner)) + inner
    value = b"\x0a\x01z\x12" + _length(len(inner)) + inner
    graph = b"\x5a" + _length(len(value)) + value
    return model([node("Neg", "x")]) + b"\x3a" + _length(len(graph)) + graph


def _length(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


add_all("graph", "m.onnx", {
    "cyclic nodes": (lambda _: model([node("Add", "x b", "a"), node("Add", "a x", "b"), node("Neg", "b")]), "topologically|no ONNX model"),
    "a node that reads itself": (lambda _: model([node("Add", "x y", "y")]), "no ONNX model"),
    "a value given twice": (lambda _: model([node("Neg", "x"), node("Abs", "x")]), "no ONNX model"),
    "an input from nowhere": (lambda _: model([node("Add", "x nowhere")]), "no ONNX model"),
    "an operator set of the future": (lambda _: model([node("Neg", "x")], opset=HUGE), "no ONNX model|ONNX Runtime|does not run"),
    "a field without an end": (unended, "no ONNX model"),
    "types in types": (deep_message, "no ONNX model"),
    "2^20 nodes": (many, "at most 200000 nodes"),
    "60 branches deep": (nested(60), "at most 32 deep|no ONNX model"),
    "a function of itself": (calling(function("f", ["f"])), "do not call themselves"),
    "two functions of each other": (calling(function("f", ["g"]), function("g", ["f"])), "do not call themselves"),
    "a circle of three functions": (calling(function("f", ["g"]), function("g", ["h"]), function("h", ["f"])), "do not call themselves"),
    "2^40 calls": (calling(*(function(f"f{i}", [f"f{i + 1}"] * 16) for i in range(10)), function("f10", [])), "functions written out"),
    "100 functions deep": (calling(*(function(f"f{i}", [f"f{i + 1}"]) for i in range(100)), function("f100", [])), "at most 32 deep"),
    "a function twice": (calling(function("f", []), function("f", [])), "each function once"),
    "a name of 1 MB": (renamed("n" * 10**6), "at most 4096 characters"),
    "a name with an end": (renamed("n\0m"), "at most 4096 characters"),
    "a weight of 2^40": (added(raw("w", [HUGE])), "at most 2147483648 numbers"),
    "a weight of 2^16 × 2^16": (added(raw("w", [2**16, 2**16])), "at most 2147483648 numbers"),
    "a weight of −1": (added(raw("w", [-1], b"1234")), "at most 2147483648 numbers"),
    "a weight of 200 axes": (added(raw("w", [1] * 200, b"1234")), "at most 2147483648 numbers"),
    "a weight without numbers": (added(raw("w", [3])), "expected 12 numbers or bytes in tensor 'w'"),
    "a weight with too many": (added(raw("w", [3], b"1" * 16)), "expected 12 numbers or bytes in tensor 'w'"),
    "a weight of no type": (added(raw("w", [3], b"1" * 12, 99)), "a type that ONNX has|no ONNX model"),
    "a weight of half numbers": (added(TensorProto(name="w", dims=[3], data_type=10, int32_data=[1])), "expected 3 numbers"),
    "a constant of 2^30": (held(raw("w", [2**30])), "expected 4294967296 numbers or bytes"),
    "4-bit numbers that are not there": (added(raw("w", [9], b"1", TensorProto.INT4)), "expected 5 numbers or bytes"),
    "a sparse weight of 2^31": (sparse([2**31], [5]), "whose 1 values lie inside"),
    "a sparse place outside": (sparse([1, 3], [7]), "whose 1 values lie inside"),
    "a sparse place below": (sparse([1, 3], [-1]), "whose 1 values lie inside"),
    "a sparse weight of fewer places": (sparse([1, 3], [1], 2), "whose 2 values lie inside"),
    "a sparse weight of 2^40": (sparse([2**20, 2**20], [1]), "at most 2147483648 numbers"),
})  # fmt: skip

ESCAPES = {
    "colour": "\x1b[31mred",
    "title": "\x1b]0;owned\x07",
    "a line back": "ok\rhasten: fine",
    "right to left": "ab\u202egnp",
    "C1": "\x9b2J",
}
add_all("graph, a name with", "m.onnx", {n: (renamed(e), "no ONNX model") for n, e in ESCAPES.items()})  # fmt: skip
