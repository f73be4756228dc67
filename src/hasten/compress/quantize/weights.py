"""Weight-only integers: a smaller file, computed in floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from onnx import NodeProto, TensorProto, helper

from hasten.compress.quantize.choose import check_keep, kept
from hasten.compress.quantize.normalise import normalise, plain_gemm
from hasten.compress.quantize.wiring import Array, Wiring, attribute, split_gemm
from hasten.compress.settings import whole_numbers
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Profile, Space, Stage

_BLOCKS = (16, 32, 64, 128, 256)
_OVERHEAD = 256  # bytes of the nodes and names that widening takes
_PLACES = {"Gather": (0,), "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2)}  # where weights lie; input 1 in all others
_KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul", *_PLACES)


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights:
    """Stores weights as integers of 8 or 4 bits that are widened to floats where they are used: real = scale · (integer − zero point).

    8 bits: convolutions, linear and recurrent layers and embeddings, one scale for each output channel, gate or row. The graph
    widens them by Cast and Mul (and Sub), which ONNX Runtime does once, at load, so that it runs as fast as before, and OpenVINO
    keeps compressed; a DequantizeLinear there would hide the weights from ONNX Runtime's faster convolutions (2.7 times slower
    where it was measured). 4 bits: linear layers, in blocks along their inputs, as `com.microsoft.MatMulNBits`; the rest in 8 bits.
    What would not get smaller stays.

    Args:
        bits: 8 or 4.
        block: weights of one output channel that share a scale, 16, 32, 64, 128 or 256, where MatMulNBits is used; None takes 32.
        symmetric: zero points in the middle instead of one for each scale.
        integer_products: linear layers run on integers of 8 bits, to which each row of their inputs is rounded while running.
            Faster than floats, and no longer weight-only; needs ONNX Runtime.
        keep: names of nodes, or patterns of names, whose weights stay in floats.

    Raises:
        ValueError: on a setting outside its range, and on a block without MatMulNBits.

    Reference:
        Tim Dettmers and Luke Zettlemoyer, "The case for 4-bit precision: k-bit Inference Scaling Laws", 2022, arXiv 2212.09720.
    """

    takes: ClassVar[Kind] = "graph"
    stage: ClassVar[Stage] = Stage.NUMBERS
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"size", "speed"})
    reads_profile: ClassVar[bool] = True

    bits: Literal[8, 4] = 8
    block: int | None = None
    symmetric: bool = True
    integer_products: bool = False
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole_numbers(self)
        if self.bits not in (8, 4):
            raise ValueError(f"bits must be 8 or 4, got {self.bits}")
        if self.block is not None and self.block not in _BLOCKS:
            raise ValueError(f"block must be one of {', '.join(map(str, _BLOCKS))} or None, got {self.block}")
        if self.block is not None and not self._packs:
            raise ValueError(f"block needs bits=4 or integer_products=True: else each output channel has one scale; got {self.block}")
        check_keep(self.keep)

    @property
    def _packs(self) -> bool:
        return self.bits == 4 or self.integer_products

    def apply(self, network: Network, context: Context) -> Network:
        """The graph with integer weights; the given one stays as it is.

        Raises:
            Unsupported: where the engine cannot do what is asked, where no weight would get smaller, and where the graph is
                quantized already or holds control flow.
            UsageError: where `keep` names a node that the graph does not have.
        """
        _check_engine(self, context.profile)
        wiring = normalise(network.graph)
        chosen = set(kept(self.keep, network.graph, wiring))
        changed = 0
        held = _held_in_floats(wiring, chosen)
        for node in [n for n in wiring.nodes if n.op_type in _KINDS and n.name not in chosen]:
            if self._packs and _packable(wiring, node) and _smaller_packed(wiring, node, self.bits):
                _pack(wiring, split_gemm(wiring, node), self)
                changed += 1
                continue
            for place in _PLACES.get(node.op_type, (1,)):
                changed += node.input[place] not in held and _widened(wiring, node, place, symmetric=self.symmetric)
        if not changed:
            raise Unsupported(f"QuantizeWeights found no float32 weight that {self.bits} bits would make smaller")
        return network.with_body(wiring.model())

    @classmethod
    def space(cls, network: Network) -> Space:
        """The bits, and whether products are in integers."""
        del network
        return {"bits": (8, 4), "integer_products": (False, True)}


def _check_engine(step: QuantizeWeights, profile: Profile) -> None:
    if step._packs and not profile.block_ops:
        raise Unsupported("4-bit blocks need an engine with MatMulNBits, such as OnnxRuntime or OpenVINO; this one has none")
    if step.integer_products and not profile.dynamic_ops:
        raise Unsupported("integer_products needs an engine that finds ranges while running, such as OnnxRuntime; this one does not")


def _held_in_floats(wiring: Wiring, chosen: set[str]) -> set[str]:
    """Constants that a kept node reads."""
    return {name for node in wiring.nodes if node.name in chosen for name in node.input}


def _is_float(wiring: Wiring, name: str) -> bool:
    found = wiring.constants.get(name)
    return found is not None and found.data_type == TensorProto.FLOAT


def _packable(wiring: Wiring, node: NodeProto) -> bool:
    if node.op_type not in ("Gemm", "MatMul") or not _is_float(wiring, node.input[1]) or node.input[0] in wiring.constants:
        return False
    return len(wiring.constants[node.input[1]].dims) == 2 and (node.op_type == "MatMul" or plain_gemm(node))


def _smaller_packed(wiring: Wiring, node: NodeProto, bits: int) -> bool:
    size = int(np.prod(wiring.constants[node.input[1]].dims))
    return size * bits // 8 + size // 4 + _OVERHEAD < 4 * size


def _pack(wiring: Wiring, node: NodeProto, step: QuantizeWeights) -> None:
    weight = wiring.constant(node.input[1])  # (in, out)
    assert weight is not None
    block = step.block or 32
    integers, scale, zeros = in_blocks(weight.T, bits=step.bits, block=block, symmetric=step.symmetric)
    name = node.input[1]
    constants = [(f"{name}_blocks", _joined(integers, step.bits)), (f"{name}_block_scales", scale)]
    if not step.symmetric:
        constants.append((f"{name}_block_zeros", _joined(zeros, step.bits)))
    inputs = [node.input[0], *(wiring.share_constant(f"{n}_{step.bits}", value) for n, value in constants)]
    attributes = {"K": weight.shape[0], "N": weight.shape[1], "bits": step.bits, "block_size": block}
    if step.integer_products:
        attributes["accuracy_level"] = 4  # of their numbering: inputs in 8 bits
    new = helper.make_node("MatMulNBits", inputs, list(node.output), name=node.name, domain="com.microsoft", **attributes)
    wiring.nodes[wiring.index(node)] = new
    wiring.use_domain("com.microsoft", 1)
    wiring.rewire()


def in_blocks(weight: Array, *, bits: int, block: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Integers in [0, 2^bits), scales and zero points of weights (out, in), zeros added to the last block.

    Symmetric: the zero point is 2^(bits − 1), and the weight of the largest magnitude takes the one integer more that lies on its
    side, so that all 2^bits are used; where that is a positive weight, the scale is negative.

    Returns:
        integers (out, blocks, block), uint8; scales (out, blocks), float32; zero points (out, blocks), uint8.
    """
    rows, columns = weight.shape
    count = -(-columns // block)
    padded = np.zeros((rows, count * block), dtype=np.float64)
    padded[:, :columns] = weight
    parts = padded.reshape(rows, count, block)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        most = np.take_along_axis(parts, np.abs(parts).argmax(-1)[..., None], -1)[..., 0]
        scale, zeros = -most / middle, np.full((rows, count), middle)
    else:
        low, high = np.minimum(parts.min(-1), 0.0), np.maximum(parts.max(-1), 0.0)
        scale = (high - low) / top
        zeros = np.round(-low / np.where(scale == 0, 1.0, scale))
    scale = np.where(scale == 0, 1.0, scale).astype(np.float32)
    integers = np.clip(np.round(parts / scale[..., None]) + zeros[..., None], 0, top)
    return integers.astype(np.uint8), scale, np.clip(zeros, 0, top).astype(np.uint8)


def _joined(values: Array, bits: int) -> Array:
    """Two integers of 4 bits in a byte, the first in the lower half; an odd one out is filled up with 0."""
    if bits == 8:
        return values
    even = np.concatenate([values, np.zeros((*values.shape[:-1], values.shape[-1] % 2), dtype=np.uint8)], axis=-1)
    joined: Array = (even[..., 0::2] | (even[..., 1::2] << 4)).astype(np.uint8)
    return joined


def _widened(wiring: Wiring, node: NodeProto, place: int, *, symmetric: bool) -> bool:
    """Puts 8-bit integers, Cast and Mul in the place of a weight; False where it stays."""
    name = node.input[place]
    if not _is_float(wiring, name):
        return False
    weight = wiring.constant(name)
    assert weight is not None
    channels = _channel_axes(node, weight.ndim)
    scales = int(np.prod([weight.shape[i] for i in channels]))
    if weight.ndim < 2 or weight.size + (4 + 4 * (not symmetric)) * scales + _OVERHEAD >= 4 * weight.size:
        return False
    others = tuple(i for i in range(weight.ndim) if i not in channels)
    real = weight.astype(np.float64)
    if symmetric:
        scale, zeros = np.abs(real).max(others, keepdims=True) / 127, None
        scale = np.where(scale == 0, 1.0, scale).astype(np.float32)
        integers = np.clip(np.round(real / scale), -127, 127).astype(np.int8)
    else:
        low, high = np.minimum(real.min(others, keepdims=True), 0.0), np.maximum(real.max(others, keepdims=True), 0.0)
        scale = np.where(high > low, (high - low) / 255, 1.0).astype(np.float32)
        zeros = np.round(-low / scale).astype(np.float32)
        integers = np.clip(np.round(real / scale) + zeros, 0, 255).astype(np.uint8)
    _widen(wiring, node, place, (integers, scale, zeros))
    return True


def _widen(wiring: Wiring, node: NodeProto, place: int, stored: tuple[Array, Array, Array | None]) -> None:
    integers, scale, zeros = stored
    name, base = node.input[place], f"{node.input[place]}_for_{node.name}"
    held = wiring.share_constant(f"{name}_integers", integers)
    new = [helper.make_node("Cast", [held], [f"{base}_cast"], name=f"{base}_cast", to=TensorProto.FLOAT)]
    for kind, what, value in (("Sub", "zeros", zeros), ("Mul", "scale", scale)):
        if value is not None:
            inputs, out = [new[-1].output[0], wiring.share_constant(f"{name}_{what}", value)], f"{base}_{kind.lower()}"
            new.append(helper.make_node(kind, inputs, [out], name=out))
    at = wiring.index(node)
    wiring.nodes[at:at] = new
    node.input[place] = new[-1].output[0]
    wiring.rewire()


def _channel_axes(node: NodeProto, axes: int) -> tuple[int, ...]:
    """The axes along which a weight has scales of its own."""
    if node.op_type == "MatMul":
        return (*range(axes - 2), axes - 1)
    if node.op_type in ("LSTM", "GRU", "RNN"):
        return (0, 1)
    if node.op_type == "Gather":
        return (int(attribute(node, "axis", 0)) % axes,)
    return (1,) if node.op_type == "ConvTranspose" or (node.op_type == "Gemm" and not attribute(node, "transB", 0)) else (0,)
