"""Export: every format is run in its own runtime before it is handed out, and carries what was found out about it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import sample_reports
from hasten import engines, exporting, verbs
from hasten.compress import FoldBatchNorm, QuantizeStatic
from hasten.core import folder
from hasten.core.data import View
from hasten.core.errors import BackendMissing, ModelRefused, Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Recipe
from hasten.core.store import Store
from hasten.engines import OnnxRuntime, Program, labels
from hasten.exporting import export
from hasten.load import saved
from hasten.load.program import export_program
from hasten.search.workshop import Workshop
from networks import lowered, network
from test_importer import rounded_by_onnxruntime

RECIPE = Recipe((FoldBatchNorm(), QuantizeStatic()), OnnxRuntime(threads=1))
RECORD = {"hasten": "0.1.0", "verdict": "kept", "words": 'a "quoted" <é> name', "recipe": Recipe((), OnnxRuntime()).to_json()}


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "cnn.pt2"
    torch.export.save(export_program(network("cnn")), path)
    return path


@pytest.mark.parametrize(
    ("to", "file"),
    [
        ("onnx", "model.onnx"),
        ("openvino", "model.xml"),
        ("safetensors", "model.safetensors"),
        pytest.param("aotinductor", "model.pt2", marks=pytest.mark.long(share=2)),
    ],
)
def test_a_file_goes_out_checked_and_labelled(cnn: Path, tmp_path: Path, to: str, file: str) -> None:
    found = export(cnn, to, out=tmp_path / to)
    assert found.accepted
    assert found.difference is not None
    assert found.difference < 1e-4
    assert (found.inputs, found.examples, found.exit_code) == ("random", 16, 0)
    assert folder.intact(tmp_path / to)
    told = labels.read(tmp_path / to / file)
    assert told
    assert told == json.loads((tmp_path / to / "export.json").read_text())["metadata"]
    assert told["recipe"] == Recipe((), exporting.formats()[to]).to_json()
    assert "accepted" in str(found)


def test_safetensors_hold_the_weights_under_their_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    Program(weights="safetensors").pack(network("cnn"), tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    state = network("cnn").module.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(found[name], state[name]) for name in state)
    for name in found:  # what runs is what this file holds
        found[name] = torch.zeros_like(found[name])
    from safetensors.torch import save_file

    save_file(found, tmp_path / "model.safetensors")
    import runpy

    assert not runpy.run_path(str(tmp_path / "load.py"))["load"](str(tmp_path))(*network("cnn").example)[0].any()


def test_what_differs_goes_to_rejected_with_exit_3(cnn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = OnnxRuntime.pack

    def wrong(self: OnnxRuntime, of: Network, place: Path) -> None:
        pack(self, of, place)
        file = place / "load.py"
        file.write_text(file.read_text().replace("tuple(session", "tuple(1.01 * o for o in session"))

    monkeypatch.setattr(OnnxRuntime, "pack", wrong)
    found = exporting._checked(_packed(tmp_path), _reference(), "onnx", OnnxRuntime(), 1e-3)
    assert (found.accepted, found.exit_code) == (False, 3)
    assert "must lie within 0.001 of the reference's, and differ by 0.01" in (found.reason or "")
    assert "rejected" in found.sentence
    wider = exporting._checked(_packed(tmp_path / "again"), _reference(), "onnx", OnnxRuntime(), 0.02)
    assert wider.accepted
    assert wider.agreement == 1.0


@pytest.fixture(scope="module")
def far(cnn: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, exporting.Exported]:
    """An export that was accepted once, and one of the same that no runtime could pass."""
    place = tmp_path_factory.mktemp("far")
    assert export(cnn, "openvino", out=place / "net").accepted
    return place, export(cnn, "openvino", out=place / "net", tolerance=1e-15)


def test_what_is_rejected_lies_apart(far: tuple[Path, exporting.Exported]) -> None:
    place, found = far
    assert (found.accepted, found.exit_code, found.place) == (False, 3, str(place / "rejected" / "net"))
    assert folder.intact(place / "rejected" / "net")
    told = json.loads((place / "rejected" / "net" / "export.json").read_text())
    assert (told["accepted"], told["place"]) == (False, found.place)
    assert "rejected" in (place / "rejected" / "net" / "README.md").read_text()


def test_a_rejection_says_that_the_earlier_export_is_the_old_one(far: tuple[Path, exporting.Exported]) -> None:
    place, found = far
    assert json.loads((place / "net" / "export.json").read_text())["accepted"]
    assert any(re.search(rf"{place}/net is still the export of before", note) for note in found.notes)
    assert "still the export of before" in str(found)


def test_a_folder_of_someone_else_is_not_replaced_by_a_rejection(cnn: Path, tmp_path: Path) -> None:
    mine = tmp_path / "rejected" / "net" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("keep")
    with pytest.raises(UsageError, match=r"new or empty folder, or one of an earlier export, got .*rejected/net"):
        export(cnn, "onnx", out=tmp_path / "net", tolerance=1e-15)
    assert mine.exists()


CUSTOM = {"steps": [{"name": "mine.Step"}], "engine": {"name": "hasten.engines.OnnxRuntime", "colour": "red"}}
LABELS = {
    "no label": {"a": 1},
    "a list": [1],
    "words that are none": RECORD | {"words": ["x"]},
    "a recipe that is none": RECORD | {"recipe": "x"},
    "a sentence that is none": RECORD | {"sentence": {"a": 1}},
    "200 deep": json.loads('{"a":' * 250 + "1" + "}" * 250),
}


def labelled(path: Path, label: object) -> Path:
    graph = onnx.ModelProto()
    graph.CopyFrom(lowered("mlp").graph)
    graph.metadata_props.add(key="hasten", value=json.dumps(label))
    onnx.save(graph, path)
    return path


@pytest.mark.parametrize("label", LABELS.values(), ids=LABELS)
def test_a_label_that_is_none_counts_as_none(tmp_path: Path, label: object) -> None:
    assert labels.read(labelled(tmp_path / "m.onnx", label)) is None


def test_a_label_that_is_none_hinders_no_export(tmp_path: Path) -> None:
    found = export(labelled(tmp_path / "m.onnx", {"a": 1}), "onnx", out=tmp_path / "new")
    assert found.accepted
    assert "claimed" not in found.metadata
    assert labels.read(tmp_path / "new" / "model.onnx") == found.metadata


def test_what_a_file_claims_stays_a_claim(tmp_path: Path) -> None:
    """Its steps may be of another version or of someone else's; its verdict was not proved here."""
    claim = RECORD | {"recipe": CUSTOM, "score": 0.99, "sentence": "proved"}
    found = export(labelled(tmp_path / "m.onnx", claim), "onnx", out=tmp_path / "new")
    assert found.accepted
    told = labels.read(tmp_path / "new" / "model.onnx")
    assert told == found.metadata
    assert told["claimed"] == claim
    assert told["verdict"] is None
    assert not {"score", "sentence"} & told.keys()
    assert told["recipe"] == Recipe((), OnnxRuntime()).to_json()
    onnx.checker.check_model(onnx.load(tmp_path / "new" / "model.onnx"))


