"""`.pt` files whose pickle would run code, or whose tensors are not what they claim."""

from __future__ import annotations

import functools
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from hostile.cases import Make, Trap, add_all

ROOT = "m/"


@functools.cache
def honest(*, old: bool = False) -> bytes:
    """A state dict of two tensors as torch writes it."""
    made = io.BytesIO()
    torch.save({"a": torch.arange(4.0), "b": torch.ones(2, 3)}, made, _use_new_zipfile_serialization=not old)
    return made.getvalue()


def parts(data: bytes) -> dict[str, bytes]:
    """The entries of an archive below its root."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}


def archive(entries: dict[str, bytes], root: str = ROOT) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, data in entries.items():
            file.writestr(root + name, data)
    return made.getvalue()


def with_pickle(data: bytes, **more: bytes) -> Make:
    return lambda _: archive({**parts(honest()), "data.pkl": data, **more})


def instead(old: bytes, new: bytes) -> Make:
    """An honest file with other words in its pickle."""

    def make(_: Path) -> bytes:
        data = parts(honest())["data.pkl"]
        assert old in data
        return with_pickle(data.replace(old, new))(_)  # type: ignore[return-value]

    return make


def calling(module: str, name: str, argument: bytes = b"U\x04trap") -> bytes:
    """A pickle that calls one function with one text."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."


def reduced(protocol: int) -> bytes:
    return pickle.dumps({"a": Trap()}, protocol)


def strided(size: int) -> bytes:
    """A tensor of `size` numbers over a storage of 4, with stride 0."""
    data = parts(honest())["data.pkl"]
    number = b"\x8a\x08" + size.to_bytes(8, "little", signed=True)
    changed = data.replace(b"K\x00K\x04\x85q", b"K\x00" + number + b"\x85q", 1)
    at = changed.index(number)
    changed = changed[:at] + changed[at:].replace(b"K\x01\x85", b"K\x00\x85", 1)
    assert changed != data
    return changed


def of_two_disks(_: Path) -> bytes:
    """With a record in front of the directory's end that names a second disk."""
    data = honest()
    end = data.rindex(b"PK\x05\x06")
    return data[:end] + b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 2) + data[end:]


def circle() -> bytes:
    """A list inside itself."""
    made: list[Any] = [1]
    made.append(made)
    return pickle.dumps({"a": made}, 2)


def laughs() -> bytes:
    """A list of ten lists of ten lists, …: 2^100 leaves by reference."""
    made: list[Any] = ["ha"]
    for _ in range(30):
        made = [made] * 10
    return pickle.dumps({"a": made}, 2)


