"""Writes a placement into the graph: integer weights and biases, pairs on the activations.

Formulas: real = scale · (integer − zero point); weights symmetric, one scale per output channel,
bias = round(b / (s_x · s_w)) in 32 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper

from hasten.compress.quantize.observe import Range
from hasten.compress.quantize.place import Placement, channel_axis, channels
from hasten.compress.quantize.wiring import Array, Wiring, set_attribute

Points = Mapping[str, tuple[Array, Array]]  # scale and zero point by name
_BIAS_TOP = 2**30  # leaves the upper half of 32 bits to the products that are added to the bias
_LEAST_SCALE = 2.0**-60  # below it values count as zero; the product of two scales stays a normal float32


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """How real numbers become integers.

    Args:
        weight_bits: of the weights, in [2, 8]; they are stored in 8.
        per_channel: one scale for each output channel instead of one for all.
        symmetric: activations with zero point 0 (int8, or uint8 where none is negative) instead of uint8 with any.
    """

    weight_bits: int
    per_channel: bool
    symmetric: bool


def scale_and_zero_point(low: float, high: float, *, symmetric: bool) -> tuple[Array, Array]:
    """The scale (float32) and zero point (int8 or uint8) for a range; zero is always met exactly.

    >>> scale_and_zero_point(-1.0, 4.1, symmetric=False)
    (array(0.02, dtype=float32), array(50, dtype=uint8))
    """
    low, high = min(low, 0.0), max(high, 0.0)
    signed = symmetric and low < 0
    width = max(-low, high) / 127 if signed else (high - low) / 255
    scale = np.float32(width if width > _LEAST_SCALE else 1.0)
    if signed:
        return np.array(scale), np.array(0, dtype=np.int8)
    return np.array(scale), np.array(np.clip(np.round(-low / float(scale)), 0, 255), dtype=np.uint8)


def points_of(placement: Placement, ranges: Mapping[str, Range], numbers: Numbers) -> Points:
    """The scale and zero point of each name in `placement.scale_of`."""
    return {
        name: scale_and_zero_point(*seen, symmetric=numbers.symmetric and name not in placement.unsigned) for name, seen in ranges.items()
    }


def insert(wiring: Wiring, placement: Placement, points: Points, numbers: Numbers, rounded: Mapping[str, Array] | None = None) -> None:
    """Turns the wiring into the Q/DQ graph.

    Args:
        rounded: integer weights (int8) by name of the layer, for the scales that `weight_scale` gives; nearest ones elsewhere.
    """
    layers = set(placement.layers)
    for node in [n for n in wiring.nodes if n.name in layers]:
        scale = float(points[placement.scale_of[node.input[0]]][0])
        _quantize_layer(wiring, node, scale, numbers, (rounded or {}).get(node.name))
    wiring.rewire()
    stored = {}
    for tensor, (step, zero) in sorted(points.items()):
        stored[tensor] = [wiring.add_constant(f"{tensor}_scale", step), wiring.add_constant(f"{tensor}_zero_point", zero)]
    for tensor in placement.pairs:  # each changes what makes and reads its own tensor, and nothing that another one asks for
        _pair(wiring, tensor, stored[placement.scale_of[tensor]], placement)
    wiring.rewire()
    _drop_clips(wiring)


def round_weights(weight: Array, bias: Array | None, *, axis: int, input_scale: float, numbers: Numbers) -> tuple[Array, Array]:
    """Integers (int8) and their scales, (channels,) or () for one; a scale grows where the bias would not fit 32 bits."""
    scale = weight_scale(weight, bias, axis=axis, input_scale=input_scale, numbers=numbers)
    top = highest(numbers)
    return np.clip(np.round(weight / along(scale, weight.ndim, axis)), -top, top).astype(np.int8), scale


def highest(numbers: Numbers) -> int:
    """The largest integer that a weight may become; the smallest is its negative."""
    return int(2 ** (numbers.weight_bits - 1) - 1)


def along(scale: Array, ndim: int, axis: int) -> Array:
    """The scales in a shape that multiplies weights of `ndim` axes."""
    return scale.reshape([-1 if i == axis else 1 for i in range(ndim)]) if scale.ndim else scale


def weight_scale(weight: Array, bias: Array | None, *, axis: int, input_scale: float, numbers: Numbers) -> Array:
    """The scales of the weights, (channels,) or () for one; a scale grows where the bias would not fit 32 bits."""
    top = highest(numbers)
    others = tuple(i for i in range(weight.ndim) if i != axis)
    needed = np.abs(weight).max(axis=others).astype(np.float64) / top
    if bias is not None:
        most = np.abs(bias).astype(np.float64).reshape(-1, weight.shape[axis]).max(axis=0)
        needed = np.maximum(needed, most / (input_scale * _BIAS_TOP))
    if not numbers.per_channel:
        needed = needed.max()
    return np.where(needed > _LEAST_SCALE, needed, 1.0).astype(np.float32)


def weight_and_bias(wiring: Wiring, node: NodeProto) -> tuple[Array, Array | None]:
    """A layer's constants; the bias as (channels,), or None where it has none."""
    weight = wiring.constant(node.input[1])
    bias = wiring.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    assert weight is not None
    return weight, None if bias is None else np.broadcast_to(bias.reshape(-1), channels(wiring, node))


