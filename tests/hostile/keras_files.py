"""`.keras`, `.h5` and SavedModel: layers of code, links to other files, sizes that are not there. Made without Keras or TensorFlow."""

from __future__ import annotations

import base64
import io
import json
import marshal
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hostile.cases import Make, add_all
from hostile.containers import MEGA, archive, inflating


def layer(kind: str, module: Any = "keras.layers", registered: Any = None, **config: Any) -> dict[str, Any]:
    return {"module": module, "class_name": kind, "config": {"name": "mine", **config}, "registered_name": registered}


def described(*layers: Any) -> dict[str, Any]:
    return layer("Sequential", "keras", layers=[layer("InputLayer", batch_shape=[None, 4]), *layers])


def keras(config: Any, weights: Callable[[Any], object] | None = None) -> Make:
    def make(_: Path) -> bytes:
        text = config if isinstance(config, bytes) else json.dumps(config).encode()
        return archive({"metadata.json": b"{}", "config.json": text, "model.weights.h5": hdf5(weights or honest)})

    return make


def hdf5(fill: Callable[[Any], object]) -> bytes:
    import h5py

    made = io.BytesIO()
    with h5py.File(made, "w") as file:
        fill(file)
    return made.getvalue()


def h5(fill: Callable[[Any], object]) -> Make:
    return lambda _: hdf5(fill)


def honest(file: Any) -> None:
    file.create_dataset("layers/dense/vars/0", data=np.ones((4, 3), np.float32))
    file.create_dataset("layers/dense/vars/1", data=np.ones(3, np.float32), compression="gzip", shuffle=True)
    file.attrs["model_config"] = json.dumps(described(layer("Dense", units=3)))


CODE = base64.b64encode(marshal.dumps(compile("__import__('os').mkdir('trap')", "m", "exec"))).decode()
HELD = {"class_name": "__lambda__", "config": {"value": [CODE, None, None]}}
CUSTOM = "custom class"
add_all("keras", "m.keras", {
    "a Lambda": (keras(described(layer("Lambda", function=HELD))), "layer 'mine' \\(Lambda\\) holds Python code"),
    "a lambda in a Dense": (keras(described(layer("Dense", units=3, activation=HELD))), "holds Python code \\(__lambda__\\)"),
    "a Lambda three deep": (keras(described(described(described(layer("Lambda", function=HELD))))), "holds Python code"),
    "a Lambda under another name": (keras(described(layer("own>Lambda", registered="own>Lambda", function=HELD))), "holds Python code"),
    "a Lambda of old Keras": (keras(described({"class_name": "Lambda", "config": {"name": "mine", "function": [CODE, None, None]}})), "holds Python code"),
    "a pickled torch module": (keras(described(layer("TorchModuleWrapper", module="gASV"))), "holds a pickle"),
    "another SavedModel": (keras(described(layer("TFSMLayer", filepath="/tmp/evil"))), "holds another model file"),
    "jax code": (keras(described(layer("JaxLayer"))), "holds Python code"),
    "os.system": (keras(described(layer("system", "os"))), CUSTOM),
    "eval as activation": (keras(described(layer("Dense", activation=layer("function", "builtins", "eval")))), CUSTOM),
    "subprocess": (keras(layer("run", "subprocess", args=["id"])), CUSTOM),
    "a module like Keras": (keras(described(layer("Dense", "keras_evil.layers"))), CUSTOM),
    "a module behind Keras": (keras(described(layer("get_file", "keras.utils", origin="http://example.org/x"))), CUSTOM),
    "a module by a list": (keras(described(layer("Dense", ["os"]))), CUSTOM),
    "a class by a list": (keras(described({"class_name": ["Dense"], "config": {}})), "the name of a class"),
    "a registered class": (keras(described(layer("Mine", None, "own>Mine"))), CUSTOM),
    "escape codes": (keras(described(layer("\x1b[2JEvil", "os"))), CUSTOM),
    "a vocabulary in a file": (keras(described(layer("StringLookup", vocabulary="/etc/passwd"))), "reads another file"),
    "a configuration 5,000 deep": (keras(b'{"config":' * 5000 + b"1" + b"}" * 5000), "at most 200 levels"),
    "150 models in each other": (keras(b'{"class_name":"Sequential","config":' * 150 + b"{}" + b"}" * 150), "at most 100 levels"),
    "a key twice": (keras(b'{"class_name": "Dense", "class_name": "Lambda"}'), "each key once"),
    "no JSON": (keras(b"\x80\x02}."), "text that is none"),
    "a bomb of JSON": (lambda _: inflating("config.json", 300 * MEGA), "must unpack to at most"),
    "no weights": (lambda _: archive({"config.json": b"{}"}), "must hold a model.weights.h5"),
    "other tensors that link away": (lambda _: archive({"config.json": json.dumps(described()).encode(), "model.weights.h5": hdf5(honest), "assets/more.h5": hdf5(lambda f: f.__setitem__("w", _away()))}), "a link to another place"),
    "a list": (keras([described()]), "an object in config.json"),
    "weights that link away": (keras(described(), lambda f: f.__setitem__("w", _away())), "a link to another place"),
}, door="keras")  # fmt: skip


def _away() -> Any:
    import h5py

    return h5py.ExternalLink("/etc/passwd", "/")


def soft(target: str) -> Callable[[Any], None]:
    def fill(file: Any) -> None:
        import h5py

        file["w"] = h5py.SoftLink(target)

    return fill


