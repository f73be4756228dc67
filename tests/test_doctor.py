"""What the doctor says of a machine, and that it notices what is missing."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from hasten import doctor, engines
from hasten.measure import machine


def test_every_engine_and_extra_is_told() -> None:
    found = doctor.doctor()
    assert {row["engine"].partition("(")[0] for row in found["engines"]} == set(engines.__all__)
    assert found["environment"]["cores"] >= 1
    console = Console(width=100, record=True)
    doctor.show(found, console)
    shown = console.export_text()
    assert "energy counter:" in shown
    assert all(f"engine {name}" in shown for name in engines.__all__)


def test_providers_and_devices_are_told_with_the_reason_why_they_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.engines import onnxruntime, openvino

    monkeypatch.setattr(onnxruntime, "_here", lambda: ("CUDAExecutionProvider", "CPUExecutionProvider"))
    monkeypatch.setattr(openvino, "_here", lambda: ("CPU", "NPU"))
    rows = {row["engine"]: row["missing"] for row in doctor.doctor()["engines"]}
    assert rows["OnnxRuntime(provider='cuda')"] is None
    assert "has no TensorrtExecutionProvider" in rows["OnnxRuntime(provider='tensorrt')"]
    assert {"OnnxRuntime(provider='coreml')", "OnnxRuntime(provider='qnn')"} <= rows.keys()
    assert "finds no GPU on this machine, only CPU, NPU" in rows["OpenVINO(device='GPU')"]
    assert rows["OpenVINO(shapes='static', device='NPU')"] is None


def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"numpy": "2.4.6", "scipy": "1.9.3", "pandas": "2.2"}

    def version(name: str) -> str:
        if name not in here:
            raise metadata.PackageNotFoundError(name)
        return here[name]

    monkeypatch.setattr(metadata, "version", version)
    declared = ["numpy>=1.26", "scipy>=1.11", "onnx>=1.21", 'pandas>=2.2; extra == "tables"', 'pyarrow>=16 ; extra == "tables"']
    assert doctor._extras([*declared, "hasten[tables]; extra == 'all'"]) == {
        "tables": {"missing": ["pyarrow"], "command": "pip install 'hasten[tables]'"}
    }
    assert doctor._outdated(declared) == [
        "required scipy is 1.9.3, at least 1.11 is needed: pip install --upgrade scipy",
        "required onnx is missing: pip install 'onnx>=1.21'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: None)
    assert doctor._extras(doctor._requirements()) == {}


def test_the_energy_counter_is_read_or_the_reason_is_told(tmp_path: Path) -> None:
    assert "no RAPL counter" in (machine.energy_counter(tmp_path) or "")
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir()
    counter.write_text("secret\n")
    assert "sudo chmod a+r" in (machine.energy_counter(tmp_path) or "")
    counter.write_text("123456\n")
    assert machine.energy_counter(tmp_path) is None


def test_free_memory_is_no_more_than_there_is() -> None:
    free = machine.free_memory_bytes()
    assert free is None or 0 < free <= machine.memory_bytes()