class Rows(torch.nn.Module):
    """A network for one batch size: its rows see each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x - x.mean(0)) + x.reshape(len(x), 3).sum(1, keepdim=True)


@pytest.mark.parametrize(("batch", "rows"), [(1, 20), (4, 3), (4, 20)])
def test_a_fixed_batch_is_checked_on_all_rows(tmp_path: Path, batch: int, rows: int) -> None:
    torch.export.save(torch.export.export(Rows(), (torch.randn(batch, 3),)), tmp_path / "m.pt2")
    x = np.random.default_rng(0).standard_normal((rows, 3)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    found = export(tmp_path / "m.pt2", "onnx", out=tmp_path / "new", data=tmp_path / "d.npz")
    assert (found.accepted, found.examples, found.inputs) == (True, rows, "given")
    if rows > batch == 4:
        assert export(tmp_path / "m.pt2", "onnx", out=tmp_path / "new").examples == 16


def test_a_file_in_integers_is_held_against_what_onnxruntime_makes_of_it(tmp_path: Path) -> None:
    """On processors without 8-bit dot products its integer kernels saturate, and the roundings of the module do not."""
    onnx.save(rounded_by_onnxruntime(tmp_path), tmp_path / "m.onnx")
    found = export(tmp_path / "m.onnx", "onnx", out=tmp_path / "new")
    assert (found.accepted, found.difference, found.tolerance) == (True, 0.0, exporting.ROUNDED)


def _packed(place: Path) -> Path:
    (place / "new").mkdir(parents=True)
    OnnxRuntime(threads=1).pack(lowered("cnn"), place / "new")
    return place / "new"


def _reference() -> exporting._Packed:
    from hasten.load.lower import forward

    of = lowered("cnn")
    return exporting._Packed(
        fixed_batch=None, inputs=of.example, kind="given", expected=forward(of, of.example), reference="itself",
        recipe=Recipe((), OnnxRuntime()), metadata={"words": "x"},
    )  # fmt: skip


def test_a_runtime_that_dies_is_a_rejection(tmp_path: Path) -> None:
    place = _packed(tmp_path)
    (place / "load.py").write_text("import os\n\ndef load(folder):\n    os.abort()\n")
    found = exporting._checked(place, _reference(), "onnx", OnnxRuntime(), 1e-3)
    assert (found.accepted, found.difference) == (False, None)
    assert "SIGABRT" in (found.reason or "")
    assert "SIGABRT" in str(found)


def test_a_folder_of_someone_else_is_not_replaced(cnn: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="new or empty folder"):
        export(cnn, "onnx", out=tmp_path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"to": "gif"}, "--to must be one of onnx, openvino"),
        ({"to": "onnx", "tolerance": 0.0}, "above 0, got 0"),
        ({"source": "nowhere"}, "no such file"),
    ],
)
def test_words_that_cannot_be_used(cnn: Path, settings: dict, match: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UsageError, match=match):
        export(**({"source": cnn, "to": "onnx"} | settings))


def test_a_runtime_that_is_not_here_says_what_to_install(cnn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.LiteRT, "available", lambda self: "pip install 'hasten[litert]'")
    with pytest.raises(BackendMissing, match=r"tflite: pip install"):
        export(cnn, "tflite")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match="expected a folder of Hugging Face"):
        export(tmp_path, "onnx")


@pytest.mark.parametrize("name", ["model.onnx", "model.xml", "model.pt2", "model.safetensors"])
def test_labels_come_back_and_the_network_still_runs(tmp_path: Path, name: str) -> None:
    engine = {"model.onnx": OnnxRuntime(), "model.xml": engines.OpenVINO()}.get(name) or Program(weights="safetensors")
    engine.pack(lowered("mlp") if engine.takes == "graph" else network("mlp"), tmp_path)
    assert labels.read(tmp_path / name) is None
    labels.write(tmp_path, RECORD)
    assert labels.read(tmp_path / name) == RECORD
    if name == "model.pt2":
        told = {"hasten.json": ""}
        torch.export.load(tmp_path / name, extra_files=told)
        assert json.loads(told["hasten.json"]) == RECORD
    if name == "model.onnx":
        onnx.checker.check_model(onnx.load(tmp_path / name))
    x = network("mlp").example
    import runpy

    got = runpy.run_path(str(tmp_path / "load.py"))["load"](str(tmp_path))(*x)[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, network("mlp").module(torch.from_numpy(x[0])).numpy(), atol=1e-5)


def test_labels_say_where_they_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "network.pkl").touch()
    with pytest.raises(ValueError, match=r"expected a model file that takes metadata .*network\.pkl"):
        labels.write(tmp_path, RECORD)
    assert labels.read(tmp_path / "network.pkl") is None


def test_a_graph_becomes_a_module_for_an_engine_that_takes_modules(tmp_path: Path) -> None:
    of = lowered("mlp")
    carrier = exporting._Carrier(engine=Program(), made_for=OnnxRuntime(), takes="graph")
    assert carrier.profile == OnnxRuntime().profile
    carrier.pack(of, tmp_path)
    assert (tmp_path / "model.pt2").exists()
    strange = onnx.ModelProto()
    strange.CopyFrom(of.graph)
    strange.graph.node[0].op_type = "Unheard"
    with pytest.raises(Unsupported, match="needs a torch module"):
        carrier.pack(Network(kind="graph", body=strange, example=of.example), tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as the search leaves it, made by hand: a folded and quantized network, and nothing searched."""
    of, place = network("cnn"), tmp_path_factory.mktemp("runs") / "run"
    view = View(inputs=(np.concatenate([of.example[0]] * 8),))
    with folder.new_folder(place / "views") as fresh:
        for name in ("train", "calibrate", "select"):
            view.save(fresh / name)
    with folder.new_folder(place / "networks" / "original") as fresh:
        saved.save(of, fresh / "network")
    store = Store(place / verbs.STORE)
    store.remember("task", {"loss": "original"})
    store.remember("config", {"model": "0" * 64})
    store.close()
    shop = Workshop(place, loss="original", seed=sample_reports.ALL["kept"].seed)
    shop.make(RECIPE, place / "packages" / "1")
    shop.close()
    with folder.new_folder(place / "artifact") as fresh:
        shutil.copytree(place / "packages" / "1", fresh, dirs_exist_ok=True, ignore=shutil.ignore_patterns(folder.MANIFEST))
        (fresh / "recipe.json").write_text(json.dumps(RECIPE.to_json()))
        (fresh / "report.json").write_text("{}")
    return place


