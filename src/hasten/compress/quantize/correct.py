"""Biases that take back what rounding shifts on average: b ← b − (E[ỹ] − E[y]) per output channel.

y is a layer's output in floats and ỹ the one in integers, over the calibration data. Layer after layer in the graph's order, so
that each is corrected behind those that are corrected already.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import NodeProto

from hasten.compress.quantize.adaptive import Calibration
from hasten.compress.quantize.observe import watch
from hasten.compress.quantize.place import Placement, channels
from hasten.compress.quantize.wiring import Array, Wiring

_BATCHES = 16  # of the calibration data that the means are taken over
_TOP = 2**31 - 1


def give_biases(wiring: Wiring, placement: Placement) -> None:
    """Gives each convolution and Gemm without a bias one of zeros."""
    for node in [n for n in wiring.nodes if n.name in set(placement.layers) and n.op_type != "MatMul"]:
        if len(node.input) < 3 or not node.input[2]:
            del node.input[2:]
            node.input.append(wiring.add_constant(f"{node.name}_bias", np.zeros(channels(wiring, node), dtype=np.float32)))
    wiring.rewire()


def means(wiring: Wiring, placement: Placement, seen: Calibration) -> dict[str, Array]:
    """E[y] per output channel by name of the layer."""
    outputs = {n.output[0]: n for n in wiring.nodes if n.name in set(placement.layers)}
    found = _means(wiring.model(), outputs, seen)
    return {node.name: found[out] for out, node in outputs.items()}


def correct(wiring: Wiring, wanted: Mapping[str, Array], seen: Calibration) -> None:
    """Shifts the biases of the Q/DQ graph until its layers have the means `wanted`. A MatMul that no constant is added to stays."""
    layers = [n for n in wiring.nodes if n.name in wanted]
    for done, node in enumerate(layers):
        place = _bias(wiring, node)
        if place is not None:
            out = node.output[0]
            shift = _means(_upto(wiring, out), {out: node}, seen)[out] - wanted[node.name]
            _subtract(wiring, place, shift)
        seen.progress((done + 1) / len(layers), f"correcting {node.name}")


def _means(model: onnx.ModelProto, layers: Mapping[str, NodeProto], seen: Calibration) -> dict[str, Array]:
    sums: dict[str, Array] = {}
    view = seen.view.take(slice(0, _BATCHES * seen.batch))
    count = 0
    for values in watch(model, layers, view, batch=seen.batch):
        count += 1
        for out, node in layers.items():
            axis = 1 if node.op_type in ("Conv", "ConvTranspose") else values[out].ndim - 1
            mean = values[out].mean(axis=tuple(i for i in range(values[out].ndim) if i != axis), dtype=np.float64)
            sums[out] = sums.get(out, 0.0) + mean
    return {out: total / count for out, total in sums.items()}


def _upto(wiring: Wiring, tensor: str) -> onnx.ModelProto:
    """The part of the graph that makes one tensor."""
    model, needed, kept = wiring.model(), {tensor}, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    outputs = [onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None)]
    constants = [t for t in model.graph.initializer if t.name in needed]
    for held, new in ((model.graph.node, kept[::-1]), (model.graph.output, outputs), (model.graph.initializer, constants)):
        del held[:]
        held.extend(new)
    return model


def _bias(wiring: Wiring, node: NodeProto) -> tuple[NodeProto, int] | None:
    """The node and the input where the layer's bias lies: a DequantizeLinear, or the addition behind a MatMul."""
    if node.op_type != "MatMul":
        source = wiring.maker(node.input[2])
        return None if source is None else (source, 0)
    add = wiring.only_reader(node.output[0])
    if add is None or add.op_type != "Add":
        return None
    place = 1 if add.input[0] == node.output[0] else 0
    value = wiring.constant(add.input[place])
    width = channels_of_matmul(wiring, node)
    return (add, place) if value is not None and value.ndim and value.shape[-1] == value.size == width else None


def channels_of_matmul(wiring: Wiring, node: NodeProto) -> int:
    """Output channels of a MatMul whose weights are integers already."""
    source = wiring.maker(node.input[1])
    assert source is not None
    return int(wiring.constants[source.input[0]].dims[-1])


def _subtract(wiring: Wiring, place: tuple[NodeProto, int], shift: Array) -> None:
    node, at = place
    value = wiring.constant(node.input[at])
    assert value is not None
    if node.op_type == "DequantizeLinear":
        scale = wiring.constant(node.input[1])
        assert scale is not None
        new = np.clip(np.round(value - shift / scale.astype(np.float64)), -_TOP, _TOP).astype(np.int32)
    else:
        new = (value - shift.reshape(value.shape)).astype(value.dtype)
    node.input[at] = wiring.add_constant(f"{node.input[at]}_corrected", new)
    wiring.rewire()
