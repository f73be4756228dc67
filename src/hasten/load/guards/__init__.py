"""Looks at files of strangers before any library parses them. Every function reads, checks and raises; none runs what it reads.

| function | of |
|---|---|
| `plain_file(folder, name)` | a file that another file names: inside the folder, no link |
| `read_json(data, what)` | JSON without duplicate keys, endless numbers or depth |
| `read_zip(path)`, `packed(entries)` | the entries of a zip archive; the same as an archive of our own |
| `check_pickle(data, what)`, `open_checkpoint(path)` | a state dict that `torch.load(weights_only=True)` may read |
| `check_safetensors(path)` | the header of a `.safetensors` file |
| `check_index(path)` | the index of several such files, and these files |
| `check_hdf5(path)` | an `.h5` file: no links, no other files, no sizes that are not there (opens it with h5py: in a child) |
| `check_layers(config)` | the description of a Keras model: Keras' own layers only |
| `read_keras(path)` | the entries of a `.keras` file, looked through with the three above |
| `graphs.check_model(model)` | an ONNX model: sizes, depth, functions, tensors (not here: it needs onnx) |
| `check_tflite(data)` | every offset of a `.tflite` file |
| `check_saved_model(folder)` | a TensorFlow SavedModel: no operator that reaches out of the graph |

What they refuse is `ModelRefused` (exit 4) with one line. What they read is bounded by `most_bytes(size of the file)`.
"""

from hasten.load.guards.archives import packed, read_zip
from hasten.load.guards.flat import check_tflite
from hasten.load.guards.hdf5 import check_hdf5
from hasten.load.guards.jsons import read_json
from hasten.load.guards.layers import check_layers, read_keras
from hasten.load.guards.pickles import check_pickle, open_checkpoint
from hasten.load.guards.places import most_bytes, plain_file
from hasten.load.guards.safetensors import check_index, check_safetensors
from hasten.load.guards.savedmodel import check_saved_model

__all__ = [
    "check_hdf5",
    "check_index",
    "check_layers",
    "check_pickle",
    "check_safetensors",
    "check_saved_model",
    "check_tflite",
    "most_bytes",
    "open_checkpoint",
    "packed",
    "plain_file",
    "read_json",
    "read_keras",
    "read_zip",
]
