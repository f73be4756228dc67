"""Dynamic int8: integer weights, ranges of activations found while running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnx import NodeProto, TensorProto, helper

from hasten.compress.quantize.choose import check_keep, kept
from hasten.compress.quantize.insert import Numbers, round_weights
from hasten.compress.quantize.normalise import normalise
from hasten.compress.quantize.place import is_layer
from hasten.compress.quantize.static import why_nothing
from hasten.compress.quantize.wiring import Array, Wiring, attribute, set_attribute, split_gemm
from hasten.compress.settings import whole_numbers
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage


@dataclass(frozen=True, kw_only=True)
class QuantizeDynamic:
    """Turns the weights of linear layers and LSTMs into 8-bit integers, and their inputs while running, each tensor by its own range.

    y = s_x · s_w · (q_x − z_x) q_w + b. A linear layer becomes DynamicQuantizeLinear, MatMulInteger and a product with the scales,
    which ONNX Runtime runs as one operator; an LSTM becomes `com.microsoft.DynamicQuantizeLSTM`. Weights are symmetric. No
    calibration: it suits networks whose activations have no fixed range, such as language models. The range is taken over the whole
    batch, so an example's answer depends a little on its company. Convolutions and GRUs stay in floats: ONNX Runtime has no
    integer kernel for a GRU, and its dynamic convolution is slower than floats.

    Args:
        per_channel: one scale for each output channel of the weights instead of one for all.
        weight_bits: width of the weights, in [2, 8]; None takes the profile's. They are stored in 8 bits all the same.
        keep: names of nodes, or patterns of names, that stay in floats.

    Raises:
        ValueError: on a setting outside its range.

    Reference:
        Ofir Zafrir et al., "Q8BERT: Quantized 8Bit BERT", 2019, arXiv 1910.06188, section 3 (dynamic quantization).
    """

    takes: ClassVar[Kind] = "graph"
    stage: ClassVar[Stage] = Stage.NUMBERS
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = True

    per_channel: bool = True
    weight_bits: int | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole_numbers(self)
        if self.weight_bits is not None and not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits must be in [2, 8] or None, got {self.weight_bits}")
        check_keep(self.keep)

    def apply(self, network: Network, context: Context) -> Network:
        """The graph with integer layers; the given one stays as it is.

        Raises:
            Unsupported: where the graph has no layer that this engine runs on integers in this way, where it is quantized already
                or holds control flow.
            UsageError: where `keep` names a node that the graph does not have.
        """
        profile, wiring = context.profile, normalise(network.graph)
        chosen = set(kept(self.keep, network.graph, wiring))
        kinds = profile.dynamic_ops
        layers = [n for n in wiring.nodes if n.name not in chosen and n.op_type in kinds and (is_layer(wiring, n) or is_lstm(wiring, n))]
        if not kinds:
            raise Unsupported("QuantizeDynamic needs an engine that finds ranges while running, such as OnnxRuntime; this one does not")
        if not layers:
            raise Unsupported(why_nothing("QuantizeDynamic", wiring.model(), kinds))
        bits = profile.weight_bits if self.weight_bits is None else self.weight_bits
        numbers = Numbers(weight_bits=bits, per_channel=self.per_channel, symmetric=False)
        for done, node in enumerate(layers):
            if node.op_type == "LSTM":
                _lstm(wiring, node, numbers)
            else:
                _product(wiring, split_gemm(wiring, node), numbers)
            context.progress((done + 1) / len(layers), node.name)
        return network.with_body(wiring.model())

    @classmethod
    def space(cls, network: Network) -> Space:
        """Nothing to vary."""
        del network
        return {}


def is_lstm(wiring: Wiring, node: NodeProto) -> bool:
    """Whether the node is an LSTM with constant float32 weights and the time first, as the integer kernel wants it."""
    if node.op_type != "LSTM" or attribute(node, "layout", 0):
        return False
    weights = [wiring.constants.get(name) for name in node.input[1:3]]
    return all(w is not None and w.data_type == TensorProto.FLOAT for w in weights)


def _product(wiring: Wiring, node: NodeProto, numbers: Numbers) -> None:
    """MatMul(x, W) → DynamicQuantizeLinear, MatMulInteger, Cast, Mul."""
    weight = wiring.constant(node.input[1])
    assert weight is not None
    integers, scale = round_weights(weight, None, axis=1, input_scale=1.0, numbers=numbers)
    x, out, name = node.input[0], node.output[0], node.name
    held = [
        wiring.share_constant(f"{node.input[1]}_quantized", integers),
        wiring.share_constant(f"{node.input[1]}_zero_point", np.zeros(scale.shape, dtype=np.int8)),
        wiring.share_constant(f"{node.input[1]}_scale", scale),
    ]
    ranged = [f"{name}_input", f"{name}_input_scale", f"{name}_input_zero_point"]
    new = [
        helper.make_node("DynamicQuantizeLinear", [x], ranged, name=f"{name}_quantize"),
        helper.make_node("MatMulInteger", [ranged[0], held[0], ranged[2], held[1]], [f"{name}_sums"], name=name),
        helper.make_node("Cast", [f"{name}_sums"], [f"{name}_sums_float"], name=f"{name}_cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [ranged[1], held[2]], [f"{name}_scales"], name=f"{name}_scales"),
        helper.make_node("Mul", [f"{name}_sums_float", f"{name}_scales"], [out], name=f"{name}_dequantize"),
    ]
    at = wiring.index(node)
    wiring.nodes[at : at + 1] = new
    wiring.rewire()


def _lstm(wiring: Wiring, node: NodeProto, numbers: Numbers) -> None:
    """Weights (directions, 4 · hidden, in) are stored as (directions, in, 4 · hidden), which the integer kernel reads."""
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    for place in (1, 2):
        integers, scale, zeros = _by_direction(wiring.constant(inputs[place]), numbers)
        name = inputs[place]
        inputs[place] = wiring.share_constant(f"{name}_quantized", integers)
        inputs += [wiring.share_constant(f"{name}_scale", scale), wiring.share_constant(f"{name}_zero_point", zeros)]
    del node.input[:]
    node.input.extend(inputs)
    node.op_type, node.domain = "DynamicQuantizeLSTM", "com.microsoft"
    set_attribute(node, "layout", None)
    wiring.use_domain("com.microsoft", 1)
    wiring.rewire()


def _by_direction(weight: Array | None, numbers: Numbers) -> tuple[Array, Array, Array]:
    assert weight is not None
    made = [round_weights(w, None, axis=0, input_scale=1.0, numbers=numbers) for w in weight]
    integers = np.stack([q.T for q, _ in made])
    scale = np.stack([s for _, s in made])
    return integers, scale, np.zeros(scale.shape, dtype=np.int8)
