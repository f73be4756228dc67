"""Checkpoints: pickles of tensors. They are looked through instruction by instruction before anything runs them."""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hasten.core.errors import ModelRefused
from hasten.load.guards.archives import packed, read_zip

_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat", "ComplexDouble")
_TYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128")
_TENSORS = frozenset(
    {
        "collections OrderedDict",
        "torch Size",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        *(f"torch {name}Storage" for name in _STORAGES),
        *(f"torch {name}" for name in _TYPES),
    }
)
_IMPORTS = ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ", "NEWOBJ_EX", "NEXT_BUFFER", "READONLY_BUFFER")
_ZIP = b"PK\x03\x04"
_MOST = 20_000_000
_OLD = 5  # pickles in front of the numbers in a file of PyTorch 1.5 and older
_AGAIN = "save the weights alone, torch.save(model.state_dict(), path), or write .safetensors"


def check_pickle(file: IO[bytes], what: str) -> None:
    """Reads one pickle without running it, and stops behind it.

    Raises:
        ModelRefused: it would import or call anything but containers and tensors, which it names; or it is damaged.
    """
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            wanted = str(argument) if opcode.name == "GLOBAL" else opcode.name
            if (opcode.name == "GLOBAL" and wanted not in _TENSORS) or opcode.name in _IMPORTS:
                called = wanted.replace(" ", ".")[:100]
                raise ModelRefused(f"expected weights only in {what}, got a call of {called!r}, which could run code: not opened; {_AGAIN}")
            if count > _MOST:
                raise ModelRefused(f"{what} must take at most {_MOST} instructions, got more: not opened")
    except ModelRefused:
        raise
    except Exception as why:  # pickletools raises whatever its parts raise on damaged data
        raise ModelRefused(f"{what} is no whole pickle ({type(why).__name__}); {_AGAIN}") from why


def open_checkpoint(path: Path) -> Any:
    """What `torch.save` wrote of containers, numbers, text and tensors, on the CPU; torch reads a copy, not the file.

    Raises:
        ModelRefused: see `check_pickle`; a program, a damaged file, or a tensor that claims more numbers than it stores.
    """
    import torch

    copy = _checked(path)
    try:
        found = torch.load(copy, map_location="cpu", weights_only=True)
    except Exception as why:  # torch raises anything on a damaged file
        first = (str(why).strip().splitlines() or [""])[0][:200]
        raise ModelRefused(f"{path.name} holds no weights that this PyTorch reads ({type(why).__name__}: {first}); {_AGAIN}") from why
    for tensor in _tensors(found):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ModelRefused(f"{path.name} holds a tensor of shape {tuple(tensor.shape)} that stores fewer numbers: not opened")
    return found


def _checked(path: Path) -> io.BytesIO:
    data = io.BytesIO(path.read_bytes())
    if not data.getvalue().startswith(_ZIP):
        for number in range(_OLD):
            check_pickle(data, f"{path.name} (part {number + 1} of {_OLD})")
        data.seek(0)
        return data
    entries = read_zip(path)
    root = next(iter(entries), "").partition("/")[0]
    code = sorted(n for n in entries if "/code/" in n or n.endswith("/constants.pkl"))
    if code:
        raise ModelRefused(f"{path.name} is a TorchScript program, not weights: it holds {code[0]!r}; {_AGAIN}")
    if f"{root}/data.pkl" not in entries:
        raise ModelRefused(f"{path.name} holds no data.pkl, so it is no checkpoint of PyTorch; {_AGAIN}")
    for name, entry in entries.items():
        plain = re.fullmatch(re.escape(root) + r"/(data/\d+|data\.pkl|version|byteorder|\.\w+|\.data/serialization_id)", name)
        if not plain:
            raise ModelRefused(f"{path.name} holds {name[:100]!r}, which no checkpoint of weights does: not opened; {_AGAIN}")
        if name.endswith(".pkl"):
            check_pickle(io.BytesIO(entry), f"{path.name} ({name})")
    return packed(entries)


def _tensors(found: Any) -> Iterator[Any]:
    """Every tensor in nested containers; each container once, since a pickle can put one into itself."""
    from torch import Tensor

    todo, seen = [found], set()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            todo.extend(value)
