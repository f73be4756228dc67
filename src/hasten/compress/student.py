"""Another network in the place of this one: the user's own student."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage
from hasten.load.files import open_network
from hasten.load.lower import forward


@dataclass(frozen=True, kw_only=True)
class UseStudent:
    """Puts the network in a `.pt2` file in the place of the given one, to be taught by `Distil` behind it.

    The student takes the same inputs and gives outputs of the same shapes; inside it is what it likes. Its layers keep their
    names, so that `Distil` finds those that it shares with the original. `UseStudent.of(path)` fills in the digest.

    Args:
        path: of the file; a relative one counts from the working directory.
        sha256: of its bytes, in hexadecimal, so that the recipe makes the same network wherever it is applied.

    Raises:
        UsageError: on a path that names no `.pt2` file, and on a digest that is none.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = False

    path: str
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path.endswith(".pt2"):
            raise UsageError(f"path must be the name of a .pt2 file, got {self.path!r}; write one with torch.export.save")
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise UsageError(f"sha256 must be 64 hexadecimal digits in lower case, got {self.sha256!r}; UseStudent.of(path) finds them")

    @classmethod
    def of(cls, path: str | Path) -> UseStudent:
        """The step for a file as it is now. Raises UsageError where there is none."""
        return cls(path=str(path), sha256=_digest(Path(path)))

    def apply(self, network: Network, context: Context) -> Network:
        """The student, on the example of the given network.

        Raises:
            UsageError: where the file is gone or has other bytes.
            ModelRefused: where it holds no network that can be opened.
            Unsupported: where the student takes other inputs or another batch size, or gives outputs of other shapes.
        """
        del context
        if (found := _digest(Path(self.path))) != self.sha256:
            raise UsageError(f"{self.path} must be the file of the recipe, SHA-256 {self.sha256[:12]}…, got {found[:12]}…")
        try:
            student = open_network(self.path, network.example)
        except DataRefused as why:
            raise Unsupported(f"the student in {self.path} must take the inputs of the network: {why}") from why
        if student.fixed_batch != network.fixed_batch:
            sizes = [f"batches of {n.fixed_batch}" if n.fixed_batch else "any batch" for n in (network, student)]
            raise Unsupported(f"the student must take {sizes[0]} as the network does, it takes {sizes[1]}")
        ours, theirs = ([(o.shape[1:], o.dtype.kind) for o in forward(n, network.example)] for n in (network, student))
        if ours != theirs:
            shapes = [", ".join(str(shape) for shape, _ in outputs) for outputs in (ours, theirs)]
            raise Unsupported(f"the student must give outputs of the network's shapes {shapes[0]} per example, gives {shapes[1]}")
        return student

    @classmethod
    def space(cls, network: Network) -> Space:
        """Nothing: which student, only the user can say. Raises Unsupported for the search, which has no file."""
        del network
        raise Unsupported("UseStudent needs the path of a student, which no search can guess; put it into a recipe")


def _digest(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as why:
        raise UsageError(f"cannot read {path}: {why.strerror}") from why
