"""A network on disk, for our own processes: written by one, read by another. Not a format to hand around.

The folder holds `network.json`, `example.npz`, and `module.pt` or `model.onnx`; both where the module was imported from the graph.

A user's module is an instance of the user's own class, so only pickle can carry it; cloudpickle also carries classes that were
defined in a script. Reading a pickle runs code. Therefore `load` reads only what the current user wrote where no one else can
write, and nothing that came from outside goes through here (`load.files` opens those).
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import onnx
import torch

from hasten.core.errors import StorageError
from hasten.core.network import Network

FORMAT = 2
_BODY = {"module": "module.pt", "graph": "model.onnx"}


def save(network: Network, folder: Path) -> None:
    """Writes `folder`, which must not exist yet, all of it or nothing.

    Raises:
        StorageError: if it exists, if the disk refuses, or if the module cannot be pickled.
    """
    if folder.exists():
        raise StorageError(f"expected a new folder, got {folder}, which exists; choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(network, part)
        part.rename(folder)
    except Exception as why:  # whatever the user's class raises while it is pickled
        raise StorageError(f"cannot save the network in {folder}: {type(why).__name__}: {why}") from why
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load(folder: Path) -> Network:
    """The network that `save` wrote.

    Raises:
        StorageError: if the folder or its network belongs to another user or may be written by anyone, or is damaged.
    """
    try:
        facts = json.loads((folder / "network.json").read_text())
        kind = facts["kind"]
        if facts["format"] != FORMAT or kind not in _BODY:
            raise ValueError(f"expected format {FORMAT}, got {facts['format']} of kind {kind}")
        for path in (folder, folder / _BODY[kind]):
            _refuse_foreign(path)
        with np.load(folder / "example.npz", allow_pickle=False) as arrays:
            example = tuple(arrays[f"x{i}"] for i in range(len(arrays)))
        body = _read(kind, folder / _BODY[kind])
        source = onnx.load(folder / _BODY["graph"]) if facts["imported"] else None
    except StorageError:
        raise
    except Exception as why:  # a damaged pickle can raise anything
        raise StorageError(f"cannot read the network in {folder}: {type(why).__name__}: {why}; start again") from why
    rest: dict[str, Any] = {"fixed_batch": facts["fixed_batch"], "notes": tuple(facts["notes"])}
    rest["open_axes"] = tuple(tuple(axes) for axes in facts.get("open_axes", ()))
    return Network(kind=kind, body=body, example=example, source=source, **rest)


def _write(network: Network, folder: Path) -> None:
    if network.kind == "module":
        torch.save(network.module, folder / _BODY["module"], pickle_module=cloudpickle)
    else:
        onnx.save(network.graph, folder / _BODY["graph"])
    if network.source is not None:
        onnx.save(network.source, folder / _BODY["graph"])
    for body in set(_BODY.values()):
        if (folder / body).exists():
            (folder / body).chmod(0o600)  # whatever the umask; `load` asks for it
    np.savez(folder / "example.npz", **{f"x{i}": a for i, a in enumerate(network.example)})  # type: ignore[arg-type]
    facts: dict[str, Any] = {"format": FORMAT, "kind": network.kind, "fixed_batch": network.fixed_batch, "notes": network.notes}
    facts["open_axes"] = network.open_axes
    facts["imported"] = network.source is not None
    (folder / "network.json").write_text(json.dumps(facts))


def _read(kind: str, path: Path) -> object:
    return torch.load(path, weights_only=False, map_location="cpu") if kind == "module" else onnx.load(path)


def _refuse_foreign(path: Path) -> None:
    found = path.stat()
    if found.st_uid != os.getuid():
        raise StorageError(f"expected a network written by the current user, got {path}, owned by user {found.st_uid}: not read")
    if found.st_mode & stat.S_IWOTH:
        raise StorageError(f"expected a network that only its owner can change, got {path}, writable by anyone: not read")
