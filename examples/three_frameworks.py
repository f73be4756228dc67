"""The network 784-128-64-10 from PyTorch, Keras and TensorFlow: three files, one network, equal outputs.

Run: python examples/three_frameworks.py
Keras and TensorFlow files need TensorFlow and tf2onnx, here or in the Python that the variable HASTEN_TENSORFLOW names.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

WIDTHS = (784, 128, 64, 10)
TORCH = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
"""


def write_torch(weights: list[np.ndarray], folder: Path) -> None:
    """net.py and net.safetensors. PyTorch keeps a layer as (outputs, inputs)."""
    from safetensors.numpy import save_file

    (folder / "net.py").write_text(TORCH)
    names = [f"{2 * (i // 2)}.{'bias' if i % 2 else 'weight'}" for i in range(len(weights))]
    save_file({n: np.ascontiguousarray(w.T) for n, w in zip(names, weights, strict=True)}, folder / "net.safetensors")


def write_keras_and_tensorflow(folder: Path) -> None:
    """net.keras, and net_saved as plain TensorFlow; both keep a layer as (inputs, outputs)."""
    import keras
    import tensorflow as tf

    with np.load(folder / "weights.npz") as held:
        weights = [held[name] for name in held.files]
    layers = [keras.layers.Dense(n, activation="relu" if n > 10 else None) for n in WIDTHS[1:]]
    model = keras.Sequential([keras.Input((784,)), *layers])
    model.set_weights(weights)
    model.save(folder / "net.keras")

    class Net(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = [tf.Variable(w) for w in weights]

        @tf.function(input_signature=[tf.TensorSpec([None, 784], tf.float32)])
        def __call__(self, x: tf.Tensor) -> tf.Tensor:
            for i in (0, 2, 4):
                x = x @ self.held[i] + self.held[i + 1]
                x = tf.nn.relu(x) if i < 4 else x
            return x

    tf.saved_model.save(Net(), str(folder / "net_saved"))


def main(folder: Path) -> float:
    """Writes the three, opens them with hasten, and gives the largest difference between their outputs."""
    from hasten.load.files import open_network
    from hasten.load.lower import forward
    from hasten.load.source import Source

    draw = np.random.default_rng(0)
    shapes = [s for a, b in itertools.pairwise(WIDTHS) for s in ((a, b), (b,))]
    weights = [draw.normal(0, 0.1, shape).astype(np.float32) for shape in shapes]
    np.savez(folder / "weights.npz", *weights)
    write_torch(weights, folder)
    python = os.environ.get("HASTEN_TENSORFLOW", sys.executable)
    subprocess.run([python, __file__, str(folder)], check=True, capture_output=True)
    x = (draw.uniform(0, 1, (8, 784)).astype(np.float32),)
    sources = (Source.of(f"{folder}/net.py:Net", folder / "net.safetensors"), folder / "net.keras", folder / "net_saved")
    outputs = []
    for source in sources:
        network = open_network(source, x)
        print(f"{Path(str(source)).name:12} {[type(m).__name__ for m in network.module.modules() if not list(m.children())]}")
        outputs.append(forward(network, x)[0])
    return max(float(np.abs(o - outputs[0]).max()) for o in outputs)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        write_keras_and_tensorflow(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as place:
            print(f"largest difference {main(Path(place)):.1g}")
