"""`apply`: a recipe again on another network, whole or not at all, and nothing claimed that was not proved."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hasten
import problems
from hasten import presets, verbs
from hasten.applying import Applied, read_recipe
from hasten.compress import FoldBatchNorm, QuantizeAware, QuantizeStatic, UseStudent
from hasten.core import folder
from hasten.core.data import View
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.core.recipe import Recipe
from hasten.core.runner import Runner
from hasten.engines import Eager, OnnxRuntime
from hasten.load.lower import lower
from hasten.load.program import export_program
from hasten.measure import timing
from hasten.train import Distil, FineTune, Fit, fit
from test_cli import call

Files = tuple[Path, Path, Path]
FIVE = Recipe(
    (
        FoldBatchNorm(),
        Distil(match="features", epochs=0.5),
        FineTune(epochs=0.5),
        QuantizeAware(epochs=0.5),
        QuantizeStatic(),
    ),
    OnnxRuntime(threads=1),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return problems.write_files(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def other(inputs: Files) -> nn.Module:
    """Another checkpoint of the same network: trained a little further."""
    return fit(problems.trained(), problems.data().train, settings=Fit(epochs=1, batch=32, seed=5)).module


@pytest.fixture(scope="module")
def other_file(other: nn.Module, inputs: Files) -> Path:
    from hasten.load import files

    path = inputs[0].parent / "other.pt2"
    torch.export.save(export_program(files.from_module(other, (problems.data().train.inputs[0][:4],))), path)
    return path


@pytest.fixture(scope="module")
def five(inputs: Files) -> Path:
    path = inputs[0].parent / "five.json"
    path.write_text(json.dumps(FIVE.to_json()))
    return path


@pytest.fixture(scope="module")
def applied(five: Path, other_file: Path, inputs: Files) -> tuple[Applied, Path]:
    """Five steps on another checkpoint; do not write on it."""
    out = inputs[0].parent / "result"
    return hasten.apply(five, other_file, inputs[1], out=out), out


def test_five_steps_are_applied_to_another_checkpoint(applied: tuple[Applied, Path], other: nn.Module) -> None:
    found, out = applied
    assert found.words == str(FIVE)
    assert not found.certified
    assert found.score_name == "accuracy"
    data = problems.data()
    assert found.examples["train"] + found.examples["score"] == len(data.train)
    assert found.score_before > 0.8
    assert found.score_after > found.score_before - 0.1
    assert found.size_bytes["after"] < 0.6 * found.size_bytes["before"]
    assert {p.name for p in out.iterdir()} == {"load.py", "model.onnx", "recipe.json", "applied.json", "README.md", "manifest.json"}
    assert folder.intact(out)
    assert Recipe.from_json(json.loads((out / "recipe.json").read_text())) == FIVE
    assert json.loads((out / "applied.json").read_text()) == json.loads(json.dumps(found.to_json()))
    assert "Nothing is certified" in (out / "README.md").read_text()
    assert "onnxruntime" in (out / "README.md").read_text()
    x = data.held_out.inputs[0]
    with Runner(out) as runner, torch.no_grad():
        mine, theirs = runner(x)[0].argmax(1), other(torch.from_numpy(x)).argmax(1).numpy()
    assert (mine == theirs).mean() > 0.9


@pytest.mark.long
def test_an_artifact_of_optimize_is_applied_again(inputs: Files, other: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((presets, "default"), (timing, "FULL"), (timing, "RANKING")):
        monkeypatch.setattr(module, name, getattr(module, name))
    problems.cut_short()
    report = verbs.optimize(*inputs, max_drop=0.05, run=tmp_path / "run", options=verbs.Options(trials=6))
    assert report.artifact
    data = problems.data()
    before = {k: v.clone() for k, v in other.state_dict().items()}
    found = hasten.apply(report.artifact, other, (data.train.inputs[0], data.train.labels), out=tmp_path / "again")
    assert found.recipe == json.loads((Path(report.artifact) / "recipe.json").read_text())
    assert found.score_after > found.score_before - 0.1
    assert folder.intact(tmp_path / "again")
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items()), "the module is left alone"


@pytest.mark.long
def test_the_same_seed_gives_the_same_network(other: nn.Module, tmp_path: Path) -> None:
    recipe = Recipe((FoldBatchNorm(), FineTune(epochs=0.3), QuantizeStatic()), OnnxRuntime(threads=1))
    outs = [tmp_path / name for name in ("one", "two", "three")]
    for out, seed in zip(outs, (1, 1, 2), strict=True):
        hasten.apply(recipe, other, problems.data().train, out=out, seed=seed)
    one, two, three = ((out / "model.onnx").read_bytes() for out in outs)
    assert one == two != three


def test_no_step_sees_what_is_scored(other: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten import prepare
    from hasten.load.data import read

    data = problems.data().train
    prepare.keep_back(tmp_path, read(data), seed=0)
    views = {name: View.load(tmp_path / "views" / name) for name in ("train", "calibrate", "select")}
    rows = {name: {a.tobytes() for a in np.asarray(view.inputs[0])} for name, view in views.items()}
    assert not rows["train"] & rows["select"]
    assert rows["calibrate"] <= rows["train"]
    assert sum(len(views[name]) for name in ("train", "select")) == len(data)


@pytest.mark.long
def test_without_labels_the_score_is_agreement(other: nn.Module, tmp_path: Path) -> None:
    recipe = Recipe((FineTune(epochs=0.2),), Eager())
    found = hasten.apply(recipe.to_json(), other, problems.data().train.inputs[0], out=tmp_path / "out")
    assert "agreement" in found.score_name
    assert found.score_before == 1.0
    assert 0.8 < found.score_after <= 1.0


def test_the_command_prints_scores_and_that_nothing_is_certified(
    other_file: Path, inputs: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "recipe.json", tmp_path / "out"
    recipe.write_text(json.dumps(Recipe((FoldBatchNorm(), QuantizeStatic()), OnnxRuntime()).to_json()))
    data = problems.data().train
    np.savez(tmp_path / "data.npz", x=data.inputs[0], digit=data.labels)
    words = ["apply", recipe, other_file, "--data", tmp_path / "data.npz", "--out", out, "--target", "digit", "--score", "top3"]
    code, printed, err = call(capsys, *words)
    assert code == 0, err
    assert re.search(r"top-3 accuracy 0\.\d{4} → 0\.\d{4} on \d+ examples kept back from [\d,]+ that the steps saw", printed)
    assert "Nothing is certified" in printed
    assert printed.startswith("FoldBatchNorm → QuantizeStatic → OnnxRuntime\n")
    again, printed, err = call(capsys, *words)
    assert again == 2
    assert "--out must be a new or empty folder" in err
    assert folder.intact(out)


@pytest.mark.long
def test_the_command_prints_json(five: Path, other_file: Path, inputs: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "apply", five, other_file, "--data", inputs[1], "--out", tmp_path / "out", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["certified"], found["artifact"]) == (False, str(tmp_path / "out"))
    assert found == json.loads((tmp_path / "out" / "applied.json").read_text())


def record(*steps: dict[str, object], engine: object = None) -> str:
    return json.dumps({"steps": list(steps), "engine": engine or {"name": "hasten.engines.OnnxRuntime", "threads": 1}})


FOLD = {"name": "hasten.compress.FoldBatchNorm"}
TUNE = {"name": "hasten.train.FineTune"}
QUANTIZE = {"name": "hasten.compress.QuantizeStatic"}
BAD_RECIPES: dict[str, tuple[str | None, int, str]] = {
    "no such file": (None, 2, r"no such file: .*recipe\.json"),
    "no JSON": ("{steps", 2, r"recipe\.json must hold a recipe as JSON: "),
    "no recipe": ("[1, 2]", 2, r"must be a JSON object with a list `steps` and an `engine`, got \[1, 2\]"),
    "no engine": ('{"steps": []}', 2, "and an `engine`"),
    "a step that is a word": (record("fold"), 2, "step 1: expected an object with a `name`, got fold"),  # type: ignore[arg-type]
    "an unknown step": (record(FOLD, {"name": "hasten.compress.Magic"}), 2, r"step 2, hasten\.compress\.Magic: no step or engine named"),
    "code from elsewhere": (record({"name": "os.system"}), 2, "no step or engine named 'os.system'"),
    "an unknown setting": (record({**FOLD, "hard": True}), 2, "step 1, .*FoldBatchNorm has no setting 'hard'"),
    "a setting out of range": (record({**TUNE, "epochs": -1}), 2, "step 1, .*FineTune: epochs must be a finite number above 0, got -1"),
    "a setting of another type": (record({**QUANTIZE, "keep": "conv"}), 2, "step 1, .*QuantizeStatic: keep must be a tuple"),
    "a wrong order": (record(TUNE, FOLD), 2, "FoldBatchNorm must come before FineTune"),
    "an engine as a step": (record({"name": "hasten.engines.Eager"}), 2, "Eager is no step"),
    "a step as an engine": (record(engine=FOLD), 2, "FoldBatchNorm is no engine"),
    "a step that refuses": (record({**QUANTIZE, "keep": ["nowhere"]}), 2, r"step 1 of 1, QuantizeStatic\(keep=\('nowhere',\)\): keep must name nodes"),
    "a later step that refuses": (
        record({**TUNE, "epochs": 0.1}, {"name": "hasten.compress.QuantizeAware", "keep": ["*"]}, QUANTIZE),
        1,
        r"step 2 of 3, QuantizeAware\(keep=\('\*',\)\): QuantizeAware needs a layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.long if c == "a step that refuses" else ()) for c in BAD_RECIPES], ids=str
)
def test_bad_recipes(case: str, other_file: Path, inputs: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, code, words = BAD_RECIPES[case]
    recipe, out = tmp_path / "recipe.json", tmp_path / "out"
    if text is not None:
        recipe.write_text(text)
    got, printed, err = call(capsys, "apply", recipe, other_file, "--data", inputs[1], "--out", out)
    said = [line for line in err.splitlines() if line.startswith("hasten: ")]
    assert got == code, err
    assert re.search(words, said[-1]), said
    assert printed == ""
    assert "Traceback" not in err
    assert not out.exists(), "nothing is left behind"


BAD_WORDS: dict[str, tuple[list[str], int, str]] = {
    "no model": (["RECIPE", "nowhere.pt2", "--data", "DATA", "--out", "OUT"], 2, "no such file: nowhere.pt2"),
    "no data": (["RECIPE", "MODEL", "--data", "nowhere.npz", "--out", "OUT"], 2, "no such file: nowhere.npz"),
    "no out": (["RECIPE", "MODEL", "--data", "DATA"], 2, "--out"),
    "not a network": (["RECIPE", "DATA", "--data", "DATA", "--out", "OUT"], 4, "pt2"),
    "a file for a folder": (["RECIPE", "MODEL", "--data", "DATA", "--out", "MODEL"], 2, "--out must be a new or empty folder"),
    "a place that cannot be written": (["RECIPE", "MODEL", "--data", "DATA", "--out", "/proc/out"], 74, "/proc/out"),
    "score": (["RECIPE", "MODEL", "--data", "DATA", "--out", "OUT", "--score", "beauty"], 2, "beauty"),
    "an artifact without a recipe": (["EMPTY", "MODEL", "--data", "DATA", "--out", "OUT"], 2, r"no such file: .*recipe\.json"),
}


@pytest.mark.parametrize("case", BAD_WORDS, ids=str)
def test_bad_words(case: str, five: Path, inputs: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    stands_for = {"MODEL": inputs[0], "DATA": inputs[1], "RECIPE": five, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty"}
    words, code, message = BAD_WORDS[case]
    got, out, err = call(capsys, "apply", *(stands_for.get(w, w) for w in words))
    assert got == code, err
    assert re.search(message, err.splitlines()[-1]), err
    assert out == ""
    assert "Traceback" not in err


def onnx_file(module: nn.Module, path: Path, *, known: bool) -> Path:
    """The module as an `.onnx` file; with noise times zero added, which the importer does not know."""
    import onnx
    from onnx import helper, numpy_helper

    from hasten.load import files

    model = lower(files.from_module(module, (problems.data().train.inputs[0][:4],))).graph
    if not known:
        graph, name = model.graph, model.graph.output[0].name
        for node in graph.node:
            node.output[:] = [f"{name}_before" if o == name else o for o in node.output]
        graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "nothing"))
        graph.node.append(helper.make_node("RandomNormalLike", [f"{name}_before"], ["noise"], name="noise"))
        graph.node.append(helper.make_node("Mul", ["noise", "nothing"], ["silence"]))
        graph.node.append(helper.make_node("Add", [f"{name}_before", "silence"], [name]))
    onnx.save(model, path)
    return path


def test_a_graph_cannot_be_trained_and_the_step_says_so(other: nn.Module, inputs: Files, tmp_path: Path) -> None:
    given = onnx_file(other, tmp_path / "model.onnx", known=False)
    with pytest.raises(Unsupported, match=r"FineTune needs a torch module, and the network is an ONNX graph.*RandomNormalLike"):
        hasten.apply(Recipe((FineTune(),), OnnxRuntime()), given, inputs[1], out=tmp_path / "out")


def test_an_onnx_file_is_trained_where_its_operators_are_known(other: nn.Module, inputs: Files, tmp_path: Path) -> None:
    given = onnx_file(other, tmp_path / "model.onnx", known=True)
    applied = hasten.apply(Recipe((FineTune(epochs=1),), OnnxRuntime()), given, inputs[1], out=tmp_path / "out")
    assert (Path(applied.artifact) / "model.onnx").read_bytes() != given.read_bytes()
    assert applied.score_after >= applied.score_before - 0.05


def test_other_refusals(other: nn.Module, tmp_path: Path) -> None:
    data = problems.data().train
    with pytest.raises(UsageError, match="model must be a torch module or the path"):
        hasten.apply(FIVE, 3, data, out=tmp_path / "out")
    with pytest.raises(DataRefused, match="examples are too few: 1 are left to score"):
        hasten.apply(FIVE, other, (data.inputs[0][:3], np.arange(3)), out=tmp_path / "out")
    assert read_recipe(FIVE) is FIVE
    assert read_recipe(FIVE.to_json()) == FIVE
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_student_of_the_user_s_own_comes_by_recipe(other: nn.Module, inputs: Files, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(1, 8, 3, stride=3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 10)).eval()
    x = torch.from_numpy(problems.data().train.inputs[0][:4])
    torch.export.save(torch.export.export(small, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)), tmp_path / "small.pt2")
    recipe = Recipe((UseStudent.of(tmp_path / "small.pt2"), Distil(epochs=6, learning_rate=1e-2)), OnnxRuntime())
    found = hasten.apply(recipe, other, inputs[1], out=tmp_path / "out")
    assert found.parameters["after"] == 8 * 9 + 8 + 720 + 10
    assert found.score_after > 0.5, "it has learnt"


@pytest.mark.long
def test_ctrl_c_leaves_nothing(five: Path, other_file: Path, inputs: Files, tmp_path: Path) -> None:
    import signal

    out = tmp_path / "out"
    command = [sys.executable, "-m", "hasten", "apply", *map(str, (five, other_file, "--data", inputs[1], "--out", out))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "interrupted; nothing was written" in err
    assert "Traceback" not in err
    assert not out.exists()
