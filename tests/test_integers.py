"""Q/DQ graphs on the way to LiteRT: the roundings stay, and come out as integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import networks
from hasten.compress import QuantizeStatic
from hasten.core.data import View
from hasten.core.network import Network
from hasten.core.recipe import Context
from hasten.core.runner import Runner
from hasten.engines import LiteRT, OnnxRuntime, OpenVINO
from hasten.load import files
from hasten.load.importer.integers import has_integers, with_integers
from hasten.load.lower import lower, run_graph


def images() -> np.ndarray:
    shape = networks.network("cnn").example[0].shape[1:]
    return np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32)


def rounded(engine: OnnxRuntime | OpenVINO) -> Network:
    view = View(inputs=(images(),))
    context = Context(train=view, calibrate=view, profile=engine.profile)
    return QuantizeStatic().apply(networks.lowered("cnn"), context)


@pytest.mark.parametrize("engine", [OnnxRuntime(), OpenVINO()], ids=["unsigned", "signed"])
def test_roundings_are_followed_as_pairs(engine: OnnxRuntime | OpenVINO) -> None:
    network = rounded(engine)
    assert has_integers(network.graph)
    module = with_integers(network.graph, (images()[:2],))
    wanted = run_graph(network.graph, (images(),))[0]
    with torch.no_grad():
        got = module(torch.from_numpy(images()))[0].numpy()
    assert np.abs(got - wanted).max() <= 0.02 * np.abs(wanted).max()  # a step here and there falls the other way
    program = torch.export.export(module, (torch.from_numpy(images()[:1]),))
    called = {str(n.target) for n in program.graph.nodes}
    assert {f"quantized_decomposed.quantize_per_{what}.default" for what in ("tensor", "channel")} <= called


def test_a_graph_in_floats_has_none() -> None:
    assert not has_integers(lower(files.from_module(nn.Linear(3, 2).eval(), (np.zeros((2, 3), np.float32),))).graph)


def test_litert_gets_integers(tmp_path: Path) -> None:
    interpreter = pytest.importorskip("ai_edge_litert.interpreter")
    pytest.importorskip("litert_torch")
    network = rounded(OnnxRuntime())
    LiteRT().pack(files.imported(network), tmp_path)
    model = interpreter.Interpreter(str(tmp_path / "model.tflite"))
    kinds = [d["dtype"] for d in model.get_tensor_details()]
    assert kinds.count(np.int8) > kinds.count(np.float32)
    with Runner(tmp_path) as runner:
        got = runner.outputs((images(),))[0]
    wanted = run_graph(network.graph, (images(),))[0]
    assert np.abs(got - wanted).max() <= 0.02 * np.abs(wanted).max()
