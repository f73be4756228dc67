"""What a hostile file is to the tests: how it is made, which door it is brought to, and what is said of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Make = Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One hostile file.

    Args:
        name: unique. `door`: "model", "data", "recipe", or the guard that reads it where no door takes the format.
        file: its name in a folder of its own.
        make: writes it: given its path, it writes there or gives the bytes.
        words: a pattern of the refusal; "" where it may be loaded as well.
        reading: whether it is refused by reading alone, in milliseconds.
    """

    name: str
    door: str
    file: str
    make: Make
    words: str
    reading: bool

    def write(self, folder: Path) -> Path:
        """Makes the file in a new folder; the way to it."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file
        made = self.make(path)
        if isinstance(made, bytes):
            path.write_bytes(made)
        return path


CASES: list[Case] = []


def add(name: str, file: str, make: Make, words: str, *, door: str = "model", reading: bool = True) -> None:
    """Enters one case."""
    assert not any(c.name == name for c in CASES), f"two cases called {name}"
    CASES.append(Case(name=name, door=door, file=file, make=make, words=words, reading=reading))


def add_all(kind: str, file: str, rows: Mapping[str, tuple[Make, str]], *, door: str = "model", reading: bool = True) -> None:
    """Enters a table of them."""
    for name, (make, words) in rows.items():
        add(f"{kind}: {name}", file, make, words, door=door, reading=reading)


MARK = "HASTEN_TRAP"


class Trap:
    """Unpickling it makes the folder that the environment names."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ.get(MARK, "/tmp/hasten-trap"),)
