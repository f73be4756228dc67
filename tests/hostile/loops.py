"""Graphs that do not end, and graphs of a few bytes that ask for all memory: what only running them would show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from hostile.cases import Make, add_all
from hostile.graphs import FLOAT, HUGE, LONG, model, node

TRUE = np.array(True)


def body(*extra: onnx.NodeProto, out: str = "v1") -> onnx.GraphProto:
    """(i, c, v0) → (c, out)."""
    inputs = [helper.make_tensor_value_info(n, k, s) for n, k, s in (("i", LONG, []), ("c", TensorProto.BOOL, []), ("v0", FLOAT, None))]
    outputs = [helper.make_tensor_value_info("c1", TensorProto.BOOL, []), helper.make_tensor_value_info(out, FLOAT, None)]
    return helper.make_graph([node("Identity", "c", "c1"), *extra], "body", inputs, outputs)


def loop(inner: onnx.GraphProto, trips: str = "trips") -> onnx.NodeProto:
    return node("Loop", f"{trips} on x", "y", body=inner)


def looping(trips: int, *extra: onnx.NodeProto) -> Make:
    steps = extra or (node("Neg", "v0", "v1"),)
    return lambda _: model([loop(body(*steps))], {"trips": np.array(trips), "on": TRUE})


def for_ever(_: Path) -> bytes:
    return model([helper.make_node("Loop", ["", "on", "x"], ["y"], body=body(node("Neg", "v0", "v1")))], {"on": TRUE})


def in_loops(_: Path) -> bytes:
    inner = body(node("Neg", "v0", "v1"))
    for _ in range(4):
        inner = body(helper.make_node("Loop", ["trips", "on", "v0"], ["v1"], body=inner))
    return model([loop(inner)], {"trips": np.array(1000), "on": TRUE})


def asked_by_the_input(_: Path) -> bytes:
    """As many trips as the sum of the input, times 2^30."""
    sums = [node("ReduceSum", "x", "s", keepdims=0), node("Abs", "s", "p"), node("Mul", "p big", "m"), node("Cast", "m", "trips", to=LONG)]
    return model([*sums, loop(body(node("Neg", "v0", "v1")))], {"big": np.float32(2**30), "on": TRUE})


def scanning(_: Path) -> bytes:
    state = [helper.make_tensor_value_info(n, FLOAT, None) for n in ("v0", "r", "v1")]
    inner = helper.make_graph([node("Add", "v0 r", "v1")], "body", state[:2], state[2:])
    return model(
        [node("Expand", "x wide", "xs"), node("Scan", "x xs", "y", body=inner, num_scan_inputs=1)], {"wide": np.array([2**31, 1, 3])}
    )


add_all("loop", "m.onnx", {
    "2^40 trips": (looping(HUGE), ""),
    "2^62 trips": (looping(2**62), ""),
    "for ever": (for_ever, ""),
    "1000 trips five deep": (in_loops, ""),
    "as many as the input says": (asked_by_the_input, ""),
    "2^31 rows": (scanning, ""),
    "a value that doubles": (looping(100, node("Concat", "v0 v0", "v1", axis=1)), ""),
    "an empty body": (looping(HUGE, node("Identity", "v0", "v1")), ""),
}, reading=False)  # fmt: skip


def sized(kind: str, inputs: str, weights: dict[str, Any], **attributes: Any) -> Make:
    """One operator that makes its output from sizes; then a sum, so that the answer itself is small."""
    steps = [
        node(kind, inputs, "big", **attributes),
        node("ReduceSum", "big", "s", keepdims=0),
        node("Cast", "s", "f", to=FLOAT),
        node("Add", "x f"),
    ]
    return lambda _: model(steps, weights)


def image(kind: str, weights: dict[str, Any], **attributes: Any) -> Make:
    steps = [node(kind, " ".join(["x", *weights]), "big", **attributes), node("ReduceSum", "big", keepdims=1)]
    return lambda _: model(steps, weights, shape=["n", 1, 8, 8])


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


KERNEL = {"w": np.ones((1, 1, 3, 3), np.float32)}
add_all("size", "m.onnx", {
    "ConstantOfShape 2^40": (sized("ConstantOfShape", "s0", {"s0": ints(HUGE)}), ""),
    "ConstantOfShape 2^20 × 2^20": (sized("ConstantOfShape", "s0", {"s0": ints(2**20, 2**20)}), ""),
    "ConstantOfShape 2^31": (sized("ConstantOfShape", "s0", {"s0": ints(2**31)}), ""),
    "ConstantOfShape 2^62 × 4": (sized("ConstantOfShape", "s0", {"s0": ints(2**62, 4)}), ""),
    "Expand 2^40": (sized("Expand", "x s0", {"s0": ints(HUGE, 1, 1)}), ""),
    "Expand a constant": (sized("Expand", "a s0", {"a": np.float32([1]), "s0": ints(HUGE)}), ""),
    "Tile 2^40": (sized("Tile", "x s0", {"s0": ints(HUGE, 1)}), ""),
    "Reshape 2^40": (sized("Reshape", "x s0", {"s0": ints(HUGE)}), ""),
    "Reshape −1, −1": (sized("Reshape", "x s0", {"s0": ints(-1, -1)}), ""),
    "Range 2^40": (sized("Range", "a b c", {"a": np.int64(0), "b": np.int64(HUGE), "c": np.int64(1)}), ""),
    "Range of step 0": (sized("Range", "a b c", {"a": np.int64(0), "b": np.int64(9), "c": np.int64(0)}), ""),
    "OneHot 2^40": (sized("OneHot", "a b c", {"a": ints(1, 2), "b": np.int64(HUGE), "c": np.float32([0, 1])}), ""),
    "Pad 2^40": (sized("Pad", "x p", {"p": ints(0, 0, HUGE, 0)}), ""),
    "Pad −2^40": (sized("Pad", "x p", {"p": ints(0, 0, -HUGE, 0)}), ""),
    "RandomNormal 2^40": (sized("RandomNormal", "", {}, shape=[HUGE]), ""),
    "EyeLike 2^18 × 2^18": (sized("EyeLike", "a", {"a": np.ones((1, 3), np.float32)}, k=HUGE), ""),
    "Gather far outside": (sized("Gather", "x a", {"a": ints(2**62)}), ""),
    "Split in 2^20": (sized("Split", "x", {}, num_outputs=2**20), ""),
    "NonZero of 2^31": (lambda _: model([node("Expand", "x s0", "b"), node("NonZero", "b", "z"), node("Cast", "z", to=1)], {"s0": ints(2**31, 1, 1)}), ""),
    "TopK 2^40": (sized("Expand", "a s0", {"a": ints(1), "s0": ints(2**33)}), ""),
    "doubling 40 times": (lambda _: model([*(node("Concat", f"{'v' + str(i) if i else 'x'} {'v' + str(i) if i else 'x'}", f"v{i + 1}", axis=0) for i in range(40)), node("ReduceSum", "v40")]), ""),
    "constants doubling 40 times": (lambda _: model([*(node("Concat", f"v{i} v{i}", f"v{i + 1}", axis=0) for i in range(40)), node("ReduceSum", "v40", "s"), node("Add", "x s")], {"v0": np.float32([1])}), ""),
    "an outer product": (lambda _: model([node("Transpose", "b", "t"), node("Expand", "x s0", "b0"), node("ReduceMax", "b0 ax", "b"), node("MatMul", "t b", "p"), node("ReduceSum", "p")], {"s0": ints(1, 2**20, 3), "ax": ints(0)}), ""),
    "Conv with pads of 2^31": (image("Conv", KERNEL, pads=[2**31] * 4), ""),
    "Conv with pads of 2^16": (image("Conv", KERNEL, pads=[2**16] * 4), ""),
    "Conv with dilations of 2^62": (image("Conv", KERNEL, dilations=[2**62] * 2), ""),
    "Conv with stride 0": (image("Conv", KERNEL, strides=[0, 0]), ""),
    "Conv with −1 groups": (image("Conv", KERNEL, group=-1), ""),
    "Conv with 0 groups": (image("Conv", KERNEL, group=0), ""),
    "ConvTranspose with stride 2^20": (image("ConvTranspose", KERNEL, strides=[2**20, 2**20]), ""),
    "ConvTranspose to 2^40": (image("ConvTranspose", KERNEL, output_shape=[2**20, 2**20]), ""),
    "MaxPool with a kernel of 2^31": (image("MaxPool", {}, kernel_shape=[2**31, 2**31]), ""),
    "MaxPool with kernel 0": (image("MaxPool", {}, kernel_shape=[0, 0]), ""),
    "AveragePool with pads of 2^31": (image("AveragePool", {}, kernel_shape=[2, 2], pads=[2**31] * 4), ""),
    "DepthToSpace of 0": (image("DepthToSpace", {}, blocksize=0), ""),
    "Resize 2^20 times": (lambda _: model([helper.make_node("Resize", ["x", "", "s"], ["b"]), node("ReduceSum", "b")], {"s": np.float32([1, 1, 2**20, 2**20])}, shape=["n", 1, 8, 8]), ""),
    "Resize by NaN": (lambda _: model([helper.make_node("Resize", ["x", "", "s"], ["b"]), node("ReduceSum", "b")], {"s": np.float32([1, 1, np.nan, np.inf])}, shape=["n", 1, 8, 8]), ""),
    "LSTM of 2^40": (lambda _: model([node("LSTM", "x w r", "b", hidden_size=HUGE), node("ReduceSum", "b")], {"w": np.ones((1, 4, 3), np.float32), "r": np.ones((1, 4, 1), np.float32)}, shape=[2, "n", 3]), ""),
}, reading=False)  # fmt: skip

add_all("size", "m.onnx", {
    "an input of 2^40": (lambda _: model([node("ReduceSum", "x")], shape=["n", HUGE]), "must come from data; give some"),
    "an input of 2^20 × 2^20": (lambda _: model([node("ReduceSum", "x")], shape=["n", 2**20, 2**20]), "must come from data; give some"),
    "a batch of 2^40": (lambda _: model([node("ReduceSum", "x")], shape=[HUGE, 3]), "must come from data; give some"),
})  # fmt: skip
