"""`.tflite` files: a FlatBuffer is offsets that a reader follows unasked, so they are followed here first."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

from hasten.core.errors import ModelRefused

_MOST = 2_000_000
_NOTHING = -1
_DEEPEST = 8
# Of each table, what its fields hold, by their number: another table, a vector of tables, a text, or numbers of so many bytes.
_SCHEMA: dict[str, dict[int, tuple[str, str | int]]] = {
    "Model": {1: ("tables", "Code"), 2: ("tables", "Graph"), 3: ("bytes", 1), 4: ("tables", "Buffer"), 5: ("bytes", 4),
              6: ("tables", "Metadata"), 7: ("tables", "Signature")},
    "Code": {1: ("bytes", 1)},
    "Graph": {0: ("tables", "Tensor"), 1: ("bytes", 4), 2: ("bytes", 4), 3: ("tables", "Operator"), 4: ("bytes", 1)},
    "Tensor": {0: ("bytes", 4), 3: ("bytes", 1), 4: ("table", "Quantization"), 7: ("bytes", 4)},
    "Quantization": {0: ("bytes", 4), 1: ("bytes", 4), 2: ("bytes", 4), 3: ("bytes", 8)},
    "Operator": {1: ("bytes", 4), 2: ("bytes", 4), 5: ("bytes", 1), 7: ("bytes", 1), 8: ("bytes", 4)},
    "Buffer": {0: ("bytes", 1)},
    "Metadata": {0: ("bytes", 1)},
    "Signature": {0: ("tables", "Name"), 1: ("tables", "Name"), 2: ("bytes", 1)},
    "Name": {0: ("bytes", 1)},
}  # fmt: skip
_BITS = {0: 32, 1: 16, 2: 32, 3: 8, 4: 64, 6: 8, 7: 16, 8: 64, 9: 8, 10: 64, 11: 128, 12: 64, 15: 32, 16: 16, 17: 4, 18: 16}


class _Table:
    """One table of the file: where its fields lie."""

    def __init__(self, data: bytes, place: int) -> None:
        self.data, self.place = data, place
        table = place - _number(data, place, "<i")
        length = _number(data, table, "<H")
        _span(data, table, length)
        _span(data, place, _number(data, table + 2, "<H"))
        if length < 4 or length % 2:
            raise _Outside(f"a table of fields takes {length} bytes")
        self.fields = struct.unpack_from(f"<{(length - 4) // 2}H", data, table + 4)

    def at(self, field: int) -> int | None:
        """Where the field lies, None where it is left out."""
        offset = self.fields[field] if field < len(self.fields) else 0
        return self.place + offset if offset else None

    def number(self, field: int, kind: str, default: int = 0) -> int:
        place = self.at(field)
        return default if place is None else _number(self.data, place, kind)

    def vector(self, field: int, width: int) -> tuple[int, int]:
        """Where a vector begins and how many entries it has, all of them inside the file."""
        place = self.at(field)
        if place is None:
            return 0, 0
        start = place + _number(self.data, place, "<I")
        count = _number(self.data, start, "<I")
        _span(self.data, start + 4, count * width)
        return start + 4, count

    def numbers(self, field: int) -> tuple[int, ...]:
        """A vector of 32-bit integers."""
        start, count = self.vector(field, 4)
        return struct.unpack_from(f"<{count}i", self.data, start)

    def tables(self, field: int) -> list[_Table]:
        """A vector of tables."""
        start, count = self.vector(field, 4)
        places = (start + 4 * i for i in range(count))
        return [_Table(self.data, p + _number(self.data, p, "<I")) for p in places]


def check_tflite(data: bytes, name: str = "the model") -> None:
    """Follows every table, vector and text of a model, and holds its indices and sizes against each other.

    Raises:
        ModelRefused: no such file, an offset that leads outside, an index without its tensor, buffer or operator, a tensor whose
            numbers do not fill its shape.
    """
    if len(data) < 8 or data[4:8] != b"TFL3":
        raise ModelRefused(f"{name} is no .tflite file: it does not begin like one")
    try:
        model = _Table(data, _number(data, 0, "<I"))
        for count, _ in enumerate(_walk(model)):
            if count > _MOST:
                raise ModelRefused(f"{name} must hold at most {_MOST} parts, got more: not opened")
        buffers = [_buffer(b) for b in model.tables(4)]
        graphs = model.tables(2)
        if not graphs:
            raise _Outside("it holds no graph")
        for graph in graphs:
            _check_graph(graph, len(model.tables(1)), buffers)
    except (struct.error, _Outside) as why:
        raise ModelRefused(f"{name} is no whole .tflite file: {why or 'it ends too early'}; convert the model again") from why


class _Outside(Exception):
    """An offset or an index that leads nowhere."""


def _walk(root: _Table) -> Iterator[_Table]:
    todo = [(root, "Model", 0)]
    while todo:
        table, kind, depth = todo.pop()
        yield table
        if depth > _DEEPEST:
            raise _Outside("its tables lie too deep")
        for field, (way, what) in _SCHEMA[kind].items():
            if isinstance(what, int):
                table.vector(field, what)
            elif way == "tables":
                todo.extend((t, what, depth + 1) for t in table.tables(field))
            elif (place := table.at(field)) is not None:
                todo.append((_Table(table.data, place + _number(table.data, place, "<I")), what, depth + 1))


def _buffer(table: _Table) -> int:
    """Its bytes."""
    _, count = table.vector(0, 1)
    start, size = table.number(1, "<Q"), table.number(2, "<Q")
    if start > 1:
        _span(table.data, start, size)
    return count or (size if start > 1 else 0)


def _check_graph(graph: _Table, codes: int, buffers: list[int]) -> None:
    tensors = graph.tables(0)
    for tensor in tensors:
        shape, kind, buffer = tensor.numbers(0), tensor.number(1, "<b"), tensor.number(2, "<I")
        if buffer >= max(len(buffers), 1) or any(s < 0 for s in shape) or not (kind in _BITS or kind in (5, 13, 14)):
            raise _Outside(f"a tensor of shape {shape[:8]} and type {kind} with buffer {buffer} of {len(buffers)}")
        held = buffers[buffer] if buffers else 0
        bits = math.prod(shape) * _BITS.get(kind, 0)
        if held and bits and tensor.at(6) is None and held != -(-bits // 8):
            raise _Outside(f"a tensor of shape {shape[:8]} has {held} bytes instead of {-(-bits // 8)}")
    for operator in graph.tables(3):
        if operator.number(0, "<I") >= codes:
            raise _Outside(f"operator {operator.number(0, '<I')} of {codes}")
        for field in (1, 2, 8):
            _check_indices(operator.numbers(field), len(tensors))
    for field in (1, 2):
        _check_indices(graph.numbers(field), len(tensors))


def _check_indices(indices: tuple[int, ...], count: int) -> None:
    if any(not _NOTHING <= i < count for i in indices):
        raise _Outside(f"tensor {next(i for i in indices if not _NOTHING <= i < count)} of {count}")


def _number(data: bytes, place: int, kind: str) -> int:
    _span(data, place, struct.calcsize(kind))
    found: int = struct.unpack_from(kind, data, place)[0]
    return found


def _span(data: bytes, place: int, length: int) -> None:
    if place < 0 or length < 0 or place + length > len(data):
        raise _Outside(f"an offset leads to byte {place + length} of {len(data)}")
