"""What a model file says of itself (recipe, score, verdict), written where each format keeps such things.

| file | place |
|---|---|
| `model.onnx` | `metadata_props`, key `hasten` |
| `model.xml` (OpenVINO) | `rt_info`, key `hasten` |
| `model.pt2` | extra file `hasten.json`, as `torch.export.save(extra_files=…)` writes it |
| `model.safetensors` | `__metadata__` of the header, key `hasten` |
| `model.tflite`, `model.pte` | `hasten.json` in a ZIP archive behind the model, where TFLite keeps associated files |
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

KEY = "hasten"
_FILE = f"{KEY}.json"
_LONGEST = 1 << 24


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON object into every model file of a packed folder. Raises ValueError where there is none that takes it."""
    text = json.dumps(record, sort_keys=True)
    files = [file for file in sorted(folder.iterdir()) if file.suffix in _WRITE]
    if not files:
        raise ValueError(f"expected a model file that takes metadata ({', '.join(_WRITE)}), got {sorted(p.name for p in folder.iterdir())}")
    for file in files:
        _WRITE[file.suffix](file, text)


def read(file: Path) -> dict[str, Any] | None:
    """The JSON object that `write` put into a model file, None where there is none. Reads a stranger's file: call it in a child."""
    text = _READ[file.suffix](file) if file.suffix in _READ else None
    if not text:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _write_onnx(file: Path, text: str) -> None:
    """Two messages behind each other are one with the repeated fields of both, so nothing else of the file moves."""
    import onnx

    more = onnx.ModelProto()
    more.metadata_props.add(key=KEY, value=text)
    with open(file, "ab") as opened:
        opened.write(more.SerializeToString())


def _read_onnx(file: Path) -> str | None:
    import onnx

    return next((p.value for p in onnx.load(file, load_external_data=False).metadata_props if p.key == KEY), None)


def _write_openvino(file: Path, text: str) -> None:
    import openvino

    model = openvino.Core().read_model(file)
    model.set_rt_info(text, [KEY])
    new = file.with_name("labelled.xml")
    openvino.save_model(model, new, compress_to_fp16=False)
    del model  # it maps the old weights
    for suffix in (".bin", ".xml"):
        new.with_suffix(suffix).replace(file.with_suffix(suffix))


def _read_openvino(file: Path) -> str | None:
    import openvino

    model = openvino.Core().read_model(file)
    return str(model.get_rt_info([KEY]).value) if model.has_rt_info([KEY]) else None


def _write_program(file: Path, text: str) -> None:
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/extra/{_FILE}", text)


def _write_behind(file: Path, text: str) -> None:
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(_FILE, text)


def _read_archive(file: Path) -> str | None:
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as archive:
        found = next((i for i in archive.infolist() if i.filename.rpartition("/")[2] == _FILE), None)
        return None if found is None or found.file_size > _LONGEST else archive.read(found).decode(errors="replace")


def _write_safetensors(file: Path, text: str) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: tensor.clone() for name, tensor in load_file(file).items()}, file, metadata={KEY: text})


def _read_safetensors(file: Path) -> str | None:
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        return (opened.metadata() or {}).get(KEY)


_WRITE: dict[str, Callable[[Path, str], None]] = {
    ".onnx": _write_onnx,
    ".xml": _write_openvino,
    ".pt2": _write_program,
    ".safetensors": _write_safetensors,
    ".tflite": _write_behind,
    ".pte": _write_behind,
}
_READ: dict[str, Callable[[Path], str | None]] = {
    ".onnx": _read_onnx,
    ".xml": _read_openvino,
    ".pt2": _read_archive,
    ".safetensors": _read_safetensors,
    ".tflite": _read_archive,
    ".pte": _read_archive,
}
