"""Engines: their settings, what they refuse, and that they say the precision aloud."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper

from hasten.core.errors import ChildFailed
from hasten.core.folder import size_bytes
from hasten.core.network import Network
from hasten.core.recipe import Engine
from hasten.core.runner import Runner
from hasten.engines import AotInductor, Eager, ExecuTorch, LiteRT, OnnxRuntime, OpenVINO, Program, TorchCompile
from hasten.load.files import from_module
from hasten.load.lower import forward, lower
from hasten.measure import machine
from networks import lowered, network

EVERY = (AotInductor, Eager, ExecuTorch, LiteRT, OnnxRuntime, OpenVINO, Program, TorchCompile)
FP32_ONLY = (ExecuTorch, LiteRT, OnnxRuntime, Program)


@pytest.mark.parametrize("kind", EVERY)
def test_settings_are_checked(kind: type) -> None:
    with pytest.raises(ValueError, match=r"threads must be >= 0 \(0 for all cores\), got -1"):
        kind(threads=-1)
    with pytest.raises(TypeError):
        kind(speed=2)


@pytest.mark.parametrize("kind", [AotInductor, Eager, TorchCompile, OpenVINO])
def test_an_unknown_precision_is_refused(kind: type) -> None:
    with pytest.raises(ValueError, match="'fp32' or 'bf16', got 'fp64'"):
        kind(precision="fp64")
    with pytest.raises(ValueError, match="'dynamic' or 'static'"):
        OpenVINO(shapes="square")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", EVERY)
def test_space_holds_what_this_machine_can(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 4)
    assert kind().space()["threads"] == (0, 1)
    monkeypatch.setattr(machine, "cores", lambda: 1)
    assert kind().space()["threads"] == (0,)
    monkeypatch.setattr(machine, "has_bf16", lambda: True)
    assert kind in FP32_ONLY or kind().space()["precision"] == ("fp32", "bf16")
    monkeypatch.setattr(machine, "has_bf16", lambda: False)
    assert kind in FP32_ONLY or kind().space()["precision"] == ("fp32",)


def test_bf16_without_the_instructions_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_bf16", lambda: False)
    assert "no bfloat16" in (Eager(precision="bf16").available() or "")
    assert Eager().available() is None
    assert not OpenVINO(precision="bf16").lossless


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install openvino" in (OpenVINO().available() or "")


def test_without_dot_products_weights_get_seven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_int8_dot", lambda: False)
    assert OnnxRuntime().profile.weight_bits == 7
    monkeypatch.setattr(machine, "has_int8_dot", lambda: True)
    assert OnnxRuntime().profile.weight_bits == 8


@pytest.mark.parametrize(("precision", "hint"), [("fp32", "f32"), ("bf16", "bf16")])
def test_openvino_never_guesses_the_precision(tmp_path: Path, precision: str, hint: str) -> None:
    OpenVINO(precision=precision, threads=1).pack(lowered("cnn"), tmp_path)  # type: ignore[arg-type]
    text = (tmp_path / "load.py").read_text()
    assert f'"INFERENCE_PRECISION_HINT": "{hint}"' in text
    assert '"INFERENCE_NUM_THREADS": 1' in text


def test_threads_reach_the_engine(tmp_path: Path) -> None:
    OnnxRuntime(threads=3).pack(lowered("cnn"), tmp_path)
    assert "= 3, 3" in (tmp_path / "load.py").read_text()


def test_bf16_in_eager_is_close(tmp_path: Path) -> None:
    """bfloat16 is emulated where the CPU does not have it: slow, but the arithmetic is the same."""
    of = network("cnn")
    Eager(precision="bf16").pack(of, tmp_path)
    with Runner(tmp_path) as runner:
        got = runner(*of.example)[0]
    import torch

    with torch.inference_mode():
        expected = of.module(torch.from_numpy(of.example[0])).numpy()
    assert got.dtype == np.float32
    assert 1e-6 < np.abs(got - expected).max() / np.abs(expected).max() < 0.05


def test_static_shapes_serve_many_batch_sizes(tmp_path: Path) -> None:
    OpenVINO(shapes="static").pack(lowered("cnn"), tmp_path)
    x = lowered("cnn").example[0]
    with Runner(tmp_path) as runner:
        whole = runner(x)[0]
        for size in (1, 2, 3):
            np.testing.assert_allclose(runner(x[:size])[0], whole[:size], atol=1e-5)


@pytest.mark.parametrize("kind", [OnnxRuntime, OpenVINO])
def test_packed_folders_hold_compressed_files_and_the_same_answers(tmp_path: Path, kind: type) -> None:
    of, answers, files = lowered("cnn"), {}, {}
    for packed in (False, True):
        folder = tmp_path / str(packed)
        folder.mkdir()
        kind(packed=packed, threads=1).pack(of, folder)
        files[packed] = {f.name for f in folder.iterdir()} - {"load.py"}
        with Runner(folder) as runner:
            answers[packed] = runner(*of.example)[0]
    assert files[True] == {f"{name}.xz" for name in files[False]}
    np.testing.assert_array_equal(answers[True], answers[False])


@pytest.mark.parametrize("kind", [OnnxRuntime, OpenVINO])
def test_packing_shrinks_zeros_and_shared_weights(tmp_path: Path, kind: type) -> None:
    """A linear layer of a million weights: its own, nine in ten of them zero, and sixteen different ones."""
    random = np.random.default_rng(0)
    own = (0.05 * random.standard_normal((1000, 1000))).astype(np.float32)
    sparse = np.where(np.abs(own) < np.quantile(np.abs(own), 0.9), 0, own)
    shared = np.round(own * 53).clip(-8, 7) / np.float32(53)
    sizes = {}
    for name, weight in (("own", own), ("sparse", sparse), ("shared", shared)):
        folder = tmp_path / name
        folder.mkdir()
        kind(packed=True).pack(product(weight), folder)
        sizes[name] = size_bytes(folder)
    assert 0.80 < sizes["own"] / own.nbytes < 0.9
    assert 0.08 < sizes["sparse"] / own.nbytes < 0.13
    assert 0.08 < sizes["shared"] / own.nbytes < 0.15


def test_the_search_does_not_try_packing() -> None:
    assert "packed" not in {**OnnxRuntime().space(), **OpenVINO().space()}


def product(weight: np.ndarray) -> Network:  # type: ignore[type-arg]
    """x · W as a graph."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    ends = [helper.make_tensor_value_info(n, 1, ["batch", s]) for n, s in zip("xy", weight.shape, strict=True)]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return Network(kind="graph", body=model, example=(np.ones((2, weight.shape[0]), np.float32),))


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (OnnxRuntime(provider="cuda"), r"has no CUDAExecutionProvider, only .*CPUExecutionProvider.*pip install onnxruntime-gpu"),
        (OnnxRuntime(provider="tensorrt"), "no TensorrtExecutionProvider"),
        (OnnxRuntime(provider="coreml"), "no CoreMLExecutionProvider"),
        (OnnxRuntime(provider="qnn"), "pip install onnxruntime-qnn"),
        (OpenVINO(device="GPU"), "finds no GPU on this machine, only CPU; is its driver there"),
        (OpenVINO(device="NPU", shapes="static"), "finds no NPU"),
    ],
    ids=str,
)
def test_a_device_that_is_not_here_says_why(engine: OnnxRuntime | OpenVINO, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.engines import onnxruntime, openvino

    monkeypatch.setattr(onnxruntime, "_here", lambda: ("AzureExecutionProvider", "CPUExecutionProvider"))
    monkeypatch.setattr(openvino, "_here", lambda: ("CPU",))
    assert re.search(message, engine.available() or "")
    assert OnnxRuntime().space()["provider"] == ("cpu",)
    assert OpenVINO().space()["device"] == ("CPU",)


def test_devices_that_are_here_are_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.engines import onnxruntime, openvino

    monkeypatch.setattr(onnxruntime, "_here", lambda: ("CUDAExecutionProvider", "CPUExecutionProvider"))
    monkeypatch.setattr(openvino, "_here", lambda: ("CPU", "GPU", "NPU"))
    assert OnnxRuntime(provider="cuda").available() is None
    assert OnnxRuntime().space()["provider"] == ("cpu", "cuda")
    assert OpenVINO().space()["device"] == ("CPU", "GPU")
    assert OpenVINO(shapes="static").space()["device"] == ("CPU", "GPU", "NPU")
    assert not OpenVINO(device="NPU", shapes="static").lossless
    assert not OnnxRuntime(provider="qnn").lossless


def test_the_machine_is_asked_for_its_devices_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    from hasten.engines import openvino as engine

    asked: list[int] = []
    monkeypatch.setattr(openvino, "Core", lambda: asked.append(1) or SimpleNamespace(available_devices=["CPU", "GPU.0", "GPU.1"]))
    engine._here.cache_clear()
    try:
        assert [engine._here() for _ in range(3)] == [("CPU", "GPU")] * 3
        assert len(asked) == 1
    finally:
        engine._here.cache_clear()


def test_devices_are_checked() -> None:
    with pytest.raises(ValueError, match=r"provider must be one of cpu, cuda.*, got 'tpu'"):
        OnnxRuntime(provider="tpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device must be one of CPU, GPU, NPU, got 'TPU'"):
        OpenVINO(device="TPU")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the NPU takes static shapes only"):
        OpenVINO(device="NPU")
    with pytest.raises(ValueError, match="'inside' or 'safetensors', got 'outside'"):
        Program(weights="outside")  # type: ignore[arg-type]


def test_a_provider_is_asked_for_by_name_and_never_replaced_in_silence(tmp_path: Path) -> None:
    OnnxRuntime(provider="tensorrt").pack(lowered("mlp"), tmp_path)
    text = (tmp_path / "load.py").read_text()
    assert '["TensorrtExecutionProvider", ("CUDAExecutionProvider", {"use_tf32": 0}), "CPUExecutionProvider"]' in text
    assert len([line for line in text.splitlines() if line.strip()]) <= 10
    with pytest.raises(ChildFailed, match="ONNX Runtime cannot use its TensorrtExecutionProvider here"):
        Runner(tmp_path).close()


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        (OpenVINO(threads=3), '{"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 3, "INFERENCE_PRECISION_HINT": "f32"}'),
        (OpenVINO(device="GPU", precision="bf16"), '{"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f16"}'),
        (OpenVINO(device="NPU", shapes="static"), '{"PERFORMANCE_HINT": "LATENCY"}'),
    ],
    ids=str,
)
def test_each_device_is_told_what_it_knows(engine: OpenVINO, settings: str) -> None:
    assert f"settings = {settings}" in engine._loader()
    assert f'"{engine.device}", settings' in engine._loader()
    compile(engine._loader(), "load.py", "exec")


