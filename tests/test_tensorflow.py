"""Keras, SavedModel and TFLite files. What is refused is refused without TensorFlow; the rest runs where it is.

TensorFlow may be in another Python, which the variable HASTEN_TENSORFLOW names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from hasten.core.errors import BackendMissing, ModelRefused
from hasten.load.files import open_network
from hasten.load.lower import forward
from hostile import keras_files
from networks import equal
from test_examples import example as example_file

HERE = importlib.util.find_spec("tensorflow") is not None and importlib.util.find_spec("tf2onnx") is not None
needs_tensorflow = [
    pytest.mark.long,
    pytest.mark.skipif(not HERE and "HASTEN_TENSORFLOW" not in os.environ, reason="tensorflow and tf2onnx are not installed"),
]

WRITE = """
import sys, numpy as np, keras, tensorflow as tf
from keras import layers as L
keras.utils.set_random_seed(0)
out = sys.argv[1]
def block(x): return L.ReLU()(L.BatchNormalization()(x))
i = L.Input((16, 16, 3))
first = block(L.Conv2D(8, 3, padding="same", use_bias=False)(i))
x = L.Conv2D(8, 1)(block(L.DepthwiseConv2D(3, padding="same")(first)))
x = L.MaxPooling2D()(L.Add()([x, first]))
x = L.Conv2D(8, 3, strides=2, padding="same", activation="relu")(L.Concatenate()([x, x]))
x = L.Multiply()([x, L.Dense(8, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(x))])
images = keras.Model(i, L.Dense(5, activation="softmax")(L.Flatten()(x)))
i = L.Input((None, 6))
series = keras.Model(i, L.Dense(3)(L.LSTM(8)(i)))
left, right = L.Input((4,), name="left"), L.Input((6,), name="right")
named = keras.Model({"right": right, "left": left}, {"sum": L.Dense(3)(L.Concatenate()([left, right])), "first": L.Dense(2)(left)})
for name, model in dict(images=images, series=series, named=named).items():
    model.save(f"{out}/{name}.keras")
    xs = [np.random.default_rng(0).standard_normal((4, *[s or 7 for s in t.shape[1:]])).astype("f") for t in model.inputs]
    given = xs[0] if len(xs) == 1 else dict(zip([t.name for t in model.inputs], xs))
    ys = [y.numpy() for y in tf.nest.flatten(model(given, training=False))]
    np.savez(f"{out}/{name}.npz", **{f"x{k}": v for k, v in enumerate(xs)}, **{f"y{k}": v for k, v in enumerate(ys)})
images.save(f"{out}/images.h5")
images.export(f"{out}/images_saved")
open(f"{out}/images.tflite", "wb").write(tf.lite.TFLiteConverter.from_saved_model(f"{out}/images_saved").convert())
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keras")
    python = os.environ.get("HASTEN_TENSORFLOW", sys.executable)
    subprocess.run([python, "-c", WRITE, str(folder)], check=True, capture_output=True, env={**os.environ, "KERAS_BACKEND": "tensorflow"})
    return folder


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(f, marks=needs_tensorflow)
        for f in ("images.keras", "images.h5", "images_saved", "images.tflite", "series.keras", "named.keras")
    ],
)
def test_gives_what_keras_gives(written: Path, file: str) -> None:
    with np.load(written / f"{file.partition('.')[0].removesuffix('_saved')}.npz") as held:
        xs, ys = (tuple(held[n] for n in sorted(held.files) if n[0] == letter) for letter in "xy")
    network = open_network(written / file, xs)
    assert network.fixed_batch is None
    assert equal(forward(network, xs), ys)
    if file.startswith("images"):
        graph = network.source
        assert graph is not None
        turned = sum(node.op_type == "Transpose" for node in graph.graph.node)
        assert turned <= 2  # one behind the input, one in front of Flatten: none between the layers
        assert sum(type(m) is nn.Conv2d for m in network.module.modules()) == 4
    if file.startswith("series"):
        assert [n.op_type for n in network.source.graph.node if n.op_type in ("LSTM", "Loop")] == ["LSTM"]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [pytest.param("three_frameworks", marks=needs_tensorflow)])
def test_one_network_from_three_frameworks(name: str, tmp_path: Path) -> None:
    assert example_file(name).main(tmp_path) < 1e-5


def keras_file(path: Path, layer: dict[str, Any]) -> Path:
    """A `.keras` file of one layer, with some weights."""
    pytest.importorskip("h5py")
    layers = [{"module": "keras.layers", "class_name": "InputLayer", "config": {"name": "x"}}, layer]
    config = {
        "module": "keras",
        "class_name": "Sequential",
        "config": {"name": "m", "layers": layers},
        "compile_config": {"loss": "own>loss"},
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", keras_files.hdf5(keras_files.honest))
    return path


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (
            {"module": "keras.layers", "class_name": "Lambda", "config": {"name": "twice"}},
            r"m.keras: layer 'twice' \(Lambda\) holds Python code",
        ),
        (
            {"module": "mine.layers", "class_name": "Gate", "config": {"name": "g"}, "registered_name": "mine>Gate"},
            r"layer 'g' \(Gate\) is of the custom class Gate of mine.layers.*model.export",
        ),
    ],
)
def test_layers_that_hold_code_are_named(tmp_path: Path, layer: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelRefused, match=words):
        open_network(keras_file(tmp_path / "m.keras", layer))


def test_files_that_are_damaged(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("other.json", "{}")
    for name, data, words in (
        ("m.tflite", b"x", "is no .tflite file"),
        ("m.h5", b"x", "is no HDF5 file"),
        ("n.keras", b"x", "is no zip archive"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelRefused, match=words):
            open_network(tmp_path / name)
    with pytest.raises(ModelRefused, match=r"must hold a config.json as Keras 3 writes it"):
        open_network(tmp_path / "m.keras")


def test_weights_of_keras_without_their_network(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["w"] = np.ones(3)
    with pytest.raises(ModelRefused, match=r"w.h5 holds weights without their network; save the whole"):
        open_network(tmp_path / "w.h5")


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = {"module": "keras.layers", "class_name": "Dense", "config": {"name": "d", "units": 2}}
    path = keras_file(tmp_path / "m.keras", dense)
    monkeypatch.setenv("HASTEN_TENSORFLOW", "/no/python")
    with pytest.raises(BackendMissing, match="HASTEN_TENSORFLOW must name a Python with tensorflow and tf2onnx, got /no/python"):
        open_network(path)
    stand_in = tmp_path / "python"
    for code, printed, kind, words in (
        (5, {"error": "tf2onnx"}, BackendMissing, r"m.keras needs tf2onnx; pip install 'hasten\[tensorflow\]'"),
        (4, {"error": "ValueError: no"}, ModelRefused, "m.keras cannot be converted to ONNX: ValueError: no"),
    ):
        stand_in.write_text(f"#!/bin/sh\necho '{json.dumps(printed)}'\nexit {code}\n")
        stand_in.chmod(0o755)
        monkeypatch.setenv("HASTEN_TENSORFLOW", str(stand_in))
        with pytest.raises(kind, match=words):
            open_network(path)
