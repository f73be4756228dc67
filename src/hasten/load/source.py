"""Where a network lies: a path, and for a Python file the name in it and the weights. Imports no torch."""

from __future__ import annotations

import ast
import glob
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from hasten.core.errors import StorageError, UsageError
from hasten.core.recipe import fingerprint

__all__ = ["Source"]

_DEFAULT = "model"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A network that is not in memory.

    Args:
        path: a model file, a folder of Hugging Face or TensorFlow, or a Python file. `str` of the path and the name in one,
            "net.py:Classifier", is understood by `Source.of`.
        name: in a Python file the network, its class, or a function that gives it; both are called without arguments.
        weights: for a Python file, a file with its weights: a state dict (.pt, .pth, .bin, .ckpt), .safetensors, or
            the index of several (.safetensors.index.json).
        pins: values for inputs that are no data, such as a sampling rate, by the name of the input.

    >>> Source.of("net.py:Classifier", weights="net.safetensors").name
    'Classifier'
    """

    path: str
    name: str = ""
    weights: str | None = None
    pins: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights is not None and not self.is_script:
            raise UsageError(f"weights are for a class in a Python file (net.py:Class), got {self.path}, which has its own")

    @classmethod
    def of(cls, model: str | Path | Source, weights: str | Path | None = None, pins: Mapping[str, float] | None = None) -> Source:
        """What the user's words name. A `Source` is handed back."""
        if isinstance(model, Source):
            return model
        path, colon, name = str(model).rpartition(":")
        if not colon or not path.endswith(".py"):
            path, name = str(model), ""
        name = name or (_DEFAULT if path.endswith(".py") else "")
        return cls(path=path, name=name, weights=None if weights is None else str(weights), pins=dict(pins or {}))

    @property
    def is_script(self) -> bool:
        """Whether the path is a Python file, which is the user's own code and is run."""
        return self.path.endswith(".py")

    @property
    def stem(self) -> str:
        """A short name for folders."""
        return self.name or Path(self.path).resolve().stem

    def __str__(self) -> str:
        return f"{self.path}:{self.name}" if self.name else self.path

    def to_json(self) -> dict[str, Any]:
        """Its fields, for a child process; `Source(**json)` is the way back."""
        return asdict(self)

    def digest(self) -> str:
        """SHA-256 over the files: equal files and words have equal digests. Raises UsageError, StorageError."""
        found = [digest_path(p) for p in self.files()]
        return found[0] if len(found) == 1 and not self.name and not self.pins else fingerprint([*found, self.name, dict(self.pins)])

    def files(self) -> Iterator[Path]:
        """The files and folders that it names, with what lies beside them and belongs to them."""
        path = Path(self.path)
        yield path
        if path.suffix == ".onnx" and path.is_file():  # weights outside, as exporters name them: m.onnx.data, m.onnx_data
            yield from sorted(p for p in path.parent.glob(f"{glob.escape(path.name)}?*") if p.is_file())
        if self.is_script:
            yield from _local_imports(path, {path})
        if self.weights is not None:
            weights = Path(self.weights)
            yield weights
            if weights.name.endswith(".index.json"):
                yield from sorted(weights.parent.glob("*.safetensors"))


def _local_imports(script: Path, known: set[Path]) -> Iterator[Path]:
    """The Python files beside a script that it imports, and what they import."""
    try:
        tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # whoever runs it says so
    inside = [script.parent.joinpath(*name.split(".")) for node in ast.walk(tree) for name in _imported(node)]
    beside = [file for place in inside for file in (place.with_name(f"{place.name}.py"), place / "__init__.py")]
    for file in beside:
        if file not in known and file.is_file():
            known.add(file)
            yield file
            yield from _local_imports(file, known)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module] if node.module else [a.name for a in node.names]
    return [a.name for a in node.names] if isinstance(node, ast.Import) else []


def digest_path(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names, sizes and times of what is in it. Raises UsageError, StorageError."""
    if not path.exists():
        raise UsageError(f"no such file: {path}")
    if path.is_dir():
        entries = sorted(p for p in path.rglob("*") if p.is_file())
        return fingerprint([[str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns] for p in entries])
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as why:
        raise StorageError(f"cannot read {path}: {why.strerror}") from why


def digest_module(module: Any) -> str:
    """SHA-256 of what a torch module does: its layers, their plain attributes, the code of their classes, the weights."""
    import torch

    digest = hashlib.sha256(str(module).encode())
    for name, layer in module.named_modules():
        plain = {k: v for k, v in vars(layer).items() if isinstance(v, (int, float, str, tuple, type(None))) and k != "training"}
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", f"{name}{sorted(plain.items())}{_code(type(layer))}").encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _code(kind: type) -> str:
    """What the methods of a class and its bases do, but for those of torch itself."""

    def of(code: CodeType) -> str:
        return f"{code.co_code.hex()}{code.co_names}{[constant(c) for c in code.co_consts]}"

    def constant(value: object) -> str:
        if isinstance(value, CodeType):
            return of(value)
        return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)

    own = [base for base in kind.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]
    return "".join(of(f.__code__) for base in own for _, f in sorted(vars(base).items()) if isinstance(f, FunctionType))
