"""Zip archives that lie: about names, sizes and places."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from hostile.cases import Make, add_all

MEGA = 2**20


def archive(entries: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", how) as file:
        for name, data in entries.items():
            file.writestr(zipfile.ZipInfo(name), data, how)
    return made.getvalue()


def named(name: str) -> Make:
    """An entry of any name: the bytes of another of that length are overwritten, since zipfile mends some."""
    raw = name.encode()

    def make(_: Path) -> bytes:
        if not name.isascii():
            return archive({name: b"1", "b": b"2"})
        return archive({"x" * len(raw): b"1", "b": b"2"}).replace(b"x" * len(raw), raw)

    return make


def edited(change: Callable[[bytearray, int, int], None], how: int = zipfile.ZIP_STORED) -> Make:
    """An honest archive of two entries; `change` gets the bytes and where the first local and directory headers begin."""

    def make(_: Path) -> bytes:
        data = bytearray(archive({"a": b"1" * 100, "b": b"2" * 100}, how))
        change(data, 0, data.index(b"PK\x01\x02"))
        return bytes(data)

    return make


def put(where: str, offset: int, kind: str, value: int) -> Callable[[bytearray, int, int], None]:
    def change(data: bytearray, local: int, central: int) -> None:
        struct.pack_into("<" + kind, data, (local if where == "local" else central) + offset, value)

    return change


def both(offset: int, value: int) -> Callable[[bytearray, int, int], None]:
    def change(data: bytearray, local: int, central: int) -> None:
        struct.pack_into("<I", data, central + offset, value)
        struct.pack_into("<I", data, local + offset - 2, value)

    return change


def zeros(size: int, wrapped: bool = False) -> bytes:
    """Deflated zeros, at least `size` of them, without deflating more than one MiB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 15 if wrapped else -15)
    first = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(MEGA)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + block * -(-size // MEGA) + packer.flush()


def inflating(name: str, size: int, **more: bytes) -> bytes:
    """An archive whose entry `name` unpacks to `size` zeros."""
    data = bytearray(archive({name: zeros(size), **more}, zipfile.ZIP_STORED))
    for start, method, length in ((0, 8, 22), (data.index(b"PK\x01\x02"), 10, 24)):
        struct.pack_into("<H", data, start + method, zipfile.ZIP_DEFLATED)
        struct.pack_into("<I", data, start + length, size)
    return bytes(data)


def bomb(_: Path) -> bytes:
    return inflating("a", 300 * MEGA)


def nested(_: Path) -> bytes:
    """A bomb in a bomb: the outer one is small when unpacked, and nothing unpacks the inner."""
    inner = archive({f"a{i}": bytes(MEGA) for i in range(10)})
    for _ in range(3):
        inner = archive({f"z{i}.zip": inner for i in range(10)})
    return inner


def overlapping(_: Path) -> bytes:
    """Many directory lines over one stretch of data: small on disk, large in memory."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("m/a", b"0" * 5000)
        for i in range(50):
            twin = zipfile.ZipInfo(f"m/{i}")
            for fact in ("file_size", "compress_size", "header_offset", "CRC"):
                setattr(twin, fact, getattr(made.filelist[0], fact))
            made.filelist.append(twin)
            made.NameToInfo[twin.filename] = twin
    return file.getvalue()


def link(_: Path) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        info = zipfile.ZipInfo("a")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    return made.getvalue()


def twice(first: str, second: str) -> Make:
    def make(_: Path) -> bytes:
        spare = "x" * len(second)
        if not second.isascii():
            return archive({first: b"1", second: b"2"})
        return archive({first: b"1", spare: b"2"}).replace(spare.encode(), second.encode())

    return make


def rare(how: int) -> Make:
    return lambda _: archive({"a": b"1" * 1000}, how)


NAMES = {
    "up": "../a", "up in the middle": "a/../../b", "absolute": "/etc/passwd", "backslashes": "..\\a", "a drive": "C:/a", "home": "~/a",
    "escape codes": "\x1b[2Ja", "a line": "a\nb", "nothing but dots": "..", "right to left": "a\u202eb", "too long": "n" * 2000,
}  # fmt: skip
add_all("zip, an entry named", "m.zip", {n: (named(e), "plain relative path|otherwise in another") for n, e in NAMES.items()}, door="zip")
add_all("zip", "m.zip", {
    "an end inside a name": (named("a\0b"), "plain relative path|otherwise in another"),
    "300 MB of zeros": (bomb, "must unpack to at most"),
    "nested": (nested, ""),
    "entries that share bytes": (overlapping, "share bytes"),
    "a link": (link, "a link"),
    "a name twice": (twice("a", "a"), "each entry once"),
    "a name twice but for case": (twice("a", "A"), "each entry once"),
    "a name twice but for width": (twice("a", "\uff21"), "each entry once|plain relative"),
    "bzip2": (rare(zipfile.ZIP_BZIP2), "stored or deflated"),
    "lzma": (rare(zipfile.ZIP_LZMA), "stored or deflated"),
    "encrypted": (edited(put("central", 8, "H", 1)), "stored or deflated"),
    "a stored size of 2^31": (edited(put("central", 24, "I", 2**31)), "claims to hold|unpack"),
    "a packed size of 2^31": (edited(both(20, 2**31)), "claims"),
    "more than is there": (edited(put("central", 24, "I", 5000), zipfile.ZIP_DEFLATED), "claims to hold|damaged"),
    "less than is there": (edited(put("central", 24, "I", 5), zipfile.ZIP_DEFLATED), "damaged|claims"),
    "an offset outside": (edited(put("central", 42, "I", 2**30)), "lies outside|no zip archive"),
    "another name in front": (edited(lambda d, a, b: d.__setitem__(30, ord("q"))), "otherwise in another"),
    "a long name in front": (edited(put("local", 26, "H", 60000)), "otherwise in another"),
    "a wrong checksum": (edited(put("central", 16, "I", 7)), "damaged"),
    "65,535 entries that are not there": (edited(lambda d, a, b: struct.pack_into("<HH", d, d.index(b"PK\x05\x06") + 8, 65535, 65535)), ""),
    "a directory outside": (edited(lambda d, a, b: struct.pack_into("<I", d, d.index(b"PK\x05\x06") + 16, 2**31)), "no zip archive|lies outside"),
    "a directory of 2^31": (edited(lambda d, a, b: struct.pack_into("<I", d, d.index(b"PK\x05\x06") + 12, 2**31)), "no zip archive|lies outside"),
    "cut off": (lambda _: archive({"a": b"1" * 100})[:-30], "no zip archive"),
}, door="zip")  # fmt: skip
