"""Brings an exported graph into the form that quantization looks for, without changing what it computes.

Constants become initializers, identities go, batch norms and additions of a constant fold into the layer before them, and
means over all positions become GlobalAveragePool.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx.inliner
import onnx.version_converter
from onnx import NodeProto, helper, numpy_helper

from hasten.compress.quantize.wiring import Array, Wiring, attribute, set_attribute
from hasten.core.errors import Unsupported

OLDEST_OPSET = 13  # the first with one scale per channel
_CONVOLUTIONS = ("Conv", "ConvTranspose")


def normalise(model: onnx.ModelProto) -> Wiring:
    """A wiring of the model in its normal form.

    Raises:
        Unsupported: on integer graphs, control flow, and operator sets that cannot be brought up to 13.
    """
    wiring = laid_open(model)
    _refuse_integers(wiring)
    for rewrite in (_drop_identities, _fold_batch_norms, _fold_additions, _pool_means):
        rewrite(wiring)
    return wiring


def laid_open(model: onnx.ModelProto) -> Wiring:
    """A wiring of the model as it is, at operator set 13 or above, with its constants as initializers.

    Raises:
        Unsupported: on control flow, and operator sets that cannot be brought up to 13.
    """
    wiring = Wiring(_upgraded(model))
    for node in wiring.nodes:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise Unsupported(f"cannot quantize around control flow: {node.name!r} ({node.op_type}) holds a graph of its own")
    _lift_constants(wiring)
    return wiring


def _upgraded(model: onnx.ModelProto) -> onnx.ModelProto:
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    if version >= OLDEST_OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, OLDEST_OPSET)
    except (RuntimeError, ValueError) as why:
        raise Unsupported(f"expected opset >= {OLDEST_OPSET}, got {version}, which cannot be converted: {why}") from why


def _refuse_integers(wiring: Wiring) -> None:
    for node in wiring.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or "Integer" in node.op_type or "QLinear" in node.op_type:
            raise Unsupported(f"expected a graph in floats, but {node.name!r} ({node.op_type}) computes in integers already")


def _lift_constants(wiring: Wiring) -> None:
    for node in [n for n in wiring.nodes if n.op_type == "Constant"]:
        value = _constant_value(node)
        if value is not None:
            del wiring.nodes[wiring.index(node)]
            wiring.constants[node.output[0]] = numpy_helper.from_array(value, node.output[0])
    wiring.rewire()
    for node in [n for n in wiring.nodes if n.op_type == "Transpose"]:
        value = wiring.constant(node.input[0])
        if value is not None and node.output[0] not in wiring.outputs:
            del wiring.nodes[wiring.index(node)]
            turned = np.ascontiguousarray(value.transpose(attribute(node, "perm")))
            wiring.constants[node.output[0]] = numpy_helper.from_array(turned, node.output[0])
    wiring.rewire()


def _constant_value(node: NodeProto) -> Array | None:
    name, value = node.attribute[0].name, helper.get_attribute_value(node.attribute[0])
    if name == "value":
        return numpy_helper.to_array(value)
    if name in ("value_float", "value_floats"):
        return np.asarray(value, dtype=np.float32)
    if name in ("value_int", "value_ints"):
        return np.asarray(value, dtype=np.int64)
    return None


def _drop_identities(wiring: Wiring) -> None:
    for node in [n for n in wiring.nodes if n.op_type in ("Identity", "Dropout")]:
        source, out = node.input[0], node.output[0]
        training = len(node.input) > 2 and node.input[2] and not np.all(wiring.constant(node.input[2]) == 0)
        if training or any(wiring.readers(name) or name in wiring.outputs for name in node.output[1:]):
            continue
        if out not in wiring.outputs:
            wiring.remove(node, keep=source, drop=out)
        elif wiring.maker(source) is not None and source not in wiring.outputs:
            wiring.remove(node, keep=out, drop=source)


def _fold_batch_norms(wiring: Wiring) -> None:
    """y = γ (Wx + b − μ) / √(σ² + ε) + β: W' = W·γ/√(σ² + ε), b' = (b − μ)·γ/√(σ² + ε) + β."""
    for norm in [n for n in wiring.nodes if n.op_type == "BatchNormalization"]:
        layer = wiring.maker(norm.input[0])
        facts = [wiring.constant(name) for name in norm.input[1:5]]
        if layer is None or wiring.only_reader(norm.input[0]) is None or not _foldable(wiring, layer):
            continue
        if any(f is None for f in facts) or len([o for o in norm.output if o]) > 1 or attribute(norm, "training_mode", 0):
            continue
        gain, shift, mean, variance = (np.asarray(f, dtype=np.float64) for f in facts)
        factor = gain / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
        weight, bias = _weight_and_bias(wiring, layer, len(factor))
        _put(wiring, layer, _scaled(layer, weight, factor), (bias - mean) * factor + shift)
        wiring.remove(norm, keep=norm.output[0], drop=norm.input[0])


def _foldable(wiring: Wiring, layer: NodeProto) -> bool:
    if layer.op_type == "Gemm" and not plain_gemm(layer):
        return False
    constant = all(name in wiring.constants for name in layer.input[1:] if name)
    return layer.op_type in (*_CONVOLUTIONS, "Gemm") and constant


def plain_gemm(node: NodeProto) -> bool:
    """Whether a Gemm is x·W + b with nothing else."""
    return attribute(node, "alpha", 1.0) == 1.0 and attribute(node, "beta", 1.0) == 1.0 and not attribute(node, "transA", 0)


def _weight_and_bias(wiring: Wiring, layer: NodeProto, channels: int) -> tuple[Array, Array]:
    weight = wiring.constant(layer.input[1])
    bias = wiring.constant(layer.input[2]) if len(layer.input) > 2 and layer.input[2] else None
    assert weight is not None
    return weight.astype(np.float64), np.zeros(channels) if bias is None else bias.astype(np.float64)


def _scaled(layer: NodeProto, weight: Array, factor: Array) -> Array:
    if layer.op_type == "Gemm":
        return weight * (factor[:, None] if attribute(layer, "transB", 0) else factor)
    spatial = (1,) * (weight.ndim - 2)
    if layer.op_type == "Conv":  # (out, in / groups, …)
        return weight * factor.reshape(-1, 1, *spatial)
    groups = attribute(layer, "group", 1)  # ConvTranspose: (in, out / groups, …)
    parts = weight.reshape(groups, -1, *weight.shape[1:]) * factor.reshape(groups, 1, -1, *spatial)
    return parts.reshape(weight.shape)


def _put(wiring: Wiring, layer: NodeProto, weight: Array, bias: Array) -> None:
    kind = wiring.constants[layer.input[1]].data_type
    real = helper.tensor_dtype_to_np_dtype(kind)
    names = [
        wiring.add_constant(f"{layer.name}_weight", weight.astype(real)),
        wiring.add_constant(f"{layer.name}_bias", bias.astype(real)),
    ]
    source = layer.input[0]
    del layer.input[:]
    layer.input.extend([source, *names])


def _fold_additions(wiring: Wiring) -> None:
    """Conv(x) + c → Conv with bias, and MatMul(x, W) + c → Gemm where x has two axes."""
    ranks = wiring.ranks()
    for add in [n for n in wiring.nodes if n.op_type == "Add"]:
        for source, other in (tuple(add.input), tuple(add.input)[::-1]):
            layer, constant = wiring.maker(source), wiring.constant(other)
            if layer is None or constant is None or wiring.only_reader(source) is None:
                continue
            if _take_bias(wiring, layer, constant, ranks):
                wiring.remove(add, keep=add.output[0], drop=source)
                break


def _take_bias(wiring: Wiring, layer: NodeProto, constant: Array, ranks: dict[str, int]) -> bool:
    if layer.op_type not in (*_CONVOLUTIONS, "MatMul") or not _constant_weight(wiring, layer):
        return False
    weight = wiring.constants[layer.input[1]]
    if layer.op_type == "MatMul":
        rank, axis, channels = ranks.get(layer.input[0]), -1, weight.dims[-1]
        if rank != 2 or len(weight.dims) != 2:
            return False
    elif any(layer.input[2:]):
        return False
    else:
        rank, axis = len(weight.dims), 1 - len(weight.dims)
        channels = weight.dims[0] if layer.op_type == "Conv" else weight.dims[1] * attribute(layer, "group", 1)
    shape = (1,) * (rank - constant.ndim) + constant.shape
    if len(shape) != rank or constant.size not in (1, channels) or shape[axis] != constant.size:
        return False
    bias = wiring.add_constant(f"{layer.name}_bias", np.broadcast_to(constant.reshape(-1), channels))
    inputs = [*layer.input[:2], bias]
    del layer.input[:]
    layer.input.extend(inputs)
    layer.op_type = "Gemm" if layer.op_type == "MatMul" else layer.op_type
    return True


def _constant_weight(wiring: Wiring, layer: NodeProto) -> bool:
    return layer.input[0] not in wiring.constants and layer.input[1] in wiring.constants


def _pool_means(wiring: Wiring) -> None:
    """ReduceMean over all positions of (batch, channels, …) → GlobalAveragePool, with Flatten where the axes go."""
    ranks = wiring.ranks()
    for mean in [n for n in wiring.nodes if n.op_type == "ReduceMean"]:
        rank = ranks.get(mean.input[0], 0)
        axes = attribute(mean, "axes")
        if axes is None and len(mean.input) > 1 and mean.input[1]:
            axes = wiring.constant(mean.input[1])
        if rank < 3 or axes is None or sorted(int(a) % rank for a in axes) != list(range(2, rank)):
            continue
        keepdims, source, out = attribute(mean, "keepdims", 1), mean.input[0], mean.output[0]
        for name in ("axes", "keepdims", "noop_with_empty_axes"):
            set_attribute(mean, name, None)
        del mean.input[:]
        mean.input.append(source)
        mean.op_type = "GlobalAveragePool"
        if not keepdims:
            mean.output[0] = f"{out}_pooled"
            flat = helper.make_node("Flatten", [mean.output[0]], [out], name=f"{mean.name}_flatten", axis=1)
            wiring.nodes.insert(wiring.index(mean) + 1, flat)
        wiring.rewire()
