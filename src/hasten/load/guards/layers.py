"""The description of a Keras model: which classes it names, and which of them run code or read files."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from hasten.core.errors import ModelRefused
from hasten.load.guards.archives import read_zip
from hasten.load.guards.hdf5 import check_hdf5
from hasten.load.guards.jsons import read_json

_ROOMS = "layers|models|ops|initializers|regularizers|constraints|activations|optimizers|losses|metrics|dtype_policies|quantizers"
_MODULE = re.compile(rf"keras(\.src)?(\.({_ROOMS})[\w.]*)?")
_CODE = {
    "Lambda": "Python code",
    "__lambda__": "Python code",
    "TorchModuleWrapper": "a pickle",
    "TFSMLayer": "another model file",
    "JaxLayer": "Python code",
    "FlaxLayer": "Python code",
}  # fmt: skip
_FILES = ("vocabulary", "filepath", "file_path", "url", "origin")
_DEEPEST = 100
_WAY_OUT = "export it from Python with model.export(path, format='onnx') and give the .onnx file"


def read_keras(path: Path) -> dict[str, bytes]:
    """The entries of a `.keras` file, all of them checked: call this in a guarded child.

    Raises:
        ModelRefused: see `read_zip`, `read_json`, `check_layers` and `check_hdf5`.
    """
    entries = read_zip(path)
    for needed in ("config.json", "model.weights.h5"):
        if needed not in entries:
            raise ModelRefused(f"{path.name} must hold a {needed} as Keras 3 writes it; save it again with model.save('model.keras')")
    config = read_json(entries["config.json"], f"config.json of {path.name}")
    if not isinstance(config, dict):
        raise ModelRefused(f"expected an object in config.json of {path.name}, got {type(config).__name__}")
    check_layers({k: v for k, v in config.items() if k != "compile_config"}, path.name)
    for name in (n for n in entries if n.endswith(".h5")):
        check_hdf5(io.BytesIO(entries[name]), f"{name} of {path.name}")
    return entries


def check_layers(config: Any, name: str = "the model") -> None:
    """Walks the whole description, a JSON value. Leave `compile_config` out: a network is loaded without its loss.

    Raises:
        ModelRefused: naming the layer: a Lambda or another class that holds code, a class from elsewhere than Keras (a custom layer),
            a vocabulary that lies in a file.
    """
    todo = [(config, name, 0)]
    while todo:
        value, owner, depth = todo.pop()
        if depth > _DEEPEST:
            raise ModelRefused(f"{name} must be described in at most {_DEEPEST} levels, got more: not opened")
        if isinstance(value, dict):
            owner = _named(value, owner)
            _check(value, owner, name)
            todo.extend((v, owner, depth + 1) for v in value.values())
        elif isinstance(value, list):
            todo.extend((v, owner, depth + 1) for v in value)


def _named(value: dict[str, Any], owner: str) -> str:
    config = value.get("config")
    kind = value.get("class_name")
    if isinstance(kind, str) and isinstance(config, dict) and isinstance(config.get("name"), str):
        return f"layer {config['name'][:100]!r} ({kind[:100]})"
    return owner


def _check(value: dict[str, Any], owner: str, name: str) -> None:
    kind, module = value.get("class_name"), value.get("module")
    if kind is not None and not isinstance(kind, str):
        raise ModelRefused(f"{name}: expected the name of a class in {owner}, got {str(kind)[:100]}: not opened")
    if kind is not None and kind.rpartition(">")[2] in _CODE:
        raise ModelRefused(f"{name}: {owner} holds {_CODE[kind.rpartition('>')[2]]} ({kind[:100]}), which is not run; {_WAY_OUT}")
    custom = value.get("registered_name")
    foreign = module is not None and not (isinstance(module, str) and _MODULE.fullmatch(module))
    if kind is not None and (foreign or (module is None and (">" in kind or (isinstance(custom, str) and ">" in custom)))):
        where = f" of {module}"[:100] if module else ""
        raise ModelRefused(f"{name}: {owner} is of the custom class {kind[:100]}{where}, which Keras itself has not; {_WAY_OUT}")
    for key in _FILES:
        if isinstance(value.get(key), str):
            raise ModelRefused(f"{name}: {owner} reads another file ({key} is {value[key][:100]!r}): not opened; {_WAY_OUT}")
