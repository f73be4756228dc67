"""`.safetensors` and `.tflite` files whose offsets and sizes lie."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np

from hostile.cases import Make, add_all


def safetensors(header: Any, data: bytes = b"\0" * 24, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: Any = 0, end: Any = 24, shape: Any = (2, 3), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file(header: Any, data: bytes = b"\0" * 24, length: int | None = None) -> Make:
    return lambda _: safetensors(header, data, length)


def one(**facts: Any) -> Make:
    return file({"w": entry(**facts)})


TWICE = b'{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"w":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}'
FACTS = "expected dtype, shape and data_offsets of tensor"
add_all("safetensors", "m.safetensors", {
    "a header of 2^63": (file({}, length=2**63), "its header claims"),
    "a header of 2^64 − 1": (file({}, length=2**64 - 1), "its header claims"),
    "a header beyond the end": (file({}, length=4096), "its header claims"),
    "no header": (lambda _: b"\0" * 5, "its header claims"),
    "a key twice": (file(TWICE), "each key once in the header"),
    "a fact twice": (file(b'{"w":{"dtype":"F32","dtype":"F64","shape":[6],"data_offsets":[0,24]}}'), "each key once"),
    "shared bytes": (file({"a": entry(), "b": entry()}), "shares or skips"),
    "bytes half shared": (file({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}), "shares or skips"),
    "a gap": (file({"a": entry(0, 8, [2]), "b": entry(16, 24, [2])}), "shares or skips"),
    "bytes at the end": (file({"a": entry(0, 8, [2])}), "expected 8 bytes of tensors"),
    "an end outside": (one(end=2**40, shape=[2**38]), "bytes of tensors behind the header"),
    "a start behind the end": (one(start=24, end=0), "expected 24 bytes of tensor"),
    "a negative start": (one(start=-24, end=0), FACTS),
    "a shape of 2^62": (one(shape=[2**62, 4]), "bytes of tensor"),
    "a shape that wraps around": (one(shape=[2**32, 2**32, 6]), "bytes of tensor"),
    "a negative shape": (one(shape=[-2, -3]), FACTS),
    "a shape in words": (one(shape="2,3"), FACTS),
    "1,000 axes": (one(shape=[1] * 1000), FACTS),
    "sizes as truths": (one(shape=[True, 6]), FACTS),
    "sizes as floats": (one(shape=[2.0, 3.0]), FACTS),
    "a type of code": (one(dtype="object"), FACTS),
    "no type": (file({"w": {"shape": [6], "data_offsets": [0, 24]}}), FACTS),
    "a list": (file([1, 2]), "expected an object"),
    "JSON 100,000 deep": (file(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "at most 200 levels"),
    "a number of 10,000 digits": (file(b'{"w":' + b"9" * 10_000 + b"}"), "at most 25 digits"),
    "text without an end": (file(b'{"w'), "text that is none"),
    "bytes that are no text": (file(b'{"\xff\xfe": 1}'), "text that is none"),
    "metadata of objects": (file({"__metadata__": {"a": {"b": 1}}, "w": entry()}), "expected texts as the metadata"),
}, door="safetensors")  # fmt: skip


@functools.cache
def tflite() -> bytes:
    """y = x + w, x and w of 7 float32."""
    b = flatbuffers.Builder(0)

    def vector(values: list[int], put: Callable[[int], None], width: int = 4) -> int:
        b.StartVector(width, len(values), width)
        for v in reversed(values):
            put(v)
        return b.EndVector()

    def table(slots: int, fields: dict[int, tuple[str, int]]) -> int:
        b.StartObject(slots)
        for slot, (kind, value) in fields.items():
            getattr(b, f"Prepend{kind}Slot")(slot, value, 0)
        return b.EndObject()

    def tensor(name: str, buffer: int) -> int:
        text, shape = b.CreateString(name), vector([7], b.PrependInt32)
        return table(8, {0: ("UOffsetTRelative", shape), 2: ("Uint32", buffer), 3: ("UOffsetTRelative", text)})

    def tables(places: list[int]) -> int:
        return vector(places, b.PrependUOffsetTRelative)

    b.StartVector(1, 28, 16)
    for byte in reversed(np.ones(7, np.float32).tobytes()):
        b.PrependByte(byte)
    weights = b.EndVector()
    buffers = tables([table(3, {}), table(3, {0: ("UOffsetTRelative", weights)})])
    tensors = tables([tensor("x", 0), tensor("w", 1), tensor("y", 0)])
    inputs, outputs = vector([0, 1], b.PrependInt32), vector([2], b.PrependInt32)
    operators = tables([table(6, {1: ("UOffsetTRelative", inputs), 2: ("UOffsetTRelative", outputs)})])
    first = vector([0], b.PrependInt32)
    last = vector([2], b.PrependInt32)
    fields = {0: tensors, 1: first, 2: last, 3: operators}
    graph = tables([table(5, {slot: ("UOffsetTRelative", place) for slot, place in fields.items()})])
    codes = tables([table(4, {2: ("Int32", 1)})])
    b.Finish(
        table(8, {0: ("Uint32", 3), 1: ("UOffsetTRelative", codes), 2: ("UOffsetTRelative", graph), 4: ("UOffsetTRelative", buffers)}),
        b"TFL3",
    )
    return bytes(b.Output())


def flat(change: Callable[[bytearray], object]) -> Make:
    def make(_: Path) -> bytes:
        data = bytearray(tflite())
        change(data)
        return bytes(data)

    return make


def length_of(old: list[int], new: int) -> Make:
    """Another length for the vector of 32-bit numbers `old`."""
    vector = struct.pack(f"<{len(old) + 1}i", len(old), *old)
    return flat(lambda d: struct.pack_into("<I", d, d.index(vector), new))


def entry_of(old: list[int], new: int) -> Make:
    vector = struct.pack(f"<{len(old) + 1}i", len(old), *old)
    return flat(lambda d: struct.pack_into("<i", d, d.index(vector) + 4, new))


WHOLE = "no whole .tflite file"
add_all("tflite", "m.tflite", {
    "another kind": (lambda _: b"\0" * 4 + b"TFL2" + bytes(40), "does not begin like one"),
    "empty": (lambda _: b"", "does not begin like one"),
    "a root outside": (flat(lambda d: struct.pack_into("<I", d, 0, 2**31)), WHOLE),
    "a root in its own head": (flat(lambda d: struct.pack_into("<I", d, 0, 0)), WHOLE),
    "a table of fields outside": (flat(lambda d: struct.pack_into("<i", d, struct.unpack_from("<I", d)[0], -(2**31))), WHOLE),
    "a table of 65,535 fields": (flat(lambda d: struct.pack_into("<H", d, (r := struct.unpack_from("<I", d)[0]) - struct.unpack_from("<i", d, r)[0], 65535)), WHOLE),
    "a shape of 2^32 axes": (length_of([7], 2**32 - 1), WHOLE),
    "inputs without an end": (length_of([0, 1], 2**31), WHOLE),
    "a tensor that is not there": (entry_of([0, 1], 77), WHOLE),
    "a tensor before the first": (entry_of([0, 1], -5), WHOLE),
    "a shape of 2^31": (entry_of([7], 2**31 - 1), "a tensor of shape"),
    "a negative shape": (entry_of([7], -3), "a tensor of shape"),
    "weights of 2^31 bytes": (flat(lambda d: struct.pack_into("<I", d, d.index(np.ones(7, np.float32).tobytes()) - 4, 2**31)), WHOLE),
    "weights of 4 bytes": (flat(lambda d: struct.pack_into("<I", d, d.index(np.ones(7, np.float32).tobytes()) - 4, 4)), "has 4 bytes instead of"),
    "cut off": (lambda _: tflite()[:-40], WHOLE),
}, door="tflite")  # fmt: skip