def circle(file: Any) -> None:
    file.create_group("a")["b"] = file["/"]


def twice(file: Any) -> None:
    file["a"] = np.ones(3)
    file["b"] = file["a"]


def elsewhere(file: Any) -> None:
    file.create_dataset("w", (4,), np.uint8, external=[("/etc/passwd", 0, 4)])


def virtual(file: Any) -> None:
    import h5py

    layout = h5py.VirtualLayout((4,), np.uint8)
    layout[:] = h5py.VirtualSource("/etc/passwd", "w", (4,))
    file.create_virtual_dataset("w", layout)


def huge(**how: Any) -> Callable[[Any], None]:
    return lambda file: file.create_dataset("w", (2**40,), np.float32, **how)


def wide_chunk(file: Any) -> None:
    made = file.create_dataset("w", (2**29,), np.uint8, chunks=(2**29,), compression="gzip")
    made.id.write_direct_chunk((0,), zlib.compress(b"1"))


def zeros(file: Any) -> None:
    made = file.create_dataset("w", (300, MEGA), np.uint8, compression="gzip", chunks=(1, MEGA))
    chunk = zlib.compress(bytes(MEGA))
    for row in range(300):
        made.id.write_direct_chunk((row, 0), chunk)


def deep(file: Any) -> None:
    file.create_group("/".join("a" * 100))


def reference(file: Any) -> None:
    import h5py

    file.create_dataset("w", (1,), h5py.ref_dtype)[0] = file.ref


def compound(file: Any) -> None:
    file["w"] = np.zeros(3, [("a", "f4"), ("b", "i4")])


def strange_filter(_: Path) -> bytes:
    """The number of the gzip filter replaced by one that only a plugin could be."""
    data = hdf5(lambda f: f.create_dataset("w", (100,), np.uint8, compression="gzip", chunks=(100,)).__setitem__(slice(None), 1))
    at = data.index(b"deflate") - 8
    return data[:at] + b"\x00\x80" + data[at + 2 :]


AWAY = "a link to another place"
add_all("h5", "m.h5", {
    "a link to a file": (h5(lambda f: f.__setitem__("w", _away())), AWAY),
    "a link to itself": (h5(soft("/w")), AWAY),
    "a link up": (h5(soft("/")), AWAY),
    "a link to nothing": (h5(soft("/nowhere")), AWAY),
    "a group in itself": (h5(circle), "under two names"),
    "a tensor twice": (h5(twice), "under two names"),
    "data of another file": (h5(elsewhere), "in another file"),
    "virtual data": (h5(virtual), "in another file"),
    "2^40 numbers never written": (h5(huge(chunks=(1024,))), "that the file does not hold"),
    "2^40 numbers in one chunk": (h5(wide_chunk), "that the file does not hold"),
    "300 MB of zeros": (h5(zeros), "of tensors, claims more"),
    "100 groups deep": (h5(deep), "64 deep"),
    "references": (h5(reference), "must be numbers or text"),
    "a compound": (h5(compound), "must be numbers or text"),
    "a filter of a plugin": (strange_filter, "got filter 32768|no whole HDF5"),
    "a block in front": (lambda _: bytes(512) + hdf5(honest), "does not begin like one"),
    "cut off": (lambda _: hdf5(honest)[:-700], "no whole HDF5"),
    "empty": (lambda _: b"", "does not begin like one"),
}, door="h5")  # fmt: skip


def field(number: int, data: bytes) -> bytes:
    length, out = len(data), bytearray()
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    return bytes((number << 3 | 2, *out, length)) + data


def graph(operator: str, *, inside: bool = False) -> bytes:
    """A SavedModel with one node, in the graph or in a function of it."""
    node = field(1, b"n") + field(2, operator.encode())
    body = field(2, field(1, field(3, node))) if inside else field(1, node)
    return field(2, field(2, body))


def saved(data: bytes, more: Callable[[Path], object] = lambda _: None) -> Make:
    def make(path: Path) -> None:
        (path / "variables").mkdir(parents=True)
        (path / "saved_model.pb").write_bytes(data)
        more(path)

    return make


def _twin(path: Path) -> None:
    secret = path.parent / "secret"
    secret.write_bytes(b"1")
    os.link(secret, path / "variables" / "v")


OUT = "which reaches out of the graph"
add_all("saved model", "m", {
    "reads a file": (saved(graph("ReadFile")), OUT),
    "writes a file": (saved(graph("WriteFile")), OUT),
    "writes a file in a function": (saved(graph("WriteFile", inside=True)), OUT),
    "calls Python": (saved(graph("PyFunc")), OUT),
    "calls Python at once": (saved(graph("EagerPyFunc", inside=True)), OUT),
    "lists files": (saved(graph("MatchingFiles")), OUT),
    "a soft link": (saved(graph("Identity"), lambda p: (p / "variables" / "v").symlink_to("/etc/passwd")), "a link or more"),
    "a linked folder": (saved(graph("Identity"), lambda p: (p / "assets").symlink_to("/etc")), "a link or more"),
    "a hard link": (saved(graph("Identity"), _twin), "a link or no file"),
    "a field that ends outside": (saved(b"\x12\xff\xff\xff\xff\x0f"), "is damaged"),
    "a number without an end": (saved(b"\xff" * 20), "is damaged"),
    "no description": (lambda p: p.mkdir(), "none that can be read"),
}, door="saved model")  # fmt: skip
