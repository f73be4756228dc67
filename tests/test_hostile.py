"""Opening files that are spoilt, or meant to harm."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hasten.core.errors import DataRefused, ModelRefused
from hasten.load.archive import open_program
from hasten.load.files import open_network
from hasten.load.lower import forward, quiet
from networks import equal, lowered, network, program_file, write

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}


def packed(parts: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, data in parts.items():
            archive.writestr(f"model/{name}", data)
    return file.getvalue()


def pickled_weight(parts: dict[str, bytes], mark: Path) -> None:
    config = json.loads(parts[WEIGHTS])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    parts[WEIGHTS] = json.dumps(config).encode()
    parts["data/weights/" + first["path_name"]] = pickle.dumps(Trap(mark), 2)


def pickled_constant(parts: dict[str, bytes], mark: Path) -> None:
    config = json.loads(parts[CONSTANTS])
    config["config"]["c"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    parts[CONSTANTS] = json.dumps(config).encode()
    parts["data/constants/opaque_obj_0"] = pickle.dumps(Trap(mark), 2)


def pickled_samples(parts: dict[str, bytes], mark: Path) -> None:
    parts[SAMPLES] = pickle.dumps(Trap(mark), 2)


def old_weights(parts: dict[str, bytes], mark: Path) -> None:
    parts["data/weights/model.pt"] = pickle.dumps(Trap(mark), 2)


def evaluated_size(parts: dict[str, bytes], mark: Path) -> None:
    program = parts[MODEL].decode()
    symbol = program[program.index("Symbol('") : program.index(")", program.index("Symbol('")) + 1]
    assert symbol in program
    code = f"__import__('os').mkdir('{mark}')"
    parts[MODEL] = program.replace(f'"expr_str": "{symbol}"', f'"expr_str": {json.dumps(code)}').encode()


HARMFUL: dict[str, tuple[Callable[[dict[str, bytes], Path], None], str | None]] = {
    "pickled weight": (pickled_weight, "as pickled data, which could run code: not opened"),
    "pickled constant": (pickled_constant, "as pickled data, which could run code: not opened"),
    "pickled samples": (pickled_samples, None),
    "old weights": (old_weights, None),
    "evaluated size": (evaluated_size, "expected arithmetic on sizes, got"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_no_code_of_a_file_runs(name: str, tmp_path: Path) -> None:
    """torch.export.load falls for each of these files; opening them refuses, or leaves the harmful entry aside."""
    spoil, words = HARMFUL[name]
    mark, path = tmp_path / "ran", tmp_path / "m.pt2"
    parts = entries(program_file("shared"))
    spoil(parts, mark)
    write(path, packed(parts))
    with quiet(), contextlib.suppress(Exception):
        torch.export.load(path)
    assert mark.exists(), "the trap does not work, so this test shows nothing"
    mark.rmdir()
    if words is None:
        assert open_network(path).kind == "module"
    else:
        with pytest.raises(ModelRefused, match=words):
            open_network(path)
    assert not mark.exists()


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A program whose description was changed."""
    parts = entries(program_file("shared"))
    program = json.loads(parts[MODEL])
    change(program)
    parts[MODEL] = json.dumps(program).encode()
    return packed(parts)


def first_node(program: dict[str, Any]) -> dict[str, Any]:
    return program["graph_module"]["graph"]["nodes"][0]


def signature(program: dict[str, Any]) -> dict[str, Any]:
    return program["graph_module"]["module_call_graph"][0]["signature"]