CALLED = "got a call of"
GADGETS = {
    "os.system": ("os", "system"), "posix.system": ("posix", "system"), "eval": ("builtins", "eval"), "exec": ("builtins", "exec"), "getattr": ("builtins", "getattr"),
    "__import__": ("builtins", "__import__"), "the old name of builtins": ("__builtin__", "eval"), "subprocess": ("subprocess", "Popen"), "runpy": ("runpy", "_run_code"),
    "partial": ("functools", "partial"), "attrgetter": ("operator", "attrgetter"), "code": ("types", "CodeType"), "marshal": ("marshal", "loads"), "dill": ("dill._dill", "_create_function"),
    "cloudpickle": ("cloudpickle.cloudpickle", "_make_function"), "joblib": ("joblib.memory", "MemorizedFunc"), "numpy's loader": ("numpy", "load"), "numpy's runstring": ("numpy.testing._private.utils", "runstring"),
    "torch.load": ("torch", "load"), "torch.hub": ("torch.hub", "load"), "torch.jit": ("torch.jit", "load"), "a library of operators": ("torch.ops", "load_library"), "a class of torch": ("torch.nn.modules.linear", "Linear"),
    "collect": ("torch.utils._config_module", "ConfigModule.load_config"), "an import by path": ("importlib.util", "spec_from_file_location"), "pip": ("pip", "main"), "webbrowser": ("webbrowser", "open"),
    "hasten itself": ("hasten.load.saved", "load"), "a dotted name": ("torch._utils", "_rebuild_tensor_v2.__globals__"), "escape codes": ("os\x1b[2J", "system"),
}  # fmt: skip
add_all("checkpoint calling", "m.pt", {n: (with_pickle(calling(*g)), CALLED) for n, g in GADGETS.items()}, door="pt")
add_all("checkpoint", "m.pt", {
    **{f"a trap in protocol {p}": (with_pickle(reduced(p)), CALLED) for p in range(6)},
    "a trap alone": (lambda _: reduced(2), CALLED),
    "a trap in the old format": (lambda _: honest(old=True)[:15] + reduced(2), CALLED + "|no whole pickle"),
    "an instance": (with_pickle(b"(U\x04trapios\nsystem\n."), CALLED),
    "an object": (with_pickle(b"(cos\nsystem\nU\x04trapo."), CALLED),
    "an extension": (with_pickle(b"\x80\x02\x82\x01."), CALLED),
    "a name from the stack": (with_pickle(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04trap\x85R."), CALLED),
    "a new object": (with_pickle(b"\x80\x02ccollections\nOrderedDict\n)\x81."), CALLED),
    "a second pickle": (lambda _: archive({**parts(honest()), "constants.pkl": reduced(2)}), "TorchScript program"),
    "a third pickle": (lambda _: archive({**parts(honest()), "more/data.pkl": reduced(2)}), "which no checkpoint of weights does"),
    "code": (lambda _: archive({**parts(honest()), "code/__torch__.py": b"import os"}), "TorchScript program"),
    "another root": (lambda _: archive({"data.pkl": parts(honest())["data.pkl"]}, "a/b/"), "holds no data.pkl|which no checkpoint"),
    "no pickle": (lambda _: archive({"data/0": b""}), "holds no data.pkl"),
    "half a pickle": (with_pickle(parts(honest())["data.pkl"][:60]), "no whole pickle"),
    "an opcode that is none": (with_pickle(b"\x80\x02\xff."), "no whole pickle"),
    "a text of 2^62": (with_pickle(b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"a."), "no whole pickle"),
    "a number of 2^31 bytes": (with_pickle(b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"1."), "no whole pickle"),
    "a memo of 2^31": (with_pickle(b"\x80\x02]r\xff\xff\xff\x7f."), ""),
    "an empty stack": (with_pickle(b"\x80\x02R."), "holds no weights"),
    "a list in itself": (with_pickle(circle()), ""),
    "a billion laughs": (with_pickle(laughs()), ""),
    "a tensor of 2^40 numbers": (with_pickle(strided(2**40)), "stores fewer numbers"),
    "a tensor of −1 numbers": (with_pickle(strided(-1)), "holds no weights"),
    "a storage of 2^28 numbers": (instead(b"K\x04tq", b"J\x00\x00\x00\x10tq"), "holds no weights"),
    "a storage that is not there": (instead(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007"), "holds no weights"),
    "a storage elsewhere": (instead(b"X\x01\x00\x00\x000", b"X\x07\x00\x00\x00../../0"), "holds no weights"),
    "a storage on a card": (instead(b"X\x03\x00\x00\x00cpu", b"X\x04\x00\x00\x00cuda"), ""),
    "a storage too short": (lambda _: archive({**parts(honest()), "data/0": b"1234"}), "holds no weights"),
    "a start far outside": (instead(b"QK\x00K\x04\x85", b"QM\xff\xffK\x04\x85"), "holds no weights"),
    "other bytes first": (lambda _: archive({**parts(honest()), "byteorder": b"big"}), ""),
    "two disks": (of_two_disks, "no zip archive"),
    "empty": (lambda _: b"", "no whole pickle"),
    "text": (lambda _: b"hello " * 50, "no whole pickle|got a call"),
}, door="pt")  # fmt: skip
