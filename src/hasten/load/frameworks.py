"""Keras files, SavedModel folders and `.tflite` files → ONNX, by TensorFlow and tf2onnx in a process of their own.

TensorFlow takes gigabytes and pins what others want newer, so it may live in another environment: the variable
HASTEN_TENSORFLOW names the Python that has it. Only the path goes in and only a checked ONNX file comes out.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx

from hasten.core.errors import BackendMissing, ModelRefused
from hasten.load import guards
from hasten.load.graphs import open_graph
from hasten.load.kinds import Kind

__all__ = ["to_graph"]

PYTHON = "HASTEN_TENSORFLOW"
_CONVERTER = Path(__file__).with_name("conversion.py")
_DEADLINE_S = 480.0
_MISSING = 5
_SETTINGS = {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"}


def to_graph(path: Path, kind: Kind) -> onnx.ModelProto:
    """The network as an ONNX graph; convolutions are in ONNX's own order of axes inside, inputs and outputs as the file has them.

    Raises:
        ModelRefused: the file is damaged, holds code or custom layers (which it names), or operators that ONNX has not.
        BackendMissing: TensorFlow or tf2onnx is not here.
    """
    with tempfile.TemporaryDirectory(prefix="hasten-") as name:
        place = Path(name)
        copy = _checked(path, kind, place)
        _convert(copy, kind, place / "model.onnx", path.name)
        return open_graph(place / "model.onnx")


def _checked(path: Path, kind: Kind, place: Path) -> Path:
    """A copy that was looked through; what TensorFlow reads is never the user's own path."""
    if kind == "savedmodel":
        guards.check_saved_model(path)
        return Path(shutil.copytree(path, place / "saved_model"))
    copy = place / f"model{path.suffix.lower()}"
    if kind == "tflite":
        data = path.read_bytes()
        guards.check_tflite(data, path.name)
        copy.write_bytes(data)
        return copy
    if path.suffix.lower() == ".keras":
        copy.write_bytes(guards.packed(guards.read_keras(path)).getvalue())
        return copy
    shutil.copyfile(path, copy)
    guards.check_hdf5(copy, path.name)
    guards.check_layers(_without_training(_description(copy, path.name)), path.name)
    return copy


def _without_training(config: Any) -> Any:
    return {k: v for k, v in config.items() if k != "compile_config"} if isinstance(config, dict) else config


def _description(path: Path, name: str) -> Any:
    """The model that an `.h5` file of Keras describes."""
    import h5py

    with h5py.File(path, "r") as file:
        text = file.attrs.get("model_config")
    if text is None:
        raise ModelRefused(f"{name} holds weights without their network; save the whole with model.save('model.keras')")
    return guards.read_json(text if isinstance(text, bytes) else str(text).encode(), f"model_config of {name}")


def _convert(path: Path, kind: Kind, into: Path, name: str) -> None:
    python = os.environ.get(PYTHON)
    command = [python or sys.executable, "-I", str(_CONVERTER), kind, str(path), str(into)]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=_DEADLINE_S, env=os.environ | _SETTINGS, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelRefused(f"{name} could not be converted to ONNX within {_DEADLINE_S:.0f} s, stopped") from None
    except OSError as why:
        raise BackendMissing(f"{PYTHON} must name a Python with tensorflow and tf2onnx, got {python}: {why.strerror}") from why
    if done.returncode == 0 and into.is_file():
        return
    said = _said(done.stdout, done.stderr) or f"the converter ended with code {done.returncode}"
    if done.returncode == _MISSING:
        raise BackendMissing(f"{name} needs {said}; pip install 'hasten[tensorflow]', or let {PYTHON} name a Python that has it")
    raise ModelRefused(f"{name} cannot be converted to ONNX: {said}")


def _said(output: bytes, errors: bytes) -> str:
    """What the converter told in its last line, else the last line of all that was printed."""
    last = next((line for line in reversed(output.decode(errors="replace").splitlines()) if line.startswith("{")), "")
    try:
        return str(json.loads(last)["error"])[:500]
    except (ValueError, KeyError, TypeError):
        lines = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""