@pytest.mark.parametrize(
    ("to", "tolerance"),
    [
        pytest.param("onnx", 1e-6, marks=pytest.mark.long(share=2)),
        pytest.param("openvino", 0.1, marks=pytest.mark.long),
        pytest.param("pt2", 0.1, marks=pytest.mark.long),
        pytest.param("safetensors", 1e-3, marks=pytest.mark.long),
        pytest.param(
            "tflite", None, marks=[pytest.mark.long, pytest.mark.skipif(engines.LiteRT().available() is not None, reason="no LiteRT")]
        ),
    ],
)
def test_the_result_of_a_run_keeps_its_verdict_on_the_way(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, tolerance: float | None
) -> None:
    told = sample_reports.ALL["kept"]
    monkeypatch.setattr(verbs, "load_report", lambda run: told)
    before = (finished / "artifact" / "manifest.json").read_bytes()
    found = export(finished, to, out=tmp_path / to, tolerance=tolerance)
    assert found.accepted, found.reason
    assert (found.inputs, found.examples) == ("held out", 32)
    assert (finished / "artifact" / "manifest.json").read_bytes() == before
    file = next(f for f in sorted((tmp_path / to).iterdir()) if f.suffix in (".onnx", ".xml", ".safetensors", ".pt2", ".tflite"))
    metadata = labels.read(file)
    assert metadata
    assert told.chosen
    assert (metadata["verdict"], metadata["score"], metadata["sentence"]) == (told.verdict, told.chosen.score, told.sentence)
    assert metadata["verdict_holds_in"] == "OnnxRuntime(threads=1)"
    assert metadata["recipe"] == RECIPE.to_json()
    assert (tmp_path / to / "report.json").exists()
    assert any(re.search("left for later.*QuantizeStatic", n) for n in found.notes) == (to == "safetensors")
    if to == "onnx":
        claimed = export(file, "onnx", out=tmp_path / "again").metadata["claimed"]
        assert (claimed["verdict"], claimed["recipe"]) == (told.verdict, RECIPE.to_json())


def test_an_unfinished_run_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "load_report", lambda run: dataclasses.replace(sample_reports.ALL["kept"], state="interrupted"))
    with pytest.raises(UsageError, match="holds no finished run"):
        export(finished, "onnx")
