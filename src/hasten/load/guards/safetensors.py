"""`.safetensors` files: the header, read by the specification. The library itself takes keys that come twice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hasten.core.errors import ModelRefused
from hasten.load.guards.jsons import read_json
from hasten.load.guards.places import plain_file

_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip
_HEAD = 8
_MOST_HEADER = 100_000_000
_MOST_AXES = 64


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file: its type as the file names it, its shape, and its bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def check_safetensors(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name, in the order of their bytes, which cover the file without a gap and without sharing any.

    Raises:
        ModelRefused: a header that is no such JSON, a key twice, a type that is unknown, bytes that do not fit the shape.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_HEAD), "little")
        if size < _HEAD or length > min(_MOST_HEADER, size - _HEAD):
            raise ModelRefused(f"{path.name} of {size} bytes is no .safetensors file: its header claims {length} bytes")
        header = read_json(file.read(length), f"the header of {path.name}")
    if not isinstance(header, dict):
        raise ModelRefused(f"expected an object as the header of {path.name}, got {type(header).__name__}")
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise ModelRefused(f"expected texts as the metadata of {path.name}, got something else")
    entries = {name: _entry(name, record, path.name) for name, record in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    end = 0
    for name, entry in ordered.items():
        if entry.start != end:
            raise ModelRefused(
                f"{path.name}: expected tensor {name[:100]!r} to begin at byte {end}, got {entry.start}: it shares or skips some"
            )
        end = entry.end
    if end != size - _HEAD - length:
        raise ModelRefused(f"{path.name}: expected {end} bytes of tensors behind the header, got {size - _HEAD - length}")
    return ordered


def check_index(path: Path) -> dict[str, Path]:
    """The file of each tensor that an index names: plain `.safetensors` files beside it, each of them looked through.

    Raises:
        ModelRefused: no such JSON, a file that lies elsewhere or is none, a damaged one.
    """
    index = read_json(path.read_bytes(), path.name)
    homes = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(homes, dict) or not homes or not all(isinstance(f, str) for f in homes.values()):
        raise ModelRefused(f'{path.name} must be JSON with a "weight_map" of names to files')
    files = {name: plain_file(path.parent, name) for name in sorted(set(homes.values()))}
    for file in files.values():
        check_safetensors(file)
        if file.suffix != ".safetensors":  # readers tell the format by the ending
            raise ModelRefused(f"{path.name} must name files that end in .safetensors, got {file.name[:100]!r}")
    return {tensor: files[name] for tensor, name in homes.items()}


def _entry(name: str, record: object, file: str) -> Entry:
    facts = record if isinstance(record, dict) else {}
    dtype, shape, place = facts.get("dtype"), facts.get("shape"), facts.get("data_offsets")
    sizes_known = isinstance(shape, list) and len(shape) <= _MOST_AXES and all(type(s) is int and s >= 0 for s in shape)
    place_known = isinstance(place, list) and len(place) == 2 and all(type(p) is int and p >= 0 for p in place)
    if set(facts) != {"dtype", "shape", "data_offsets"} or dtype not in _BITS or not sizes_known or not place_known:
        raise ModelRefused(f"{file}: expected dtype, shape and data_offsets of tensor {name[:100]!r}, got {str(record)[:100]}")
    assert isinstance(shape, list)
    assert isinstance(place, list)
    expected = math.prod(shape) * _BITS[dtype] // 8
    if place[1] - place[0] != expected:
        raise ModelRefused(f"{file}: expected {expected} bytes of tensor {name[:100]!r}, got {place[1] - place[0]}")
    return Entry(dtype=dtype, shape=tuple(shape), start=place[0], end=place[1])
