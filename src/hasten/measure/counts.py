"""How large a network is: numbers in its weights, and multiply-accumulates for one example."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.core.network import Arrays, Network

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def parameters(network: Network) -> int:
    """Numbers held in weights; a weight that two layers share counts once.

    Of a graph: floats in initializers and constants that a layer reads or that are more than one, and integers that are weights of
    an integer layer or of a DequantizeLinear, or bytes that a Cast widens to weights; not scales and zero points, nor the running
    statistics of BatchNormalization.
    """
    if network.kind == "module":
        return sum(p.numel() for p in network.module.parameters())
    return sum(weights(network.graph.graph).values())


def macs(network: Network) -> int | None:
    """Multiply-accumulates of convolutions, matrix products and recurrent layers for one example, or None if it cannot be told.

    A network that is fixed to a batch size is counted at that size and divided by it. A graph with a layer inside a loop or a
    branch, or with an operator of another domain that is not known here, gives None; so does a module with a product that torch's
    counter passes over, or a network that cannot run.
    """
    rows = network.fixed_batch or 1
    example = tuple(a[:rows] for a in network.example)
    total = _module_macs(network.module, example) if network.kind == "module" else _graph_macs(network.graph, example)
    return None if total is None else total // rows


def _module_macs(module: Any, example: Arrays) -> int | None:
    """Counted while it runs with the fused kernels off, which would hide their products from the counter."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    called: set[str] = set()

    class Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    inputs = tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in example)
    counter = FlopCounterMode(display=False)
    try:
        with _unfused(), torch.no_grad(), Names(), counter:  # type: ignore[no-untyped-call]
            module(*inputs)
    except Exception:  # a user's class can raise anything
        return None
    hidden = [name for name in called if name in _UNCOUNTED or not name.startswith(("aten.", "prim"))]
    return None if hidden else int(counter.get_total_flops()) // 2


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Attention, transformer layers and LSTMs run as the products that they are made of."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    mkldnn = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # mkldnn.flags() would also touch TF32, which warns on a CPU
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(mkldnn)


def weights(graph: onnx.GraphProto) -> dict[str, int]:
    """Sizes of the weights of a graph by name, as `parameters` counts them."""
    constants = {t.name: t for t in _constants(graph)}
    packed = {n.input[1]: _attribute(n, "K", 0) * _attribute(n, "N", 0) for n in graph.node if n.op_type == "MatMulNBits"}
    scales: set[str] = set()
    integers: set[str] = set()
    read: set[str] = set()
    for node in graph.node:
        scales.update(node.input[i] for i in _SCALES.get(node.op_type, ()) if i < len(node.input))
        integers.update(node.input[i] for i in _INTEGERS.get(node.op_type, ()) if i < len(node.input))
        read.update(node.input if node.op_type in _COUNTS or node.op_type in _AFFINE else ())
    kept = {n: t for n, t in constants.items() if n not in scales and (t.data_type in _FLOATS or n in integers)}
    sizes = {name: math.prod(t.dims) for name, t in kept.items()}
    widened, factors = _widened(graph, constants)
    sizes = {name: size for name, size in sizes.items() if (size > 1 or name in read) and name not in factors}
    return sizes | packed | {name: math.prod(constants[name].dims) for name in widened}


def _widened(graph: onnx.GraphProto, constants: dict[str, onnx.TensorProto]) -> tuple[set[str], set[str]]:
    """Bytes that a Cast turns into weights, and the zero points and scales that follow it."""
    found: set[str] = set()
    factors: set[str] = set()
    reals: set[str] = set()
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in constants and constants[node.input[0]].data_type in _BYTES:
            found.add(node.input[0])
            reals.add(node.output[0])
        elif node.op_type == "DynamicQuantizeLinear":
            reals.add(node.output[1])  # a scale, multiplied with that of the weights
        elif node.op_type in ("Sub", "Mul") and node.input[0] in reals and node.input[1] in constants:
            factors.add(node.input[1])
            reals.add(node.output[0])
    return found, factors


