"""Graphs drawn line by line, and how they are quantized, run and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper

from hasten.compress import QuantizeStatic
from hasten.core.data import View
from hasten.core.network import Network
from hasten.core.recipe import Context, Profile

MOVES = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Resize"})
WEIGHTLESS = {"Add", "GlobalAveragePool", "AveragePool"}
PROFILES = {
    "onnxruntime": Profile(integer_ops=frozenset({"Conv", "Gemm", "MatMul", "Concat", *WEIGHTLESS}), passing_ops=MOVES, weight_bits=7),
    "openvino": Profile(
        integer_ops=frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", *WEIGHTLESS}),
        passing_ops=MOVES | {"Concat"},
        weight_bits=7,
        symmetric_activations=True,
    ),
}


class Sketch:
    """Draws an ONNX graph line by line, with random weights."""

    def __init__(self, *shape: int | str, seed: int = 0, opset: int = 20) -> None:
        self.random, self.opset = np.random.default_rng(seed), opset
        self.shape, self.nodes, self.constants = shape, [], []

    def weight(self, *shape: int, scale: float | None = None, at: float = 0.0) -> str:
        spread = (2 / max(np.prod(shape[1:]), 1)) ** 0.5 if scale is None else scale
        return self.constant((at + self.random.normal(size=shape) * spread).astype(np.float32))

    def constant(self, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, f"c{len(self.constants)}"))
        return self.constants[-1].name

    def __call__(self, kind: str, *inputs: str, **attributes: object) -> str:
        out = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [out], name=f"n{len(self.nodes)}", **attributes))
        return out

    def conv(self, x: str, i: int, o: int, k: int = 3, **more: object) -> str:
        groups = int(more.get("group", 1))  # type: ignore[call-overload]
        return self("Conv", x, self.weight(o, i // groups, k, k), self.weight(o, scale=0.2), pads=[k // 2] * 4, **more)

    def norm(self, x: str, c: int) -> str:
        facts = [self.weight(c, at=1.0, scale=0.1) if i in (0, 3) else self.weight(c, scale=0.1) for i in range(4)]
        return self("BatchNormalization", x, *facts)

    def gemm(self, x: str, i: int, o: int) -> str:
        return self("Gemm", x, self.weight(o, i), self.weight(o, scale=0.2), transB=1)

    def done(self, *outputs: str) -> onnx.ModelProto:
        first = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        last = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
        graph = helper.make_graph(self.nodes, "g", [first], last, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9)
        onnx.checker.check_model(onnx.shape_inference.infer_shapes(model), full_check=True)
        return model


def mlp() -> onnx.ModelProto:
    s = Sketch("n", 1, 8, 8)
    hidden = s("Relu", s.gemm(s("Flatten", "x"), 64, 96))
    return s.done(s.gemm(s("Dropout", hidden), 96, 10))


def cnn() -> onnx.ModelProto:
    s = Sketch("n", 3, 16, 16)
    x = s("MaxPool", s("Relu", s.norm(s.conv("x", 3, 16), 16)), kernel_shape=[2, 2], strides=[2, 2])
    x = s("Relu", s.norm(s.conv(s("Identity", x), 16, 32), 32))
    x = s("ReduceMean", x, s.constant(np.array([-1, -2])), keepdims=0)
    return s.done(s.gemm(x, 32, 10))


def residual() -> onnx.ModelProto:
    s = Sketch("n", 3, 16, 16)
    x = s("Relu", s.conv("x", 3, 16))
    for width, strides in ((16, 1), (32, 2)):
        inner = s.conv(s("Relu", s.conv(x, 16, width, strides=[strides] * 2)), width, width)
        x = s("Relu", s("Add", inner, x if strides == 1 else s.conv(x, 16, width, 1, strides=[2, 2])))
    return s.done(s.gemm(s("Flatten", s("GlobalAveragePool", x)), 32, 10))


def mobile() -> onnx.ModelProto:
    s = Sketch("n", 3, 16, 16)
    low, high = s.constant(np.float32(0).reshape(())), s.constant(np.float32(6).reshape(()))
    x = s.conv("x", 3, 16)
    wide = s("Clip", s.conv(x, 16, 48, 1), low, high)
    deep = s("Clip", s.conv(wide, 48, 48, group=48), low, high)
    x = s("Add", s.conv(deep, 48, 16, 1), x)
    return s.done(s.gemm(s("Flatten", s("GlobalAveragePool", x)), 16, 10))


def branches() -> onnx.ModelProto:
    s = Sketch("n", 3, 16, 16)
    x = s("Relu", s.conv("x", 3, 16))
    pooled = s("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)
    x = s("Concat", s("Relu", s.conv(x, 16, 16, 1)), s.conv(pooled, 16, 8, 1), axis=1)
    x = s("Transpose", s("Relu", s.conv(x, 24, 16)), perm=[0, 2, 3, 1])
    return s.done(s("Add", s("MatMul", x, s.weight(16, 10)), s.weight(10)))


def gated() -> onnx.ModelProto:
    s = Sketch("n", 3, 16, 16)
    x = s("HardSwish", s.conv("x", 3, 16))
    x = s.conv(x, 16, 16)
    x = s("Mul", x, s("Sigmoid", x))
    x = s("ConvTranspose", x, s.weight(16, 4, 2, 2, scale=0.3), s.weight(8), strides=[2, 2], group=2)
    x = s.conv(s("LeakyRelu", x), 8, 4)
    return s.done(x, s("ReduceMax", x, s.constant(np.array([2, 3])), keepdims=0))


def attention() -> onnx.ModelProto:
    s = Sketch("n", 6, 32)
    query, key, value = (s("Add", s("MatMul", "x", s.weight(32, 32)), s.weight(32, scale=0.1)) for _ in range(3))
    share = s("Softmax", s("MatMul", query, s("Transpose", key, perm=[0, 2, 1])), axis=-1)
    x = s("Add", "x", s("MatMul", s("MatMul", share, value), s.weight(32, 32)))
    x = s("LayerNormalization", x, s.weight(32, at=1.0, scale=0.1), s.weight(32, scale=0.1))
    x = s("Add", x, s("MatMul", s("Gelu", s("MatMul", x, s.weight(32, 64))), s.weight(64, 32)))
    return s.done(s.gemm(s("ReduceMean", x, s.constant(np.array([1])), keepdims=0), 32, 10))


def whole() -> onnx.ModelProto:
    """Ends in a convolution whose result is read by another one too."""
    s = Sketch("n", 3, 16, 16)
    x = s("Relu", s.conv("x", 3, 8))
    return s.done(x, s.conv(x, 8, 4))


NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    f.__name__: f for f in (mlp, cnn, residual, mobile, branches, gated, attention, whole)
}


def data(model: onnx.ModelProto, n: int = 24) -> np.ndarray:
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    return np.random.default_rng(1).normal(size=(n, *shape)).astype(np.float32)


def quantize(model: onnx.ModelProto, profile: Profile, step: QuantizeStatic | None = None, **facts: object) -> onnx.ModelProto:
    x = data(model)
    view = facts.pop("view", View(inputs=(x,)))
    network = Network(kind="graph", body=model, example=(x[:2],), **facts)  # type: ignore[arg-type]
    return (step or QuantizeStatic()).apply(network, Context(train=view, calibrate=view, profile=profile)).graph


def in_onnxruntime(model: onnx.ModelProto, x: np.ndarray, *, kept: Path | None = None) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if kept:
        options.optimized_model_filepath = str(kept)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def compiled(model: onnx.ModelProto) -> openvino.CompiledModel:
    core = openvino.Core()
    return core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_NUM_THREADS": 1})


def in_openvino(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    return list(compiled(model)([x]).values())


def distance(old: list[np.ndarray], new: list[np.ndarray]) -> float:
    """Root mean squared difference relative to the old outputs, the worst of all outputs."""
    return max(float(np.sqrt(((a - b) ** 2).mean() / (a**2).mean())) for a, b in zip(old, new, strict=True))


ENGINES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}