def contestants(of: Network, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, every: bool) -> dict[str, str | None]:
    """Each engine of the race with its reason, nothing being packed."""
    from hasten import racing
    from hasten.load import files

    monkeypatch.setattr(files, "open_in_room", lambda *_: of)
    monkeypatch.setattr(files, "check_forward", lambda network: network)
    for kind in EVERY:
        monkeypatch.setattr(kind, "pack", lambda self, network, folder: None)
        if kind not in (OnnxRuntime, OpenVINO):
            monkeypatch.setattr(kind, "available", lambda self: None)
    reply = racing._pack_all(into=str(tmp_path / "new"), model={"path": "m.onnx"}, data=None, rows=2, every=every)
    return {row["engine"]: row["reason"] for row in reply.value["rows"]}


def test_the_race_takes_what_is_quick_and_here_or_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hasten.engines import onnxruntime, openvino

    monkeypatch.setattr(onnxruntime, "_here", lambda: ("CUDAExecutionProvider", "CPUExecutionProvider"))
    monkeypatch.setattr(openvino, "_here", lambda: ("CPU",))
    quick = contestants(network("mlp"), monkeypatch, tmp_path, every=False)
    assert set(quick) == {"Eager", "OnnxRuntime", "OnnxRuntime(provider='cuda')", "OpenVINO", "TorchCompile"}
    found = contestants(network("mlp"), monkeypatch, tmp_path, every=True)
    assert set(quick) | {"AotInductor", "ExecuTorch", "LiteRT", "Program", "OnnxRuntime(provider='qnn')"} <= set(found)
    assert "finds no GPU" in (found["OpenVINO(device='GPU')"] or "")
    assert found["AotInductor"] is None


def test_the_race_says_which_engines_need_a_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = contestants(replace(lowered("mlp"), notes=("it stays a graph",)), monkeypatch, tmp_path, every=True)
    assert found["LiteRT"] == "LiteRT needs a torch module: it stays a graph"
    assert found["OnnxRuntime"] is None


class Bag(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "engine",
    [
        OnnxRuntime(),
        OpenVINO(),
        OpenVINO(shapes="static"),
        Program(),
        pytest.param(TorchCompile(), marks=pytest.mark.long),
        pytest.param(AotInductor(), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_token_ids_of_a_user_may_have_any_length(engine: Engine, tmp_path: Path) -> None:
    ids = np.arange(24).reshape(4, 6) % 20
    given = from_module(Bag(), (ids,))
    engine.pack(lower(given) if engine.takes == "graph" else given, tmp_path)
    with Runner(tmp_path) as runner:
        for x in (ids, ids[:, :3], ids[:1], np.tile(ids, 2)):
            np.testing.assert_allclose(runner(x)[0], forward(given, (x,))[0], atol=1e-5)
