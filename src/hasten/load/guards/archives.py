"""Zip archives: `.pt`, `.pt2`, `.keras`, `.npz`."""

from __future__ import annotations

import io
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from hasten.core.errors import ModelRefused
from hasten.load.guards.places import check_name, most_bytes

_MOST_ENTRIES = 200_000
_HEADER = 30


def check_zip(file: IO[bytes], name: str) -> list[zipfile.ZipInfo]:
    """The directory of an archive, held against what lies where it points.

    Raises:
        ModelRefused: no archive, encrypted or compressed in a rare way, a name twice (also in other spelling) or one that leads
            elsewhere, a link, entries that share bytes or leave the file, more than `most_bytes` when unpacked.
    """
    size = file.seek(0, io.SEEK_END)
    try:
        entries = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, OverflowError) as why:
        raise ModelRefused(f"{name} is no zip archive that can be read ({why})") from why
    if len(entries) > _MOST_ENTRIES:
        raise ModelRefused(f"{name} must hold at most {_MOST_ENTRIES} entries, got {len(entries)}")
    for entry in entries:
        _check_entry(entry, name)
    if len({unicodedata.normalize("NFKC", e.filename).casefold() for e in entries}) < len(entries):
        raise ModelRefused(f"{name} must hold each entry once, got two of one name: not opened")
    total = sum(e.file_size for e in entries)
    if total > most_bytes(size):
        raise ModelRefused(f"{name} of {size} bytes must unpack to at most {most_bytes(size)}, claims {total}: not opened")
    _check_places(file, entries, size, name)
    return entries


def read_zip(path: Path) -> dict[str, bytes]:
    """Every entry by name, unpacked.

    Raises:
        ModelRefused: see `check_zip`; or an entry is damaged.
    """
    with open(path, "rb") as file:
        entries = check_zip(file, path.name)
        try:
            with zipfile.ZipFile(file) as archive:
                found = {e.filename: archive.read(e) for e in entries if not e.is_dir()}
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as why:
            raise ModelRefused(f"{path.name} is damaged ({why}): write it again") from why
    for entry in (e for e in entries if len(found.get(e.filename, b"")) != e.file_size):
        raise ModelRefused(
            f"{path.name} claims to hold {entry.file_size} bytes of {entry.filename[:100]!r}, which are not there: not opened"
        )
    return found


def packed(entries: Mapping[str, bytes]) -> io.BytesIO:
    """The entries as a new archive in memory, stored plain: what a library is given in place of the file."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    made.seek(0)
    return made


def _check_entry(entry: zipfile.ZipInfo, name: str) -> None:
    check_name(entry.orig_filename.removesuffix("/"), f"an entry of {name}")
    if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ModelRefused(f"{name} must hold entries that are stored or deflated, got {entry.filename[:100]!r}, which is neither")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise ModelRefused(f"{name} must hold plain entries, got {entry.filename[:100]!r}, a link: not opened")
    if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
        raise ModelRefused(
            f"{name} claims to hold {entry.file_size} bytes of {entry.filename[:100]!r} in {entry.compress_size}: not opened"
        )


def _check_places(file: IO[bytes], entries: list[zipfile.ZipInfo], size: int, name: str) -> None:
    """Each entry has bytes of its own, and the header in front of them names it as the directory does."""
    end = 0
    for entry in sorted(entries, key=lambda e: e.header_offset):
        file.seek(max(entry.header_offset, 0))
        header = file.read(_HEADER)
        if len(header) < _HEADER or header[:4] != b"PK\x03\x04" or entry.header_offset < end:
            raise ModelRefused(f"{name} claims to hold more than its own {size} bytes: two entries share bytes, or one lies outside")
        length, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        encoding = "utf-8" if int.from_bytes(header[6:8], "little") & 0x800 else "cp437"
        if file.read(length).decode(encoding, "replace") != entry.orig_filename:
            raise ModelRefused(f"{name} calls an entry {entry.filename[:100]!r} in one place and otherwise in another: not opened")
        end = entry.header_offset + _HEADER + length + extra + entry.compress_size
        if end > size:
            raise ModelRefused(f"{name} claims to hold more than its own {size} bytes: {entry.filename[:100]!r} ends outside")