def _quantize_layer(wiring: Wiring, node: NodeProto, input_scale: float, numbers: Numbers, given: Array | None) -> None:
    weight, bias = weight_and_bias(wiring, node)
    axis = channel_axis(node)
    integers, scale = round_weights(weight, bias, axis=axis, input_scale=input_scale, numbers=numbers)
    integers = integers if given is None else given
    _dequantized(wiring, node, 1, integers, scale, axis)
    if bias is not None:
        product = (np.float32(input_scale) * scale).astype(np.float32)
        if product.ndim:
            product = np.tile(product, bias.size // product.size)
        _dequantized(wiring, node, 2, np.round(bias.astype(np.float64) / product).astype(np.int32), product, 0)


def _dequantized(wiring: Wiring, node: NodeProto, place: int, integers: Array, scale: Array, axis: int) -> None:
    """Puts integers and a DequantizeLinear in the place of one of the node's constants."""
    name = node.input[place]
    zeros = np.zeros(scale.shape, dtype=integers.dtype)
    inputs = [
        wiring.share_constant(f"{name}_quantized", integers),  # layers that share a weight share its integers
        wiring.share_constant(f"{name}_scale", scale),
        wiring.share_constant("_".join(("zeros", zeros.dtype.name, *map(str, zeros.shape))), zeros),
    ]
    node.input[place] = f"{node.name}_input{place}_dequantized"
    new = helper.make_node("DequantizeLinear", inputs, [node.input[place]], name=f"{node.name}_input{place}_dequantize")
    if scale.ndim:
        set_attribute(new, "axis", axis)
    wiring.nodes.insert(wiring.index(node), new)


def _pair(wiring: Wiring, tensor: str, numbers: list[str], placement: Placement) -> None:
    """Puts a pair on a tensor. Only its integer readers read the pair, unless the tensor exists in integers only."""
    maker, everyone = wiring.maker(tensor), tensor in placement.whole
    readers = [n for n in wiring.readers(tensor) if everyone or n.name in placement.readers]
    source, integers, out = tensor, f"{tensor}_quantized", f"{tensor}_dequantized"
    if everyone and tensor in wiring.outputs:
        assert maker is not None
        source, out = f"{tensor}_float", tensor
        maker.output[list(maker.output).index(tensor)] = source
    for reader in readers:
        for i, name in enumerate(reader.input):
            reader.input[i] = out if name == tensor else name
    at = 0 if maker is None else wiring.index(maker) + 1
    wiring.nodes[at:at] = [
        helper.make_node("QuantizeLinear", [source, *numbers], [integers], name=f"{tensor}_quantize"),
        helper.make_node("DequantizeLinear", [integers, *numbers], [out], name=f"{tensor}_dequantize"),
    ]


def _drop_clips(wiring: Wiring) -> None:
    """Takes out each Clip in front of a QuantizeLinear that ends where the Clip ends, or before: integers end there anyway.

    int8 ends at −128 where symmetric ranges end at −127, so what lies below the range may come out one step lower than clipped.
    """
    for pair in [n for n in wiring.nodes if n.op_type == "QuantizeLinear"]:
        clip = wiring.maker(pair.input[0])
        if clip is None or clip.op_type != "Clip" or wiring.only_reader(clip.output[0]) is not pair:
            continue
        bounds = _bounds(wiring, clip)
        scale, zero = (wiring.constant(name) for name in pair.input[1:3])
        if bounds is None or scale is None or zero is None:
            continue
        ends = np.iinfo(zero.dtype)
        bottom, top = (np.round(bound / np.float64(scale)) + int(zero) for bound in bounds)
        if bottom <= ends.min + (zero.dtype == np.int8) and top >= ends.max:
            wiring.remove(clip, keep=clip.input[0], drop=clip.output[0])


def _bounds(wiring: Wiring, clip: NodeProto) -> tuple[float, float] | None:
    """Where a Clip ends, infinite at an open end; None where the graph computes it."""
    names = [*clip.input[1:], "", ""][:2]
    values = [wiring.constant(name) if name else np.array(end) for name, end in zip(names, (-np.inf, np.inf), strict=True)]
    low, high = values
    return None if low is None or high is None else (float(low), float(high))
