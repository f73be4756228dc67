"""Weights that an ONNX file says lie elsewhere: every spelling of elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from onnx import TensorProto, numpy_helper

from hostile.cases import Make, add_all
from hostile.graphs import model, node

BYTES = 24


def outside(location: str, **facts: object) -> bytes:
    """y = x · w, with w in another file."""
    w = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    w.ClearField("raw_data")
    w.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **facts}.items():
        w.external_data.add(key=key, value=str(value))
    return model([node("MatMul", "x w")], {"w": w})


def at(location: str, **facts: object) -> Make:
    def make(path: Path) -> bytes:
        secret = path.parent.parent / "secret"
        secret.write_bytes(b"\0" * BYTES)
        (path.parent / "raw").write_bytes(b"\0" * BYTES)
        return outside(location.replace("SECRET", str(secret)), **facts)

    return make


def linked(how: str) -> Make:
    def make(path: Path) -> bytes:
        secret = path.parent.parent / "away" / "secret"
        secret.parent.mkdir(exist_ok=True)
        secret.write_bytes(b"\0" * BYTES)
        place = path.parent / "w"
        if how == "soft":
            place.symlink_to(secret)
        elif how == "hard":
            os.link(secret, place)
        elif how == "pipe":
            os.mkfifo(place)
        elif how == "device":
            place.symlink_to("/dev/zero")
        elif how == "folder":
            place.mkdir()
        elif how == "circle":
            place.symlink_to("w")
        else:
            place.symlink_to(secret.parent)
        return outside("w/secret" if how == "away" else "w")

    return make


def shared(_: Path) -> bytes:
    """64 weights that are one stretch of one file of 2^25 bytes."""
    (_.parent / "raw").write_bytes(b"\0" * 2**25)
    weights = {}
    for i in range(60):
        w = TensorProto(name=f"w{i}", dims=[2**23], data_type=1, data_location=TensorProto.EXTERNAL)
        w.external_data.add(key="location", value="raw")
        weights[w.name] = w
    return model([node("Neg", "x")], weights)


ELSEWHERE = {
    "absolute": "/etc/passwd", "the secret itself": "SECRET", "up": "../secret", "up in the middle": "a/../../secret", "up, hidden": "./../secret",
    "up twice": "../../etc/passwd", "backslashes": "..\\secret", "a drive": "C:\\secret", "a drive with slashes": "C:/secret", "a share": "\\\\host\\share",
    "home": "~/secret", "an end inside": "raw\0.bin", "a line inside": "raw\n../secret", "escape codes": "\x1b[2Jraw", "a URL": "file:///etc/passwd",
    "percent": "%2e%2e/secret", "wide dots": "\uff0e\uff0e/secret", "a wide slash": "..\uff0fsecret", "one dot leader": "\u2025/secret",
    "right to left": "raw\u202etxt", "very long": "a/" * 5000 + "secret", "a long name": "n" * 300, "nothing": "", "a dot": ".", "the model": "m.onnx/", "proc": "/proc/self/environ",
}  # fmt: skip
WORDS = "plain relative path|none that can be read|a link or no file|weights in"
add_all("weights at", "m.onnx", {name: (at(place), WORDS) for name, place in ELSEWHERE.items()})
add_all("weights behind", "m.onnx", {how: (linked(how), WORDS) for how in ("soft", "hard", "pipe", "device", "folder", "circle", "away")})
add_all("weights", "m.onnx", {
    "beyond the end": (at("raw", offset=8, length=24), "expected 32 bytes of weights in 'raw', got 24"),
    "from far": (at("raw", offset=2**62), "bytes of weights in 'raw', got 24"),
    "from before": (at("raw", offset=-8), "bytes of weights in 'raw', got 24"),
    "of negative length": (at("raw", length=-1), "bytes of weights in 'raw', got 24"),
    "of 2^62": (at("raw", length=2**62), "bytes of weights in 'raw', got 24"),
    "of a length in words": (at("raw", length="all"), "no ONNX model"),
    "fewer than the shape": (at("raw", length=8), "expected 24 numbers or bytes in tensor 'w'"),
    "shared by sixty": (shared, "claims? .* of weights|more than"),
})  # fmt: skip
