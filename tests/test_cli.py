"""The command line: bad input gives one plain line and the right exit code; good input gives data on standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import problems
from hasten import presets
from hasten.cli import main
from hasten.core.folder import Lock

Inputs = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return problems.write_files(tmp_path_factory.mktemp("inputs"))


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as left:
        main([str(w) for w in words])
    out, err = capsys.readouterr()
    code = left.value.code
    return code if isinstance(code, int) else 0, out, err


def npz(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "bad.npz", **arrays)
    return folder / "bad.npz"


X = np.random.default_rng(0).random((60, 1, 28, 28), np.float32)
Y = np.arange(60) % 10


def with_nan() -> np.ndarray:
    x = X.copy()
    x[7, 0, 0, 0] = np.nan
    return x


BAD_DATA: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "no such file": (lambda f: f / "nowhere.npz", 2, "no such file"),
    "NaN": (lambda f: npz(f, x=with_nan(), y=Y), 2, "NaN"),
    "one class": (lambda f: npz(f, x=X, y=Y * 0), 2, "class"),
    "empty": (lambda f: npz(f, x=X[:0], y=Y[:0]), 2, "examples"),
    "three examples": (lambda f: npz(f, x=X[:3], y=Y[:3]), 2, "3 examples are too few"),
    "labels outside the classes": (lambda f: npz(f, x=X, y=Y + 5), 2, "labels must be in \\[0, 10\\), got 14"),
    "lengths differ": (lambda f: npz(f, x=X, y=Y[:50]), 2, "60"),
    "wrong shape": (lambda f: npz(f, x=X[:, :, :5, :5], y=Y), 2, "28"),
    "not an archive": (lambda f: (f / "bad.npz").write_bytes(b"PK nothing") and f / "bad.npz", 2, "npz"),
    "unknown kind": (lambda f: (f / "data.xyz").write_text("1") and f / "data.xyz", 2, "expected .npz"),
}


@pytest.mark.parametrize("case", BAD_DATA, ids=str)
def test_bad_data(case: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, code, words = BAD_DATA[case]
    got, out, err = call(capsys, "optimize", inputs[0], "--data", make(tmp_path), "--run", tmp_path / "run")
    said = [line for line in err.splitlines() if line.startswith("hasten: ")]
    assert got == code, err
    assert len(said) == 1
    assert out == ""
    import re

    assert re.search(words, said[0]), said[0]
    assert "Traceback" not in err


BAD_WORDS: dict[str, tuple[list[str], int, str]] = {
    "bare percent": (["optimize", "m.pt2", "--data", "d.npz", "--max-drop", "1%"], 2, "1pt .* or 1%rel"),
    "no drop": (["optimize", "m.pt2", "--data", "d.npz", "--max-drop", "much"], 2, "1pt, 0.01 or 1%rel, got 'much'"),
    "negative drop": (["optimize", "m.pt2", "--data", "d.npz", "--max-drop", "-1pt"], 2, "must look like 1pt"),
    "no model": (["optimize", "nowhere.pt2", "--data", "d.npz"], 2, "no such file: nowhere.pt2"),
    "unknown option": (["optimize", "--faster"], 2, "No such option: --faster"),
    "unknown verb": (["accelerate"], 2, "No such command 'accelerate'"),
    "no data": (["optimize", "m.pt2"], 2, "--data"),
    "accept": (["optimize", "m.pt2", "--data", "d.npz", "--accept", "hope"], 2, "proof or point, got 'hope'"),
    "confidence": (["optimize", "m.pt2", "--data", "d.npz", "--confidence", "95"], 2, r"in \(0.5, 1\), got 95"),
    "batch": (["optimize", "MODEL", "--data", "DATA", "--run", "RUN", "--batch", "0"], 2, "at least 1, got 0"),
    "score": (["optimize", "MODEL", "--data", "DATA", "--run", "RUN", "--score", "beauty"], 2, "beauty"),
    "no run": (["report", "nowhere"], 74, "no run in nowhere"),
    "a folder of other things": (["optimize", "MODEL", "--data", "DATA", "--run", "OTHER"], 2, "holds no run"),
    "a file for a folder": (["optimize", "MODEL", "--data", "DATA", "--run", "MODEL"], 2, "must be a folder"),
    "a place that cannot be written": (["optimize", "MODEL", "--data", "DATA", "--run", "/proc/run"], 74, "/proc/run"),
    "not a network": (["optimize", "DATA", "--data", "DATA", "--run", "RUN"], 4, "pt2"),
    "benchmark": (["benchmark", "nowhere.onnx"], 2, "no such file"),
    "unknown task": (["demo", "--task", "chess", "--run", "RUN"], 2, "chess"),
}


@pytest.mark.parametrize("case", BAD_WORDS, ids=str)
def test_bad_words(case: str, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    stands_for = {"MODEL": inputs[0], "DATA": inputs[1], "RUN": tmp_path / "run", "OTHER": tmp_path / "other"}
    words, code, message = BAD_WORDS[case]
    got, out, err = call(capsys, *(stands_for.get(w, w) for w in words))
    said = [line for line in err.splitlines() if line.startswith("hasten: ")]
    assert got == code, err
    assert re.search(message, said[-1]), said
    assert out == ""
    assert (tmp_path / "other" / "thesis.tex").read_text() == "years of work"


def test_a_locked_folder(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = Lock(tmp_path / "run")
    try:
        code, _, err = call(capsys, "optimize", inputs[0], "--data", inputs[1], "--run", tmp_path / "run")
    finally:
        lock.release()
    assert code == 73
    assert f"process {os.getpid()}" in err


def test_optimize_prints_json_and_report_reads_it_back(
    inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.measure import timing

    for module, name in ((presets, "default"), (timing, "FULL"), (timing, "RANKING")):
        monkeypatch.setattr(module, name, getattr(module, name))
    problems.cut_short()
    run = tmp_path / "run"
    words = ["optimize", inputs[0], "--data", inputs[1], "--prove", inputs[2], "--max-drop", "5pt", "--run", run]
    code, out, err = call(capsys, *words, "--trials", "6", "--json")
    assert code == 0
    found = json.loads(out)
    required = {"verdict", "limit", "provenance", "baselines", "chosen", "pareto", "trials", "environment"}
    assert required <= found.keys()
    chosen = {"recipe", "speedup", "speedup_over_best_plain", "score_drop", "size_bytes", "latency_ms"}
    assert chosen <= found["chosen"].keys()
    assert {"batch", "value", "low", "high"} <= found["chosen"]["speedup"][0].keys()
    assert {"value", "upper"} <= found["chosen"]["score_drop"].keys()
    events = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert {"load", "search", "proof", "timing"} <= {event["stage"] for event in events}
    assert [event["trial"]["number"] for event in events if event["trial"]][:2] == [0, 1]
    again, out, _ = call(capsys, "report", run, "--json", "--html", tmp_path / "page.html")
    assert again == 0
    assert json.loads(out)["chosen"] == found["chosen"]
    assert "<svg" in (tmp_path / "page.html").read_text()
    _, out, _ = call(capsys, "report", run)
    assert "kept" in out or "equal" in out


def test_benchmark_lists_engines_and_their_failures(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.racing._SHORT", problems.timing.Protocol(fewest=2, most=2, block_ms=5, blocks=2))
    monkeypatch.setattr("hasten.racing._pack_all", None)  # runs in a child, which knows nothing of this
    code, out, _ = call(capsys, "benchmark", inputs[0], "--batch", "1", "--json")
    assert code == 0
    rows = {row["engine"]: row for row in json.loads(out)["engines"]}
    assert {"Eager", "OnnxRuntime", "OpenVINO"} <= rows.keys()
    assert rows["OnnxRuntime"]["reason"] is None
    assert rows["OnnxRuntime"]["difference"] < 1e-4
    assert rows["OnnxRuntime"]["latency_ms"][0]["p50_ms"] > 0


def test_doctor_tasks_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "doctor", "--json")
    assert code == 0
    assert json.loads(out)["environment"]["cores"] >= 1
    _, out, _ = call(capsys, "tasks")
    assert "mnist5k" in out
    _, out, _ = call(capsys, "--version")
    assert out.strip() == "0.1.0"


def test_inspect_and_export_refuse_words_that_cannot_be_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = call(capsys, "inspect", tmp_path / "nowhere.onnx")
    assert (code, out) == (2, "")
    assert "no such file" in err
    code, _, err = call(capsys, "export", tmp_path, "--to", "gif")
    assert code == 2
    assert "--to must be one of onnx" in err


def test_a_rejected_export_leaves_with_3(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten import exporting

    facts = {
        "reference": "it",
        "difference": 0.2,
        "tolerance": 0.001,
        "agreement": None,
        "examples": 16,
        "inputs": "random",
        "metadata": {},
    }
    found = exporting.Exported(to="onnx", runtime="OnnxRuntime", place="rejected/x", accepted=False, reason="too far", **facts)  # type: ignore[arg-type]
    monkeypatch.setattr(exporting, "export", lambda *_, **__: found)
    code, out, _ = call(capsys, "export", "x.onnx", "--to", "onnx")
    assert code == 3
    assert out.splitlines() == [found.sentence, "rejected/x"]
    code, out, _ = call(capsys, "export", "x.onnx", "--to", "onnx", "--json")
    assert json.loads(out)["difference"] == 0.2


def test_ctrl_c_leaves_with_130_and_the_folder_goes_on(inputs: Inputs, tmp_path: Path) -> None:
    import signal
    import time

    run = tmp_path / "run"
    command = [sys.executable, "-m", "hasten", "optimize", *map(str, (inputs[0], "--data", inputs[1], "--run", run))]
    # A shell has its background jobs ignore the signal, and whoever runs the tests in one would hand that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 600
    while not (run / "run.sqlite").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "the same command goes on from here" in err
    assert "Traceback" not in err