def _constants(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    import onnx

    yield from graph.initializer
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            named = onnx.TensorProto()
            named.CopyFrom(node.attribute[0].t)
            named.name = node.output[0]
            yield named


def layer_macs(network: Network) -> dict[str, int] | None:
    """Multiply-accumulates of each counted node of a graph for its example, by name; None where `macs` cannot tell."""
    counted = node_macs(network.graph, network.example)
    return None if counted is None else {network.graph.graph.node[i].name: count for i, count in counted.items()}


def tensors(model: onnx.ModelProto, example: Arrays) -> dict[str, tuple[Shape, int]] | None:
    """Shape and bytes of every tensor of a graph for an example, its weights included; None where it does not run.

    All tensors are held at once while it runs.
    """
    weights = {t.name: t for t in _constants(model.graph)}
    computed = [name for node in model.graph.node if node.op_type != "Constant" for name in node.output if name]
    seen = _seen(model, example, computed)
    if seen is None:
        return None
    sizes = {name: (tuple(t.dims), len(t.raw_data) or math.prod(t.dims) * _bits(t) // 8) for name, t in weights.items()}
    return sizes | {name: (v.shape, v.nbytes) for name, v in seen.items() if isinstance(v, np.ndarray)}


def _bits(tensor: onnx.TensorProto) -> int:
    from onnx import helper

    return helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8


def _graph_macs(model: onnx.ModelProto, example: Arrays) -> int | None:
    counted = node_macs(model, example)
    return None if counted is None else sum(counted.values())


def node_macs(model: onnx.ModelProto, example: Arrays) -> dict[int, int] | None:
    """The same as `layer_macs` by place in the graph."""
    if any(a.HasField("g") or a.graphs for node in model.graph.node for a in node.attribute) or model.functions:
        return None
    shapes = _shapes(model, example)
    if shapes is None:
        return None
    found = {}
    for i, node in enumerate(model.graph.node):
        count = _COUNTS.get(node.op_type)
        if count is None:
            if node.domain not in ("", "ai.onnx") and node.op_type not in _FREE:
                return None
            continue
        try:
            found[i] = count(node, shapes)
        except (KeyError, IndexError):  # an equation or a rank that the formula does not cover
            return None
    return found


def _shapes(model: onnx.ModelProto, example: Arrays) -> Shapes | None:
    """The shapes around every counted node, seen in one run: ONNX's inference loses those that the graph itself computes."""
    weights = {t.name: tuple(t.dims) for t in _constants(model.graph)}
    counted = [node for node in model.graph.node if node.op_type in _COUNTS]
    wanted = dict.fromkeys(name for node in counted for name in (*node.input, node.output[0]) if name and name not in weights)
    seen = _seen(model, example, list(wanted))
    return None if seen is None else weights | {name: np.shape(value) for name, value in seen.items()}


def _seen(model: onnx.ModelProto, example: Arrays, wanted: Sequence[str]) -> dict[str, Any] | None:
    """The values of the inputs and of the wanted tensors in one run as the graph stands; None where it does not run."""
    import onnx
    import onnxruntime

    weights = {t.name for t in _constants(model.graph)}
    inputs = [i.name for i in model.graph.input if i.name not in weights]
    given = dict(zip(inputs, example, strict=True))
    open_model = onnx.ModelProto()
    open_model.CopyFrom(model)
    there = {o.name for o in model.graph.output} | set(inputs)
    open_model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in there)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    asked = [name for name in wanted if name not in given]
    try:
        session = onnxruntime.InferenceSession(open_model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values = session.run(asked, given) if asked else []
    except Exception:  # onnxruntime's errors share no base class
        return None
    return given | dict(zip(asked, values, strict=True))


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _convolution(weight: int) -> Callable[[onnx.NodeProto, Shapes], int]:
    """Output elements × weights that each of them reads."""
    return lambda node, shapes: math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[weight]][1:])


def _transposed(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Input elements × weights that each of them meets."""
    return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])


def _product(left: int) -> Callable[[onnx.NodeProto, Shapes], int]:
    """Output elements × the inner axis."""
    return lambda node, shapes: math.prod(shapes[node.output[0]]) * shapes[node.input[left]][-1]


def _gemm(node: onnx.NodeProto, shapes: Shapes) -> int:
    inner = shapes[node.input[0]][0 if _attribute(node, "transA", 0) else 1]
    return math.prod(shapes[node.output[0]]) * inner


def _recurrent(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Steps × batch × all weights. X is (time, batch, features), or with the batch first where `layout` is 1."""
    steps = math.prod(shapes[node.input[0]][:2])
    return steps * (math.prod(shapes[node.input[1]]) + math.prod(shapes[node.input[2]]))


def _packed(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Rows × K × N of a matrix packed in blocks."""
    return math.prod(shapes[node.input[0]][:-1]) * _attribute(node, "K", 0) * _attribute(node, "N", 0)


def _einsum(node: onnx.NodeProto, shapes: Shapes) -> int:
    """The product of all axes; KeyError on an ellipsis, whose axes have no letters."""
    equation = next(a.s for a in node.attribute if a.name == "equation").decode().replace(" ", "")
    if "." in equation:
        raise KeyError(equation)
    axes: dict[str, int] = {}
    for letters, name in zip(equation.partition("->")[0].split(","), node.input, strict=True):
        axes.update(zip(letters, shapes[name], strict=True))
    return math.prod(axes.values()) if len(node.input) > 1 else 0


# What torch's counter passes over although it multiplies.
_UNCOUNTED = frozenset(
    """
    aten.mv aten.addmv aten.dot aten.vdot aten.addr aten.addbmm aten._int_mm aten.mkldnn_rnn_layer aten._cdist_forward
    aten._weight_int4pack_mm aten._weight_int8pack_mm aten._sparse_addmm aten._sparse_mm_reduce_impl
    """.split()  # noqa: SIM905
)
_FLOATS = frozenset({1, 10, 11, 16})  # float, float16, double, bfloat16
_BYTES = frozenset({2, 3})  # uint8, int8
_COUNTS: dict[str, Callable[[onnx.NodeProto, Shapes], int]] = {
    **dict.fromkeys(("Conv", "FusedConv", "ConvInteger"), _convolution(1)),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed,
    **dict.fromkeys(("MatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul"), _product(0)),
    **dict.fromkeys(("Gemm", "FusedGemm", "QGemm"), _gemm),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), _recurrent),
    "MatMulNBits": _packed,
    "Einsum": _einsum,
}
# Operators of onnxruntime's own domain that multiply no matrices.
_FREE = frozenset(
    """
    QLinearAdd QLinearMul QLinearSigmoid QLinearLeakyRelu QLinearConcat QLinearAveragePool QLinearGlobalAveragePool QLinearSoftmax
    QuantizeLinear DequantizeLinear Gelu FastGelu BiasGelu QuickGelu SkipLayerNormalization LayerNormalization
    """.split()  # noqa: SIM905
)
_AFFINE = frozenset({"PRelu", "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"})
# Which inputs are scales, zero points or statistics, and which integers are weights.
_SCALES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), (1, 2)),
    "BatchNormalization": (3, 4),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QGemm": (1, 2, 4, 5, 7, 8),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "DynamicQuantizeMatMul": (2, 3),
    "ConvInteger": (2, 3),
    "MatMulInteger": (2, 3),
    "DynamicQuantizeLSTM": (8, 9, 10, 11),
    "MatMulNBits": (2, 3),
    "Resize": (1, 2),
    "Upsample": (1,),
}
_INTEGERS: dict[str, tuple[int, ...]] = {
    "DequantizeLinear": (0,),
    "QLinearConv": (3, 8),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3, 6),
    "ConvInteger": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (1,),
    "DynamicQuantizeLSTM": (1, 2),
}
