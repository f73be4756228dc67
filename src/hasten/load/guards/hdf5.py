"""HDF5 files (`.h5`, and the weights inside `.keras`), looked through with h5py: call this in a guarded child.

An HDF5 file can name other files (external links, external storage, virtual sets), load filters as plugins, and claim sizes that
are not there, since chunks that were never written read as zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import numpy as np

from hasten.core.errors import BackendMissing, ModelRefused
from hasten.load.guards.places import most_bytes

_MOST_OBJECTS = 200_000
_DEEPEST = 64
_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32"}
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_AGAIN = "save the model again with Keras"


def check_hdf5(file: Path | IO[bytes], name: str = "") -> None:
    """Refuses what leads out of the file, and what it does not hold.

    Args:
        file: its path, or a file object with the whole of it in memory.
        name: what messages call it; by default the name of the path.

    Raises:
        ModelRefused: soft or external links, external or virtual data, filters other than gzip, shuffle and fletcher32, groups
            in themselves, object references, more than `most_bytes` of data, a damaged file.
        BackendMissing: without h5py.
    """
    try:
        import h5py
    except ImportError as why:
        raise BackendMissing("reading HDF5 files needs h5py; pip install 'hasten[keras]'") from why
    name = name or (file.name if isinstance(file, Path) else "the file")
    size = _size(file, name)
    try:
        with h5py.File(file, "r") as opened:
            _walk(opened, size, name)
    except ModelRefused:
        raise
    except Exception as why:  # h5py raises anything on a damaged file
        raise ModelRefused(f"{name} is no whole HDF5 file ({type(why).__name__}: {str(why)[:200]}); {_AGAIN}") from why


def _size(file: Path | IO[bytes], name: str) -> int:
    if isinstance(file, Path):
        with open(file, "rb") as opened:
            return _size(opened, name)
    size = file.seek(0, 2)
    file.seek(0)
    if file.read(len(_SIGNATURE)) != _SIGNATURE:
        raise ModelRefused(f"{name} is no HDF5 file: it does not begin like one; {_AGAIN}")
    file.seek(0)
    return size


def _walk(root: Any, size: int, name: str) -> None:
    import h5py

    todo, seen, total = [(root, 0)], {h5py.h5o.get_info(root.id).addr}, 0
    while todo:
        group, depth = todo.pop()
        _check_attributes(group, size, name)
        if depth > _DEEPEST or len(seen) > _MOST_OBJECTS:
            raise ModelRefused(f"{name} must hold at most {_MOST_OBJECTS} groups and tensors, {_DEEPEST} deep, got more: not opened")
        for key in group:
            child = _child(group, key, name)
            address = h5py.h5o.get_info(child.id).addr
            if address in seen:
                raise ModelRefused(f"{name} must hold {key[:100]!r} once, got it under two names: not opened")
            seen.add(address)
            if isinstance(child, h5py.Group):
                todo.append((child, depth + 1))
            else:
                total += _check_set(child, size, name)
        if total > most_bytes(size):
            raise ModelRefused(f"{name} of {size} bytes must hold at most {most_bytes(size)} bytes of tensors, claims more: not opened")


def _child(group: Any, key: str, name: str) -> Any:
    import h5py

    link = group.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise ModelRefused(f"{name} must hold its tensors itself, got {key[:100]!r}, a link to another place: not opened")
    child = group[key]
    if not isinstance(child, (h5py.Group, h5py.Dataset)):
        raise ModelRefused(f"{name} must hold groups and tensors, got {key[:100]!r}, which is neither: not opened")
    return child


def _check_set(data: Any, size: int, name: str) -> int:
    """How many bytes the set takes in memory."""
    created = data.id.get_create_plist()
    what = f"tensor {data.name[:100]!r} of {name}"
    if created.get_external_count() or data.is_virtual:
        raise ModelRefused(f"{what} must lie in the file itself, got one in another file: not opened")
    filters = [created.get_filter(i)[0] for i in range(created.get_nfilters())]
    if unknown := [f for f in filters if f not in _FILTERS]:
        raise ModelRefused(f"{what} must be stored plain or with {', '.join(_FILTERS.values())}, got filter {unknown[0]}: not opened")
    _check_type(data.dtype, what)
    _check_attributes(data, size, name)
    chunk = int(np.prod(data.chunks, dtype=object)) * data.dtype.itemsize if data.chunks else 0
    declared = int(np.prod(data.shape or (), dtype=object)) * data.dtype.itemsize
    if chunk > most_bytes(size) or (declared and not data.id.get_storage_size()):
        raise ModelRefused(f"{what} claims {max(chunk, declared)} bytes that the file does not hold: not opened")
    return int(declared)


def _check_attributes(thing: Any, size: int, name: str) -> None:
    for key in thing.attrs:
        found = thing.attrs.get_id(key)
        _check_type(found.dtype, f"attribute {key[:100]!r} of {name}")
        if int(np.prod(found.shape or (), dtype=object)) * found.dtype.itemsize > most_bytes(size):
            raise ModelRefused(f"attribute {key[:100]!r} of {name} claims more bytes than the file can hold: not opened")


def _check_type(dtype: Any, what: str) -> None:
    import h5py

    text = h5py.check_string_dtype(dtype) is not None
    if (not text and dtype.kind not in "fiubSV") or (dtype.kind == "V" and dtype.names is not None):
        raise ModelRefused(f"{what} must be numbers or text, got {dtype}: not opened")
