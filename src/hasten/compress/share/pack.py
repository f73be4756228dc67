"""Weights of few values are stored as codebooks and indices.

Shapes: a weight with its groups' axis first (groups · rows, …); indices (groups, n / groups); codebooks (groups, k).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from hasten.compress.quantize.wiring import Wiring
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage

Array = np.ndarray[Any, Any]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
_MOST = 256  # values in a codebook
_SMALLEST = 64  # weights that are worth a look
_GLANCE = 4096  # weights that tell most tensors of many values at once
_OLDEST_OPSET = 13


@dataclass(frozen=True, kw_only=True)
class PackCodebooks:
    """Stores a float tensor that holds at most 256 values, or does so in equal parts of its first or second axis, as indices.

    w = codebook[index], written in plain operators on constants (Cast, Div, Mod, Add, Gather, Reshape) with indices of 1, 2, 4 or
    8 bits, several to a byte. ONNX Runtime and OpenVINO compute the weights once, when they load the file, and then run the
    very network that they ran before. ONNX Runtime's file shrinks at once; OpenVINO's only with `packed=True`, because its
    converter computes constants. What grows by it is left as it is, and so are tensors with values that are not finite.

    Comes behind `ShareWeights`; a step that looks for constant weights (`QuantizeStatic`) finds none afterwards.

    Reference:
        S. Han, H. Mao, W. J. Dally, "Deep Compression", 2015, arXiv:1510.00149.
    """

    takes: ClassVar[Kind] = "graph"
    stage: ClassVar[Stage] = Stage.NUMBERS
    lossless: ClassVar[bool] = True
    aims: ClassVar[frozenset[Aim]] = frozenset({"size"})
    reads_profile: ClassVar[bool] = False

    def apply(self, network: Network, context: Context) -> Network:
        """The graph with packed weights; the given one stays as it is.

        Raises:
            Unsupported: where no tensor has so few values, on control flow, and on operator sets before 13.
        """
        del context
        wiring = Wiring(network.graph)
        _refuse(wiring, network.graph)
        nodes: list[NodeProto] = []
        for name, tensor in list(wiring.constants.items()):
            if packing := _packing(tensor):
                nodes += _replace(wiring, name, packing)
        if not nodes:
            raise Unsupported(f"PackCodebooks needs weights that take at most {_MOST} values, found none; share them first")
        wiring.nodes[:0] = nodes
        wiring.rewire()
        return network.with_body(wiring.model())

    @classmethod
    def space(cls, network: Network) -> Space:
        """Nothing to vary."""
        del network
        return {}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Packing:
    """A tensor as codebooks and indices; `axis` is the one that its groups divide."""

    codebooks: Array
    index: Array
    axis: int
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def bits(self) -> int:
        return next(b for b in (1, 2, 4, 8) if self.codebooks.shape[1] <= 2**b)

    def packed_bytes(self) -> int:
        """About as many bytes as it takes, with its nodes."""
        return self.codebooks.nbytes + self.index.size * self.bits // 8 + 1000


def _refuse(wiring: Wiring, graph: onnx.ModelProto) -> None:
    if wiring.opset() < _OLDEST_OPSET or graph.functions:
        raise Unsupported(f"PackCodebooks needs a graph of opset >= {_OLDEST_OPSET} without functions, got opset {wiring.opset()}")
    for node in wiring.nodes:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise Unsupported(f"cannot pack around control flow: {node.name!r} ({node.op_type}) holds a graph of its own")


def _packing(tensor: TensorProto) -> _Packing | None:
    """The smallest way to pack it, or None where none is smaller."""
    if tensor.data_type not in _FLOATS or np.prod(tensor.dims) < _SMALLEST:
        return None
    value = numpy_helper.to_array(tensor)
    if not np.isfinite(value).all():
        return None
    ways = [p for axis, groups in _divisions(value.shape) if (p := _divided(value, axis, groups))]
    best = min(ways, key=_Packing.packed_bytes, default=None)
    return best if best and best.packed_bytes() < best.size_bytes else None


def _divisions(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(axis, groups): the whole, then all equal parts of the first two axes."""
    yield 0, 1
    for axis, size in enumerate(shape[:2] if len(shape) > 1 else ()):
        yield from ((axis, groups) for groups in range(2, size + 1) if size % groups == 0)


