"""Opening files that are spoilt, or meant to harm. The corpus is tests/hostile; benchmarks/hostile.py opens all of it and more."""

from __future__ import annotations

import contextlib
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from hasten import prepare
from hasten.core import errors
from hasten.core.child import Child
from hasten.core.errors import DataRefused, ModelRefused
from hasten.load import guards
from hasten.load.archive import open_program
from hasten.load.files import open_network
from hasten.load.lower import forward, quiet
from hasten.load.source import Source
from hostile import CASES, Case, checkpoints, keras_files, loops, paths, programs, tensors
from hostile.cases import MARK
from hostile.doors import DOORS
from hostile.mutations import SEEDS, mutant
from networks import equal, lowered, network, program_file, write

READ = [c for c in CASES if c.reading]
REFUSALS = {"data": DataRefused, "recipe": errors.UsageError, "run": errors.StorageError}
MUTANTS = 25
IN_PROCESS = ("pt", "safetensors", "tflite", "npz", "npy", "recipe")  # read by Python and NumPy alone


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is there afterwards if code of a file has run."""
    monkeypatch.setenv(MARK, str(tmp_path / "trap"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "trap"


def test_the_corpus_is_large_and_half_of_it_is_read_here() -> None:
    assert len(CASES) >= 300
    assert len(READ) >= len(CASES) / 2


@pytest.mark.parametrize("case", READ, ids=lambda c: c.name)
def test_hostile_files_are_refused_by_reading(case: Case, tmp_path: Path, trap: Path) -> None:
    path, said = case.write(tmp_path / "given"), ""
    try:
        DOORS[case.door](path)
    except errors.HastenError as why:
        said = str(why)
        assert isinstance(why, (REFUSALS.get(case.door, ModelRefused), DataRefused, errors.OutOfResources))
    assert said or not case.words, "loaded"
    assert re.search(case.words, said), said
    assert said.isprintable()
    assert not trap.exists()


@pytest.mark.parametrize("case", [c for c in READ if c.door == "keras"], ids=lambda c: c.name)
def test_networks_of_keras_pass_the_same_guard_on_their_way(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_TENSORFLOW", "/no/python")
    with pytest.raises(ModelRefused, match=case.words):
        open_network(case.write(tmp_path / "given"))


HARMFUL = ("a pickled weight", "a pickled constant", "pickled samples", "old weights", "code as a size")


@pytest.mark.parametrize("name", HARMFUL)
def test_no_code_of_a_file_runs(name: str, tmp_path: Path, trap: Path) -> None:
    """torch.export.load falls for each of these files; opening them refuses, or leaves the harmful entry aside."""
    case = next(c for c in CASES if c.name == f"program: {name}")
    path = case.write(tmp_path / "given")
    with quiet(), contextlib.suppress(Exception):
        torch.export.load(path)
    assert trap.exists(), "the trap does not work, so this test shows nothing"
    trap.rmdir()
    with pytest.raises(ModelRefused, match=case.words) if case.words else contextlib.nullcontext():
        assert open_network(path).kind == "module"
    assert not trap.exists()


def test_a_checkpoint_runs_no_code_that_torch_would(tmp_path: Path, trap: Path) -> None:
    data = checkpoints.archive({**checkpoints.parts(checkpoints.honest()), "data.pkl": checkpoints.reduced(2)})
    torch.load(io.BytesIO(data), weights_only=False)
    assert trap.exists()
    trap.rmdir()
    with pytest.raises(ModelRefused, match=r"a call of '(posix|os)\.mkdir'"):
        guards.open_checkpoint(write(tmp_path / "m.pt", data))
    assert not trap.exists()


@pytest.mark.parametrize("kind", IN_PROCESS)
def test_spoilt_files_are_refused_in_one_line_or_loaded(kind: str, tmp_path: Path) -> None:
    seed, refused = SEEDS[kind], 0
    path = write(tmp_path / seed.file, seed.made[0]())
    DOORS[seed.door](path)
    for number in range(MUTANTS):
        path.write_bytes(mutant(kind, number))
        try:
            DOORS[seed.door](path)
        except errors.HastenError as why:
            refused += 1
            assert str(why).isprintable()
    assert refused > MUTANTS / 4


@pytest.mark.parametrize(("kind", "number"), [("pt", 206), ("parquet", 306), ("parquet", 913)])
def test_mutants_that_got_through_once(kind: str, number: int, tmp_path: Path) -> None:
    """They raised what zipfile and pyarrow raise, and no word of ours."""
    path = write(tmp_path / SEEDS[kind].file, mutant(kind, number))
    with contextlib.suppress(errors.HastenError):
        DOORS[SEEDS[kind].door](path)


@pytest.mark.long(share=1)
def test_a_file_that_does_not_end_costs_the_child_alone(tmp_path: Path) -> None:
    data = loops.looping(2**40)(tmp_path)
    path = write(tmp_path / "m.onnx", data)
    np.savez(tmp_path / "d.npz", x=np.ones((60, 3), np.float32), y=np.arange(60) % 2)
    with Child() as child, pytest.raises(ModelRefused, match=r"m\.onnx cannot be opened: .* died of SIGXCPU \(more processor time"):
        model = Source.of(path).to_json()
        prepare.call(child, "hasten.racing:_pack_all", path, into=str(tmp_path), model=model, data=str(tmp_path / "d.npz"), rows=2)


@pytest.mark.long(share=1)
def test_what_only_running_shows_is_refused_or_small(tmp_path: Path, trap: Path) -> None:
    """Forty files of some hundred bytes that ask for memory by the terabyte, in one child, which lives."""
    with Child() as child:
        for number, case in enumerate(c for c in CASES if c.name.startswith("size: ") and not c.reading):
            here = {"name": case.name, "folder": str(tmp_path / str(number))}
            found = child.call("hostile.doors:bring_case", **here, deadline_s=300).value
            assert found["kind"] in ("loaded", "ModelRefused", "DataRefused"), found
            assert found["said"].isprintable()
            assert found["bytes"] < 2**30, case.name
    assert not trap.exists()


def test_whole_files_pass_their_guards(tmp_path: Path) -> None:
    found = guards.open_checkpoint(write(tmp_path / "m.pt", checkpoints.honest()))
    assert torch.equal(found["a"], torch.arange(4.0))
    assert torch.equal(guards.open_checkpoint(write(tmp_path / "old.pt", checkpoints.honest(old=True)))["b"], torch.ones(2, 3))
    header = {"b": tensors.entry(8, 32), "a": tensors.entry(0, 8, [4], "F16"), "__metadata__": {"format": "pt"}}
    entries = guards.check_safetensors(write(tmp_path / "m.safetensors", tensors.safetensors(header, bytes(32))))
    assert [(name, e.dtype, e.shape, e.start, e.end) for name, e in entries.items()] == [
        ("a", "F16", (4,), 0, 8),
        ("b", "F32", (2, 3), 8, 32),
    ]
    guards.check_tflite(tensors.tflite())
    keras_files.saved(keras_files.graph("RestoreV2", inside=True))(tmp_path / "saved")
    guards.check_saved_model(tmp_path / "saved")


def test_whole_keras_files_pass_their_guards(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    layers = (keras_files.layer("Dense", units=3, activation="relu"), keras_files.layer("Add", "keras.src.ops.numpy"))
    config = keras_files.described(*layers) | {"compile_config": {"loss": keras_files.layer("Mine", "own")}}
    keras = write(tmp_path / "m.keras", keras_files.keras(config)(tmp_path))
    assert set(guards.read_keras(keras)) == {"metadata.json", "config.json", "model.weights.h5"}
    guards.check_hdf5(write(tmp_path / "m.h5", keras_files.hdf5(keras_files.honest)))


def test_an_archive_packed_again_holds_the_same(tmp_path: Path) -> None:
    entries = guards.read_zip(write(tmp_path / "m.pt", checkpoints.honest()))
    again = write(tmp_path / "again.pt", guards.packed(entries).getvalue())
    assert guards.read_zip(again) == entries
    assert all(e.compress_type == zipfile.ZIP_STORED for e in zipfile.ZipFile(again).infolist())


def test_a_deflated_program_is_a_program(tmp_path: Path) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in checkpoints.parts(program_file("shared")).items():
            archive.writestr(f"model/{name}", data)
    assert open_program(write(tmp_path / "m.pt2", made.getvalue())).graph_signature.user_inputs


def test_guards_of_a_file_are_left_aside(tmp_path: Path) -> None:
    make = programs.program(lambda p: p.update(guards_code=["__import__('os').abort()"]))
    assert open_program(write(tmp_path / "m.pt2", make(tmp_path)))._guards_code == []


def test_weights_of_a_graphics_card_come_to_the_cpu(tmp_path: Path) -> None:
    parts = checkpoints.parts(program_file("shared"))
    for name in (programs.MODEL, programs.WEIGHTS):
        parts[name] = parts[name].replace(b'"type": "cpu"', b'"type": "cuda"')
    opened = open_network(write(tmp_path / "m.pt2", checkpoints.archive(parts, "model/")), network("shared").example)
    assert equal(forward(opened, opened.example), forward(network("shared"), opened.example))


def test_weights_in_the_own_folder_are_taken_in(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", paths.outside("raw"))
    raw = write(tmp_path / "raw", np.ones((3, 2), np.float32).tobytes())
    opened = open_network(path)
    path.unlink()
    raw.unlink()
    assert equal(forward(opened, (np.ones((1, 3), np.float32),)), (np.full((1, 2), 3.0),))


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


def test_messages_are_harmless() -> None:
    assert str(ModelRefused("got 'a\x1b]0;owned\x07\u202e'\nb")) == "got 'a\\x1b]0;owned\\x07\\u202e' b"
    assert len(str(ModelRefused("long " * 10_000))) == 2000
