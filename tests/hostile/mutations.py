"""Honest small files of each format, spoilt at random by a seed: `mutant("pt2", 17)` is always the same file."""

from __future__ import annotations

import functools
import io
import json
import random
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hostile import checkpoints, data, keras_files, loops, tensors
from hostile.containers import archive
from networks import lowered, program_file

_NUMBERS = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_WORDS = (
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'"x"',
    b"99999999999",
    b"9223372036854775808",
    b"-9223372036854775808",
)


@dataclass(frozen=True)
class Seed:
    """A format: the door, the name of the file, and honest files of it."""

    door: str
    file: str
    made: tuple[Callable[[], bytes], ...]


def _graph(name: str) -> Callable[[], bytes]:
    return lambda: lowered(name).graph.SerializeToString()


def _looped() -> bytes:
    made = loops.looping(3)(None)  # type: ignore[arg-type]
    assert isinstance(made, bytes)
    return made


def _keras() -> bytes:
    layers = [keras_files.layer("Dense", units=3, activation="relu"), keras_files.layer("BatchNormalization", axis=-1)]
    config = json.dumps(keras_files.described(*layers)).encode()
    return archive({"metadata.json": b"{}", "config.json": config, "model.weights.h5": keras_files.hdf5(keras_files.honest)})


def _npz() -> bytes:
    made = io.BytesIO()
    np.savez_compressed(made, x=data.X, y=data.Y)
    return made.getvalue()


def _csv() -> bytes:
    return data.table("a", "b", "c", "y", rows=40).replace(b"1\n1", b"0\n1.5e3")


def _recipe() -> bytes:
    steps = [{"name": "hasten.compress.FoldBatchNorm"}, {"name": "hasten.compress.QuantizeStatic", "weight_bits": 8, "per_channel": True}]
    return json.dumps({"steps": steps, "engine": {"name": "hasten.engines.OnnxRuntime", "threads": 2}}).encode()


def _safetensors() -> bytes:
    header = {"a": tensors.entry(0, 24), "b": tensors.entry(24, 32, [4], "F16"), "__metadata__": {"format": "pt"}}
    return tensors.safetensors(header, bytes(32))


SEEDS = {
    "onnx": Seed("model", "m.onnx", (_graph("shared"), _graph("mlp"), _looped)),
    "pt2": Seed("model", "m.pt2", (functools.partial(program_file, "shared"), functools.partial(program_file, "mlp"))),
    "pt": Seed("pt", "m.pt", (checkpoints.honest, functools.partial(checkpoints.honest, old=True))),
    "safetensors": Seed("safetensors", "m.safetensors", (_safetensors,)),
    "keras": Seed("keras", "m.keras", (_keras,)),
    "h5": Seed("h5", "m.h5", (functools.partial(keras_files.hdf5, keras_files.honest),)),
    "tflite": Seed("tflite", "m.tflite", (tensors.tflite,)),
    "npz": Seed("data", "d.npz", (_npz,)),
    "npy": Seed("data", "d.npy", (data.npy,)),
    "csv": Seed("data", "d.csv", (_csv,)),
    "parquet": Seed("data", "d.parquet", (lambda: data.parquet()(None),)),  # type: ignore[arg-type, return-value]
    "recipe": Seed("recipe", "r.json", (_recipe,)),
}


@functools.cache
def _honest(kind: str, which: int) -> bytes:
    return SEEDS[kind].made[which]()


def mutant(kind: str, number: int) -> bytes:
    """The mutant of that number."""
    chance = random.Random(f"{kind} {number}")
    found = _honest(kind, chance.randrange(len(SEEDS[kind].made)))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        inside = found[:4] == b"PK\x03\x04" and chance.random() < 0.75
        found = _inside(found, chance) if inside else _spoilt(found, chance)
    return found


def _inside(whole: bytes, chance: random.Random) -> bytes:
    """One entry of an archive spoilt and packed again with the right checksum, rather a description than numbers."""
    try:
        with zipfile.ZipFile(io.BytesIO(whole)) as file:
            entries = {i.filename: (i.compress_type, file.read(i)) for i in file.infolist()}
    except Exception:  # spoilt before
        return whole
    if not entries:
        return whole
    named = [n for n in entries if re.search(r"json|pkl|h5|npy|byteorder|version", n)] or list(entries)
    chosen = chance.choice(named if chance.random() < 0.9 else list(entries))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, (how, content) in entries.items():
            info = zipfile.ZipInfo(name)
            file.writestr(info, _spoilt(content, chance) if name == chosen else content, how)
    return made.getvalue()


def _spoilt(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return chance.randbytes(8)
    return chance.choice((_flipped, _flipped, _cut, _spliced, _numbered, _numbered, _worded, _worded))(bytearray(content), chance)


def _flipped(content: bytearray, chance: random.Random) -> bytes:
    for _ in range(chance.choice((1, 1, 2, 8))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def _cut(content: bytearray, chance: random.Random) -> bytes:
    start = chance.randrange(len(content))
    end = len(content) if chance.random() < 0.5 else min(len(content), start + chance.choice((1, 4, 16, 100)))
    return bytes(content[:start] + content[end:])


def _spliced(content: bytearray, chance: random.Random) -> bytes:
    """A stretch of the file again in another place, over what lies there or between it."""
    start, length = chance.randrange(len(content)), chance.choice((1, 4, 8, 32, 200))
    piece, at = content[start : start + length], chance.randrange(len(content))
    return bytes(content[:at] + piece + content[at + (len(piece) if chance.random() < 0.5 else 0) :])


def _numbered(content: bytearray, chance: random.Random) -> bytes:
    """A number of 1, 2, 4 or 8 bytes at its limits, either way round."""
    width = chance.choice((1, 2, 4, 4, 8))
    at = chance.randrange(max(1, len(content) - width + 1))
    content[at : at + width] = (chance.choice(_NUMBERS) % 256**width).to_bytes(width, chance.choice(("little", "little", "big")))
    return bytes(content)


def _worded(content: bytearray, chance: random.Random) -> bytes:
    """In text, a number or a quoted word becomes another one; elsewhere like `_numbered`."""
    places = list(re.finditer(rb'-?\d+|"[^"]{0,40}"|true|false|null', bytes(content[:200_000])))
    if len(places) < 3:
        return _numbered(content, chance)
    place = chance.choice(places)
    new = chance.choice(_WORDS) if chance.random() < 0.6 else chance.choice(places)[0]
    return bytes(content[: place.start()] + new + content[place.end() :])