def _divided(value: Array, axis: int, groups: int) -> _Packing | None:
    parts = np.moveaxis(value, axis, 0).reshape(groups, -1)
    if len(np.unique(parts[0, :_GLANCE])) > _MOST:
        return None
    found = []
    for part in parts:
        found.append(np.unique(part, return_inverse=True))
        if len(found[-1][0]) > _MOST:
            return None
    most = max(len(values) for values, _ in found)
    codebooks = np.stack([np.pad(values, (0, most - len(values))) for values, _ in found])
    index = np.stack([inverse.reshape(-1) for _, inverse in found]).astype(np.uint8)
    return _Packing(codebooks=codebooks, index=index, axis=axis, shape=value.shape, size_bytes=value.nbytes)


def _replace(wiring: Wiring, name: str, packing: _Packing) -> list[NodeProto]:
    """Takes the constant `name` out; gives the nodes that compute it."""
    del wiring.constants[name]
    (groups, entries), bits, count = packing.codebooks.shape, packing.bits, packing.index.size
    chain = _Chain(wiring, name)
    chain.start("indices", _bytes(packing.index.reshape(-1), bits))
    chain.add("Cast", to=TensorProto.INT32)
    if bits < 8:
        chain.add("Div", places=np.array([[1 << bits * i for i in range(8 // bits)]], np.int32))
        chain.add("Mod", base=np.array(1 << bits, np.int32))
        chain.add("Reshape", flat=np.array([-1], np.int64))
        if count * bits % 8:
            chain.add("Slice", first=np.array([0], np.int64), last=np.array([count], np.int64))
    if groups > 1:
        chain.add("Reshape", rows=np.array([groups, -1], np.int64))
        chain.add("Add", offsets=entries * np.arange(groups, dtype=np.int32)[:, None])
    chain.gather(packing.codebooks.reshape(-1))
    moved = np.moveaxis(np.empty(packing.shape, bool), packing.axis, 0).shape
    chain.add("Reshape", shape=np.array(moved, np.int64))
    if packing.axis:
        chain.add("Transpose", perm=[1, 0, *range(2, len(moved))])
    return chain.finish()


def _bytes(index: Array, bits: int) -> Array:
    """(n,) indices → (n · bits / 8, 1), the first in the lowest bits."""
    if bits == 8:
        return index
    each = 8 // bits
    padded = np.pad(index, (0, -len(index) % each)).reshape(-1, each)
    joined: Array = (padded.astype(np.uint16) << (bits * np.arange(each, dtype=np.uint16))).sum(1, dtype=np.uint16)
    return joined.astype(np.uint8)[:, None]


class _Chain:
    """Nodes one behind another, each with constants of its own, ending in the tensor `name`."""

    def __init__(self, wiring: Wiring, name: str) -> None:
        self._wiring, self._name, self._nodes = wiring, name, list[NodeProto]()

    def start(self, words: str, value: Array) -> None:
        self._last = self._wiring.add_constant(f"{self._name}_{words}", value)

    def add(self, kind: str, /, **given: Any) -> None:
        """One operator; arrays become its further inputs, other values its attributes."""
        arrays = {words: value for words, value in given.items() if isinstance(value, np.ndarray)}
        inputs = [self._last, *(self._wiring.add_constant(f"{self._name}_{words}", value) for words, value in arrays.items())]
        self._append(kind, inputs, {words: value for words, value in given.items() if words not in arrays})

    def gather(self, codebook: Array) -> None:
        """codebook[last]."""
        self._append("Gather", [self._wiring.add_constant(f"{self._name}_codebook", codebook), self._last], {})

    def finish(self) -> list[NodeProto]:
        """The nodes; the last of them makes the tensor."""
        self._nodes[-1].output[0] = self._name
        return self._nodes

    def _append(self, kind: str, inputs: list[str], attributes: dict[str, Any]) -> None:
        self._last = f"{self._name}_packed{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [self._last], name=f"{self._name}_{kind}{len(self._nodes)}", **attributes))
