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
from typing import TYPE_CHECKING, Any

from hasten.core.errors import ModelRefused
from hasten.core.recipe import Recipe, describe
from hasten.load import guards

if TYPE_CHECKING:
    from hasten.core.report import Report

KEY = "hasten"
_TEXTS = ("hasten", "words")
_MAY_BE_TEXTS = ("verdict", "verdict_holds_in", "sentence", "original_sha256")
_FILE = f"{KEY}.json"
_LONGEST = 1 << 24


def label(recipe: Recipe, original_sha256: str) -> dict[str, Any]:
    """What is said of a network that a recipe made, before anything is proved of it."""
    from hasten import __version__

    return {"hasten": __version__, "recipe": recipe.to_json(), "words": str(recipe), "original_sha256": original_sha256, "verdict": None}


def proved(report: Report, recipe: Recipe) -> dict[str, Any]:
    """What a run has found out, in the words of its report; it holds for the engine that is named with it."""
    chosen = report.chosen.to_json() if report.chosen else {}
    return {
        "verdict": report.verdict,
        "verdict_holds_in": describe(recipe.engine),
        "sentence": report.sentence,
        "limit": report.limit.to_json(),
        "score_name": report.score_name,
        **{name: chosen.get(name) for name in ("score", "score_drop")},
        "provenance": report.provenance,
    }


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON object into every model file of a packed folder. Raises ValueError where there is none that takes it."""
    text = json.dumps(record, sort_keys=True)
    files = [file for file in sorted(folder.iterdir()) if file.suffix in _WRITE]
    if not files:
        raise ValueError(f"expected a model file that takes metadata ({', '.join(_WRITE)}), got {sorted(p.name for p in folder.iterdir())}")
    for file in files:
        _WRITE[file.suffix](file, text)


def read(file: Path) -> dict[str, Any] | None:
    """What a model file says of itself, None where it says nothing, or nothing of the kind. Reads a stranger's file: call it in a child.

    Nothing of it has been checked but that it is a label: `hasten` and `words` are texts, `recipe` is an object.
    """
    text = _READ[file.suffix](file) if file.suffix in _READ else None
    if not text or len(text) > _LONGEST:
        return None
    try:
        found = guards.read_json(text.encode(errors="replace"), f"the label of {file.name}")
    except ModelRefused:
        return None
    return found if _is_label(found) else None


def _is_label(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("recipe"), dict):
        return False
    return all(isinstance(found.get(n), str) for n in _TEXTS) and all(isinstance(found.get(n), str | None) for n in _MAY_BE_TEXTS)


def _write_onnx(file: Path, text: str) -> None:
    """Two messages behind each other are one with the repeated fields of both, so nothing else of the file moves.

    A label that is there already is taken out first: keys must not come twice.
    """
    import onnx

    if _read_onnx(file) is not None:
        model = onnx.load(file, load_external_data=False)
        kept = [p for p in model.metadata_props if p.key != KEY]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
        file.write_bytes(model.SerializeToString())
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