TREE = '[1, {{"type": "{}", "context": "null", "children_spec": []}}]'
SPOILT: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "no exported program"),
    "garbage": (lambda: bytes(range(256)) * 40, "no exported program"),
    "truncated": (lambda: program_file("shared")[:-400], "holds no program|no exported program"),
    "a pickle": (lambda: pickle.dumps({"a": 1}), "no exported program"),
    "another zip": (lambda: packed({"a": b"1"}), "holds no program called model"),
    "compressed": (lambda: packed(entries(program_file("shared")), zipfile.ZIP_DEFLATED), "stored once and plain"),
    "no weights": (
        lambda: packed({k: v for k, v in entries(program_file("shared")).items() if "weight_0" not in k}),
        "no exported program",
    ),
    "short weights": (lambda: packed(entries(program_file("shared")) | {"data/weights/weight_0": b"1234"}), "no exported program"),
    "another format": (lambda: packed(entries(program_file("shared")) | {"archive_format": b"pt9"}), "format pt2"),
    "a list": (lambda: packed(entries(program_file("shared")) | {MODEL: b"[]"}), "expected an object"),
    "a shell": (lambda: changed(lambda p: first_node(p).update(target="torch.os.system")), "own operators only, got 'torch.os.system'"),
    "a file": (lambda: changed(lambda p: first_node(p).update(target="torch.ops.aten.from_file.default")), "own operators only"),
    "a library": (lambda: changed(lambda p: first_node(p).update(target="torch.ops.load_library")), "own operators only"),
    "an import": (
        lambda: changed(lambda p: signature(p).update(in_spec=TREE.format("collections.defaultdict"))),
        "tuples, lists or dicts, got collections.defaultdict",
    ),
    "an enum": (
        lambda: changed(lambda p: signature(p).update(in_spec=TREE.format("builtins.dict").replace("null", '{\\"__enum__\\": true}'))),
        "plain keys",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_programs_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, words = SPOILT[name]
    with pytest.raises(ModelRefused, match=words) as raised:
        open_network(write(tmp_path / "m.pt2", make()))
    assert "\n" not in str(raised.value)


def test_guards_of_a_file_are_left_aside(tmp_path: Path) -> None:
    data = changed(lambda p: p.update(guards_code=["__import__('os').abort()"]))
    assert open_program(write(tmp_path / "m.pt2", data))._guards_code == []


def test_entries_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """Many directory lines over one stretch of data: small on disk, large in memory."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("m/a", b"0" * 5000)
        for i in range(50):
            twin = zipfile.ZipInfo(f"m/{i}")
            for fact in ("file_size", "compress_size", "header_offset", "CRC"):
                setattr(twin, fact, getattr(archive.filelist[0], fact))
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    with pytest.raises(ModelRefused, match="claims to hold more than its own"):
        open_network(write(tmp_path / "m.pt2", file.getvalue()))


def test_weights_of_a_graphics_card_come_to_the_cpu(tmp_path: Path) -> None:
    parts = entries(program_file("shared"))
    for name in (MODEL, WEIGHTS):
        parts[name] = parts[name].replace(b'"type": "cpu"', b'"type": "cuda"')
    opened = open_network(write(tmp_path / "m.pt2", packed(parts)), network("shared").example)
    assert equal(forward(opened, opened.example), forward(network("shared"), opened.example))


# --- graphs ---


def with_weights_outside(folder: Path, location: str, *, length: int | None = None) -> Path:
    """y = x · w, with w in another file."""
    w = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    raw = w.raw_data
    w.ClearField("raw_data")
    w.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **({} if length is None else {"length": str(length)})}.items():
        w.external_data.add(key=key, value=value)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [w])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    folder.mkdir(exist_ok=True)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    (folder / "raw").write_bytes(raw)
    return folder / "m.onnx"


def test_weights_in_the_own_folder_are_taken_in(tmp_path: Path) -> None:
    path = with_weights_outside(tmp_path / "m", "raw")
    opened = open_network(path)
    for file in (path, tmp_path / "m" / "raw"):
        file.unlink()
    assert equal(forward(opened, (np.ones((1, 3), np.float32),)), (np.full((1, 2), 3.0),))


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("/etc/passwd", "the model's own folder, got '/etc/passwd'"),
        ("../secret", "the model's own folder, got '../secret'"),
        ("soft", "got 'soft', a link"),
        ("hard", "got 'hard', a link"),
        ("away/secret", "got 'away/secret', a link"),
        ("missing", "cannot be read|can be read"),
        ("", "a link"),
    ],
)
def test_weights_elsewhere_are_refused(location: str, words: str, tmp_path: Path) -> None:
    secret = tmp_path / "outside" / "secret"
    secret.parent.mkdir()
    secret.write_bytes(b"\0" * 24)
    path = with_weights_outside(tmp_path / "m", location)
    (tmp_path / "m" / "soft").symlink_to(secret)
    (tmp_path / "m" / "away").symlink_to(secret.parent)
    twin = write(tmp_path / "outside" / "twin", b"\0" * 24)
    os.link(twin, tmp_path / "m" / "hard")
    with pytest.raises(ModelRefused, match=words):
        open_network(path)


def test_weights_longer_than_their_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="expected 100 bytes of weights in 'raw', got 24"):
        open_network(with_weights_outside(tmp_path / "m", "raw", length=100))


@pytest.mark.parametrize("data", [b"", b"garbage" * 100, None])
def test_graphs_that_are_none_are_refused(data: bytes | None, tmp_path: Path) -> None:
    data = lowered("shared").graph.SerializeToString()[:-200] if data is None else data
    with pytest.raises(ModelRefused) as raised:
        open_network(write(tmp_path / "m.onnx", data))
    assert "\n" not in str(raised.value)


def test_an_open_size_needs_data(tmp_path: Path) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(lowered("shared").graph)
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "any"
    path = write(tmp_path / "m.onnx", graph.SerializeToString())
    with pytest.raises(DataRefused, match="must come from data"):
        open_network(path)
    assert open_network(path, network("shared").example).fixed_batch is None
