"""What lies at a path, told by its ending and by what is inside; nothing is unpacked or run."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

from hasten.core.errors import ModelRefused, UsageError

__all__ = ["Kind", "kind_of"]

Kind = Literal["program", "torchscript", "onnx", "huggingface", "keras", "savedmodel", "tflite"]
_TAKES = (
    "hasten takes .pt2, .onnx, a Python file with its class (net.py:Class, --weights FILE), a Hugging Face folder, TorchScript, "
    ".keras, .h5, a TensorFlow SavedModel, .tflite, or an nn.Module from Python"
)
_ENDINGS: dict[str, Kind] = {
    ".pt2": "program",
    ".onnx": "onnx",
    ".keras": "keras",
    ".h5": "keras",
    ".hdf5": "keras",
    ".tflite": "tflite",
}
_TORCH = (".pt", ".pth", ".bin", ".ckpt", ".ptl", ".jit", ".torchscript")
_WEIGHTS = "a file of weights without their network; give the class as well: net.py:Class --weights"


def kind_of(path: Path) -> Kind:
    """The kind of network at `path`, a file or a folder.

    Raises:
        UsageError: there is nothing.
        ModelRefused: it is of another kind; the message says what to do with it.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    ending = path.suffix.lower()
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    if ending in _TORCH:
        return _torch(path)
    if ending == ".safetensors" or path.name.endswith(".safetensors.index.json"):
        raise ModelRefused(f"{path.name} is {_WEIGHTS} {path.name}, or its Hugging Face folder with config.json")
    came = f"a file named *{path.suffix}" if path.suffix else "a file without an ending"
    if ending == ".pb":
        came = "a TensorFlow graph; give the folder of a SavedModel (saved_model.pb and variables/), or"
        raise ModelRefused(f"{_TAKES}, got {path.name}, {came} convert it with tf2onnx to .onnx")
    how = 'in PyTorch write torch.export.save(torch.export.export(model, (x,)), "model.pt2")'
    raise ModelRefused(f"{_TAKES}, got {path.name}, {came}; {how}")


def _folder(path: Path) -> Kind:
    if (path / "saved_model.pb").is_file():
        return "savedmodel"
    if (path / "config.json").is_file():
        return "huggingface"
    raise ModelRefused(
        f"expected a folder of Hugging Face (config.json and .safetensors) or a TensorFlow SavedModel (saved_model.pb), got {path}"
    )


def _torch(path: Path) -> Kind:
    """What `torch.jit.save` wrote holds code beside its data; what `torch.save` wrote does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError):
        inside = []
    if "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
        return "torchscript"
    raise ModelRefused(
        f"{path.name} is {_WEIGHTS} {path.name}; a whole module that was pickled is not opened, for reading it runs code: "
        'in PyTorch write torch.export.save(torch.export.export(model, (x,)), "model.pt2")'
    )
