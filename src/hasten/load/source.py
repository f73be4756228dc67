"""Where a network lies: a path, and for a Python file the name in it and the weights. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hasten.core.errors import StorageError, UsageError
from hasten.core.network import Arrays
from hasten.core.recipe import fingerprint
from hasten.load.guards.places import room_for

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

    def room(self, example: Arrays) -> AbstractContextManager[None]:
        """What opening it may take, in a guarded child: see `room_for`. The user's own code may take what the child may."""
        return nullcontext() if self.is_script else room_for(*self._files(), example_bytes=sum(a.nbytes for a in example))

    def digest(self) -> str:
        """SHA-256 over the files: equal files and words have equal digests. Raises UsageError, StorageError."""
        found = [digest_path(p) for p in self._files()]
        return found[0] if len(found) == 1 and not self.name and not self.pins else fingerprint([*found, self.name, dict(self.pins)])

    def _files(self) -> Iterator[Path]:
        yield Path(self.path)
        if self.weights is not None:
            weights = Path(self.weights)
            yield weights
            if weights.name.endswith(".index.json"):
                yield from sorted(weights.parent.glob("*.safetensors"))


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
