"""Q/DQ graphs for tools that find integers in pairs of PyTorch's own operators, such as LiteRT's converter.

A pair of QuantizeLinear and DequantizeLinear becomes one node, `hasten.Rounded`, which is followed as a pair of
`torch.ops.quantized_decomposed`; bytes that are constants become the floats that they stand for with such a pair behind them.
Unsigned bytes become signed ones with their zero point moved along; wider integers stay the roundings that they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from hasten.core.network import Arrays
from hasten.load.importer.interpret import Followed
from hasten.load.importer.nodes import read_model
from hasten.load.importer.quantized import dequantized
from hasten.load.importer.table import Array, Call, Known, operator, to_tensor
from hasten.load.lower import quiet

_DOMAIN = "hasten"
_BYTES = (np.dtype(np.int8), np.dtype(np.uint8))
_INTEGERS = (-128, 127, torch.int8)


def has_integers(graph: onnx.ModelProto) -> bool:
    """Whether it rounds to integers somewhere."""
    return any(node.op_type == "QuantizeLinear" for node in graph.graph.node)


def with_integers(graph: onnx.ModelProto, example: Arrays) -> nn.Module:
    """The graph as a module whose roundings are pairs of `quantized_decomposed`; follow it with torch.export.

    Raises:
        Unsupported: naming the node and the operator that cannot be imported.
    """
    followed = Followed(*read_model(_marked(graph))).eval()
    with quiet(), torch.no_grad():
        followed(*(to_tensor(np.array(a)) for a in example))
    return followed


@operator("hasten.Rounded", folds=False)
def _rounded(x: Tensor, scale: Known, zero: Known, *, axis: int, call: Call) -> Tensor:
    import torch.ao.quantization.fx._decomposed

    ops = torch.ops.quantized_decomposed
    if scale.size == 1:
        how = (scale.item(), int(zero.item()), *_INTEGERS)
        return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *how), *how)  # type: ignore[no-any-return]
    numbers = (call.weight("scale", scale, trained=False), call.weight("zero", zero.astype(np.int64), trained=False))
    along = (*numbers, axis % x.dim(), *_INTEGERS)
    return ops.dequantize_per_channel(ops.quantize_per_channel(x, *along), *along)  # type: ignore[no-any-return]


def _marked(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with `Rounded` in the place of pairs and of constant integers."""
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    body = model.graph
    constants = {i.name: i for i in body.initializer}
    pairs = {n.output[0]: n for n in body.node if n.op_type == "QuantizeLinear"}
    for node in [n for n in body.node if n.op_type == "DequantizeLinear"]:
        scale, zero = (numpy_helper.to_array(constants[n]) if n in constants else None for n in (*node.input[1:], "")[:2])
        source, name = node.input[0], node.output[0]
        if scale is None or scale.ndim > 1 or (zero is None and len(node.input) > 2):
            continue  # found while running, or in blocks
        if source in constants:
            integers = numpy_helper.to_array(constants[source])
            floats = dequantized(to_tensor(integers), to_tensor(scale), None if zero is None else to_tensor(zero), axis=_axis(node))
            narrow = integers.dtype in _BYTES
            body.initializer.append(numpy_helper.from_array(floats.numpy(), f"{name}_floats" if narrow else name))
            if narrow:
                _mark(body, node, f"{name}_floats", scale, _signed(zero, scale, integers.dtype))
            else:
                body.node.remove(node)
        elif source in pairs and (kind := np.dtype(np.uint8) if zero is None else zero.dtype) in _BYTES:
            _mark(body, node, pairs[source].input[0], scale, _signed(zero, scale, kind))
    read = {name for node in body.node for name in node.input} | {o.name for o in body.output}
    for pair in pairs.values():
        if pair.output[0] not in read:
            body.node.remove(pair)
    model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    return model


def _signed(zero: Array | None, scale: Array, kind: np.dtype[Any]) -> Array:
    """The zero point where the integers are signed bytes."""
    moved = 128 if kind == np.uint8 else 0
    return (np.zeros(scale.shape, np.int64) if zero is None else zero.astype(np.int64)) - moved


def _axis(node: onnx.NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "axis"), 1)


def _mark(body: onnx.GraphProto, node: onnx.NodeProto, source: str, scale: Array, zero: Array) -> None:
    """Turns a DequantizeLinear into a Rounded that reads `source`."""
    name, axis = node.output[0], _axis(node)
    body.initializer.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}_step"))
    body.initializer.append(numpy_helper.from_array(zero, f"{name}_zero"))
    rounded = helper.make_node("Rounded", [source, f"{name}_step", f"{name}_zero"], [name], name=node.name, domain=_DOMAIN, axis=axis)
    node.CopyFrom(rounded)
