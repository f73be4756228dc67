"""ONNX models: what protobuf and the checker let through and no engine should be given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import onnx
from onnx import TensorProto, helper

from hasten.core.errors import ModelRefused

_MOST_NODES = 200_000
_DEEPEST = 32
_MOST_ELEMENTS = 2**31
_LONGEST_NAME = 4096
_SLACK = 2**26
_FIELDS = {
    "float_data": (TensorProto.FLOAT, TensorProto.COMPLEX64),
    "double_data": (TensorProto.DOUBLE, TensorProto.COMPLEX128),
    "int64_data": (TensorProto.INT64,),
    "uint64_data": (TensorProto.UINT32, TensorProto.UINT64),
    "string_data": (TensorProto.STRING,),
}
_TWO = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)
_BITS: dict[int, int] = {TensorProto.UINT4: 4, TensorProto.INT4: 4, TensorProto.FLOAT4E2M1: 4, TensorProto.UINT2: 2, TensorProto.INT2: 2}
_Part = onnx.GraphProto | onnx.FunctionProto


def check_model(model: onnx.ModelProto) -> None:
    """Refuses a model that is more than it says: by depth, by functions that call each other, by tensors without their numbers.

    Raises:
        ModelRefused: more than 200,000 nodes (functions counted where they are called), subgraphs more than 32 deep, functions that call
            themselves, a tensor whose numbers do not fill its shape, a sparse tensor larger than the numbers it could hold.
    """
    functions = {(f.domain, f.name): f for f in model.functions}
    if len(functions) < len(model.functions):
        raise ModelRefused("expected each function once, got two of one name: not opened")
    counted: dict[tuple[str, str], int] = {}
    for key in functions:
        _count_function(key, functions, counted, ())
    _most(_count([model.graph], functions, counted, ()))
    for tensor in tensors(model):
        _check_tensor(tensor)


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model: initializers and attributes, in subgraphs and functions too; refuses sparse ones that are bombs."""
    for inner in (i for part in (model.graph, *model.functions) for i in _inside(part)):
        if isinstance(inner, onnx.GraphProto):
            yield from inner.initializer
            for sparse in inner.sparse_initializer:
                yield from _sparse(sparse)
        for attribute in (a for node in inner.node for a in node.attribute):
            yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
            for sparse in (*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []), *attribute.sparse_tensors):
                yield from _sparse(sparse)


def _inside(part: _Part) -> Iterator[_Part]:
    """The part itself and the graphs inside it."""
    todo: list[tuple[_Part, int]] = [(part, 0)]
    while todo:
        inner, depth = todo.pop()
        if depth > _DEEPEST:
            raise ModelRefused(f"expected subgraphs at most {_DEEPEST} deep, got more: not opened")
        yield inner
        attributes = (a for node in inner.node for a in node.attribute)
        todo.extend((g, depth + 1) for a in attributes for g in (*([a.g] if a.HasField("g") else []), *a.graphs))


def _count_function(
    key: tuple[str, str],
    functions: dict[tuple[str, str], onnx.FunctionProto],
    counted: dict[tuple[str, str], int],
    above: tuple[tuple[str, str], ...],
) -> int:
    """The nodes of a function with the functions inside it written out."""
    if key in above:
        raise ModelRefused(f"expected functions that do not call themselves, got {key[1][:100]!r}, which does: not opened")
    if len(above) > _DEEPEST:
        raise ModelRefused(f"expected functions at most {_DEEPEST} deep, got more: not opened")
    if key not in counted:
        counted[key] = _most(_count([functions[key]], functions, counted, (*above, key)))
    return counted[key]


def _count(
    parts: Iterable[_Part],
    functions: dict[tuple[str, str], onnx.FunctionProto],
    counted: dict[tuple[str, str], int],
    above: tuple[tuple[str, str], ...],
) -> int:
    total = 0
    for part in parts:
        for inner in _inside(part):
            for node in inner.node:
                called = (node.domain, node.op_type)
                total += _count_function(called, functions, counted, above) if called in functions else 1
                _check_names(node)
            _most(total)
    return total


def _most(count: int) -> int:
    if count > _MOST_NODES:
        raise ModelRefused(f"expected at most {_MOST_NODES} nodes with functions written out, got more: not opened")
    return count


def _check_names(node: onnx.NodeProto) -> None:
    for name in (node.name, node.op_type, node.domain, *node.input, *node.output):
        if len(name) > _LONGEST_NAME or "\0" in name:
            raise ModelRefused(f"expected names of at most {_LONGEST_NAME} characters, got {name[:50]!r}…: not opened")


def _sparse(sparse: onnx.SparseTensorProto) -> tuple[onnx.TensorProto, onnx.TensorProto]:
    """Its values and their places; an engine makes it dense when it loads it."""
    dense, given = _elements(sparse.dims), _elements(sparse.values.dims)
    places = list(sparse.indices.int64_data) or list(memoryview(sparse.indices.raw_data[: len(sparse.indices.raw_data) // 8 * 8]).cast("q"))
    width = len(sparse.dims) if len(sparse.indices.dims) == 2 else 1
    limits = list(sparse.dims) if width > 1 else [dense]
    inside = all(0 <= place < limits[i % width] for i, place in enumerate(places))
    if dense > max(_SLACK, 100 * given) or len(places) != given * width or not inside:
        raise ModelRefused(f"expected a sparse tensor whose {given} values lie inside {list(sparse.dims)[:8]}, got others: not opened")
    return sparse.values, sparse.indices


def _check_tensor(tensor: onnx.TensorProto) -> None:
    """Its numbers fill its shape: engines trust the one or the other."""
    count = _elements(tensor.dims)
    if tensor.data_type not in TensorProto.DataType.values() or tensor.data_type == TensorProto.UNDEFINED:
        raise ModelRefused(f"expected tensors of a type that ONNX has, got {tensor.name[:100]!r} of type {tensor.data_type}: not opened")
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    bits = _BITS.get(tensor.data_type) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    if tensor.HasField("raw_data"):
        expected, got = -(-count * bits // 8), len(tensor.raw_data)
    else:
        field = next((f for f, kinds in _FIELDS.items() if tensor.data_type in kinds), "int32_data")
        expected, got = count * (2 if tensor.data_type in _TWO else 1), len(getattr(tensor, field))
        expected = expected if bits >= 8 else -(-count * bits // 8)
    if expected != got:
        raise ModelRefused(
            f"expected {expected} numbers or bytes in tensor {tensor.name[:100]!r} of shape {list(tensor.dims)[:8]}, got {got}: not opened"
        )


def _elements(dims: Iterable[int]) -> int:
    sizes = list(dims)
    if any(s < 0 for s in sizes) or len(sizes) > 64 or math.prod(sizes) > _MOST_ELEMENTS:
        raise ModelRefused(f"expected tensors of at most {_MOST_ELEMENTS} numbers, got one of shape {sizes[:8]}: not opened")
    return math.prod(sizes)
