"""Zeros in front of a maximum, kept from an optimization of ONNX Runtime that takes them for nothing."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper


def keep_zeros(graph: onnx.ModelProto) -> None:
    """A `Pad` with zeros that a `MaxPool` reads pads with −0.0, in place.

    ONNX Runtime lets the pool do such a `Pad`, but the pool's own padding never is the largest, while zeros are where all else is
    negative. A negative zero, which is the same number, it leaves alone.
    """
    pooled = {name for node in graph.graph.node if node.op_type == "MaxPool" for name in node.input[:1]}
    values = {w.name: w for w in graph.graph.initializer}
    values |= {n.output[0]: a.t for n in graph.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"}
    for at, node in enumerate(graph.graph.node):
        if node.op_type != "Pad" or node.output[0] not in pooled or len(node.input) < 2:
            continue
        mode = next((a.s for a in node.attribute if a.name == "mode"), b"constant")
        given = node.input[2] if len(node.input) > 2 else ""
        value = numpy_helper.to_array(values[given]) if given in values else None
        if mode != b"constant" or (given and (value is None or value != 0)):
            continue
        dtype = np.float32 if value is None else value.dtype
        name = f"{node.output[0]}_zero_{at}"
        graph.graph.initializer.append(numpy_helper.from_array(np.array(-0.0, dtype), name))
        node.input[:] = [*node.input[:2], name, *node.input[3:]]
