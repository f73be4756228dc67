"""Data sets: arrays of objects, headers that claim memory, bombs of pixels, columns and rows."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hostile.cases import Make, Trap, add_all
from hostile.containers import archive, bomb, inflating, link, overlapping, twice, zeros

X, Y = np.zeros((60, 3), np.float32), np.arange(60) % 3


def npy(array: Any = X) -> bytes:
    made = io.BytesIO()
    np.save(made, array, allow_pickle=True)
    return made.getvalue()


def headed(header: str, data: bytes = b"\0" * 24, version: int = 1) -> bytes:
    text = header.encode("latin1", "replace").ljust(117) + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes((version, 0)) + length + text + data


def npz(**arrays: bytes) -> Make:
    return lambda _: archive({f"{n}.npy": a for n, a in ({"x": npy(), "y": npy(Y)} | arrays).items()})


def plain(data: bytes) -> Make:
    return lambda _: data


def claims(shape: str, kind: str = "<f4") -> bytes:
    return headed(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}")


def trapped() -> bytes:
    array = np.empty(2, object)
    array[:] = Trap()
    return npy(array)


BOOMS = {
    "objects": trapped(), "objects in a record": headed("{'descr': [('a', 'O')], 'fortran_order': False, 'shape': (3,), }"), "a pickle": pickle.dumps(Trap()),
    "a shape of 2^40": claims("(1099511627776,)"), "a shape of 2^31 × 2^31": claims("(2147483648, 2147483648)"), "a shape of 2^64": claims("(18446744073709551616,)"),
    "a negative shape": claims("(-3,)"), "a type of 2^30 bytes": claims("(1,)", "|V1073741824"), "code as header": headed("__import__('os').mkdir('trap')"),
    "a header 5,000 deep": headed("(" * 5000 + ")" * 5000), "a header of 2^31": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b"{" * 99,
    "a header of another version": headed("{}", version=9), "a type of code": claims("(3,)", "__import__"), "no header": b"\x93NUMPY",
}  # fmt: skip
REFUSED = "without objects|declares|room for|must hold|numbers"
add_all("npz with", "d.npz", {n: (npz(x=b), REFUSED) for n, b in BOOMS.items()}, door="data")
add_all("npy with", "d.npy", {n: (plain(b), REFUSED) for n, b in BOOMS.items()}, door="data")
add_all("npz", "d.npz", {
    "300 MB of zeros": (bomb, "unpack to at most"),
    "an array of 300 MB": (lambda _: inflating("x.npy", 300 * 2**20, **{"y.npy": npy(Y)}), "unpack to at most"),
    "a name twice": (twice("x.npy", "x.npy"), "each"),
    "shared bytes": (overlapping, "share bytes"),
    "a link": (link, "a link"),
    "a pickle": (lambda _: pickle.dumps(Trap()), "no zip archive"),
}, door="data")  # fmt: skip


def table(*columns: Any, rows: int = 3) -> bytes:
    lines = [",".join(map(str, columns)), *(",".join("1" for _ in columns) for _ in range(rows))]
    return "\n".join(lines).encode()


add_all("csv", "d.csv", {
    "10^6 columns": (lambda _: table(*range(10**6), "y"), "columns"),
    "a formula": (lambda _: b"a,y\n=cmd|'/C calc'!A0,1\n2,0\n", "features must be numbers"),
    "a column of escape codes": (lambda _: b"\x1b[2Ja,y\nred,1\nx,0\n", "features must be numbers"),
    "a quote without an end": (lambda _: b'a,y\n"1,2\n' + b"3,4\n" * 1000, "table|numbers|column|examples"),
    "a cell of 10 MB": (lambda _: b"a,y\n" + b"9" * 10**7 + b",1\n1,0\n", "numbers|finite|table"),
    "a number of 5,000 digits": (lambda _: b"a,y\n" + b"9" * 5000 + b",1\n1,0\n", "numbers|finite"),
    "ends inside": (lambda _: b"a,y\n1\0,1\n2,0\n", "numbers|table|column"),
    "no text": (lambda _: bytes(range(256)) * 100, "table|column"),
    "columns of one name": (lambda _: b"y,y,y\n1,1,1\n", "column|feature"),
    "2^18 commas": (lambda _: b"," * 2**18, "columns"),
    "a first line of 64 MB": (lambda _: b"a" * 2**26, "columns"),
}, door="data")  # fmt: skip


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, body: bytes | None = None, *more: bytes) -> bytes:
    packed = zlib.compress(bytes(1 + 8), 9) if body is None else body
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def blank(width: int, height: int) -> bytes:
    """A picture of zeros: 1,000 times smaller than its pixels."""
    return png(width, height, zeros((width + 1) * height, wrapped=True))


def folder(*pictures: bytes, name: str = "a") -> Make:
    def make(path: Path) -> None:
        for label in (name, "b"):
            (path / label).mkdir(parents=True)
            for i, picture in enumerate(pictures):
                (path / label / f"{i}.png").write_bytes(picture)

    return make


def linked(path: Path) -> None:
    folder(png(8, 1))(path)
    (path / "a" / "out.png").symlink_to("/etc/passwd")
    (path / "b" / "circle").symlink_to(path)


TEXT = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22), 9))
add_all("pictures", "d", {
    "65,500 × 65,500": (folder(png(65500, 65500)), "DecompressionBomb"),
    "2^31 × 2^31": (folder(png(2**31 - 1, 2**31 - 1)), "Error|Bomb|whole"),
    "8,000 × 8,000 zeros": (folder(blank(8000, 8000)), "room for|take"),
    "two hundred of 1,000 × 1,000 zeros": (folder(*[blank(1000, 1000)] * 100), "room for|take"),
    "a text of 4 MB": (folder(png(8, 1, None, TEXT)), ""),
    "no pixels": (folder(png(0, 0)), "Error|whole|images"),
    "cut off": (folder(png(8, 8)[:60]), "whole image|Error"),
    "a script": (folder(b"#!/bin/sh\nid\n"), "expected images"),
    "PostScript": (folder(b"%!PS-Adobe-3.0 EPSF\n%%BoundingBox: 0 0 9 9\n(id) system\n"), "expected images"),
    "a class with escape codes": (folder(b"none", name="\x1b[2J\x1b]0;owned\x07"), "expected images"),
    "links": (linked, ""),
}, door="data")  # fmt: skip


def parquet(change: Callable[[bytearray], object] | None = None, columns: dict[str, Any] | None = None) -> Make:
    def make(_: Path) -> bytes:
        import pyarrow as pa
        from pyarrow import parquet as pq

        made = io.BytesIO()
        pq.write_table(pa.table(columns or {"a": np.zeros(50), "y": np.arange(50) % 2}), made)
        data = bytearray(made.getvalue())
        if change:
            change(data)
        return bytes(data)

    return make


def many_rows(data: bytearray) -> None:
    """50 rows become 2^34 wherever the description says so: a zigzag number of one byte gets its neighbours'."""
    at = len(data) - 8 - struct.unpack_from("<I", data, len(data) - 8)[0]
    body = bytes(data[at:-8]).replace(b"\x16\x64", b"\x16" + b"\x80\x80\x80\x80\x80\x01")
    data[at:] = body + struct.pack("<I", len(body)) + b"PAR1"


add_all("parquet", "d.parquet", {
    "2^34 rows": (parquet(many_rows), "room for|take|table"),
    "2^24 truths": (lambda p: parquet(columns={n: np.zeros(2**24 + 1, bool) for n in "ay"})(p), "room for|take"),
    "a long text, many times": (lambda p: parquet(columns={"a": ["t" * 2**14] * 2000, "y": np.arange(2000) % 2})(p), "numbers|text"),
    "a footer of 2^31": (parquet(lambda d: struct.pack_into("<I", d, len(d) - 8, 2**31)), "table"),
    "cut off": (parquet(lambda d: d.__delitem__(slice(-100, None))), "table"),
    "no columns": (lambda _: b"PAR1" + bytes(40) + b"PAR1", "table"),
}, door="data")  # fmt: skip
