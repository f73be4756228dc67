"""Folders that travel between machines, as names and arrays of bytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from hasten.core import folder
from hasten.core.child import Reply
from hasten.core.errors import StorageError


def read(*, place: str) -> Reply:
    """The files of a folder: their names relative to it, and an array of bytes for each."""
    files = sorted(f for f in Path(place).rglob("*") if f.is_file())
    names = [f.relative_to(place).as_posix() for f in files]
    return Reply(names, tuple(np.fromfile(f, np.uint8) for f in files))


def write(*contents: np.ndarray[Any, Any], place: str, names: list[str]) -> None:
    """Makes the folder of what `read` gave, all of it or nothing; a manifest that came with it must hold.

    Raises:
        StorageError: on a name that leads out of the folder, on contents that are not what their manifest says.
    """
    outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside or len(names) != len(contents):
        raise StorageError(f"expected {len(names)} files inside {place}, got {len(contents)} with names like {outside[:1]}")
    files = dict(zip(names, contents, strict=True))
    manifest = files.pop(folder.MANIFEST, None)
    told = {} if manifest is None else json.loads(manifest.tobytes())["sha256"]
    if any(hashlib.sha256(files[name].tobytes()).hexdigest() != digest for name, digest in told.items()):
        raise StorageError(f"what came for {place} is not what its manifest says; send it again")
    with folder.new_folder(Path(place)) as fresh:  # writes the manifest anew
        for name, content in files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(content.tobytes())
