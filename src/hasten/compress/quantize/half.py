"""Weights stored in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from onnx import NodeProto, TensorProto, helper

from hasten.compress.quantize.choose import check_keep, kept
from hasten.compress.quantize.normalise import laid_open
from hasten.compress.quantize.wiring import Array, Wiring
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage

_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_OVERHEAD = 64  # bytes of the Cast
_SCALED = ("QuantizeLinear", "DequantizeLinear", "MatMulNBits", "DynamicQuantizeLSTM")  # their constant floats are scales


@dataclass(frozen=True, kw_only=True)
class StoreHalf:
    """Stores weights in 16 bits and widens them to 32 when the file is loaded: half the size, the same speed.

    Every float32 constant with two axes or more that would get smaller: weights of layers, embeddings, learnt positions. Biases,
    norms and the scales of integers stay. Values are rounded to the nearest, ties to even; the network computes in 32 bits as before.

    Args:
        format: "fp16" has 11 binary digits and ends at 65504, "bf16" has 8 digits and the range of float32.
        keep: names of nodes, or patterns of names, whose weights stay in 32 bits.

    Raises:
        ValueError: on an unknown format.

    Reference:
        Dhiraj Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training", 2019, arXiv 1905.12322 (the format).
    """

    takes: ClassVar[Kind] = "graph"
    stage: ClassVar[Stage] = Stage.NUMBERS
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"size"})
    reads_profile: ClassVar[bool] = False

    format: Literal["fp16", "bf16"] = "fp16"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in _TYPES:
            raise ValueError(f"format must be 'fp16' or 'bf16', got {self.format!r}")
        check_keep(self.keep)

    def apply(self, network: Network, context: Context) -> Network:
        """The graph with its weights in 16 bits; the given one stays as it is.

        Raises:
            Unsupported: where no weight would get smaller, where one is too large for fp16, and on control flow.
            UsageError: where `keep` names a node that the graph does not have.
        """
        del context
        wiring = laid_open(network.graph)
        chosen = set(kept(self.keep, network.graph, wiring))
        names = [name for name in wiring.constants if _shrinks(wiring, name, chosen)]
        if not names:
            raise Unsupported(f"StoreHalf found no float32 weight that {self.format} would make smaller")
        widened = [_stored(wiring, name, self.format) for name in names]
        wiring.nodes[:0] = widened
        wiring.rewire()
        return network.with_body(wiring.model())

    @classmethod
    def space(cls, network: Network) -> Space:
        """The formats."""
        del network
        return {"format": ("fp16", "bf16")}


def _shrinks(wiring: Wiring, name: str, chosen: set[str]) -> bool:
    tensor, readers = wiring.constants[name], wiring.readers(name)
    if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2 or 2 * int(np.prod(tensor.dims)) <= _OVERHEAD:
        return False
    return bool(readers) and not any(n.name in chosen or n.op_type in _SCALED or _widens(wiring, n) for n in readers)


def _widens(wiring: Wiring, node: NodeProto) -> bool:
    """Whether the node turns stored integers into weights, so that its constant is a scale or zero point."""
    source = wiring.maker(node.input[0]) if node.op_type in ("Sub", "Mul") else None
    while source is not None and source.op_type == "Sub":
        source = wiring.maker(source.input[0])
    return source is not None and source.op_type == "Cast" and source.input[0] in wiring.constants


def _stored(wiring: Wiring, name: str, kind: str) -> NodeProto:
    """The Cast that gives the constant its name back; the constant itself takes another."""
    value = wiring.constant(name)
    assert value is not None
    half = TensorProto(name=f"{name}_{kind}", data_type=_TYPES[kind], dims=value.shape, raw_data=_bits(value, kind, wiring, name).tobytes())
    del wiring.constants[name]
    wiring.constants[half.name] = half
    return helper.make_node("Cast", [half.name], [name], name=f"{name}_widen", to=TensorProto.FLOAT)


def _bits(value: Array, kind: str, wiring: Wiring, name: str) -> Array:
    if kind == "fp16":
        most = float(np.abs(value).max(initial=0))
        if most >= 65520:
            raise Unsupported(f"fp16 ends at 65504, but a weight of {wiring.readers(name)[0].name!r} is {most:.4g}; bf16 holds it")
        return value.astype("<f2")
    whole = np.ascontiguousarray(value, dtype="<f4").view("<u4").astype(np.uint64)
    rounded = (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16  # ties to even
    return np.where(np.isnan(value), 0x7FC0, rounded).astype("<u2")
