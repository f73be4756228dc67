"""Where a file may lie that another file names, and how much may come out of one."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from hasten.core.child import room
from hasten.core.errors import ModelRefused

_LEAST = 2**28
_GROWTH = 20
_LONGEST = 1024
_ROOM = 15 * 2**26  # what a process takes is counted a little differently where it is limited and where it is measured


def most_bytes(size: int) -> int:
    """What a file of `size` bytes may unpack to: 256 MiB, or 20 times its size.

    >>> most_bytes(1000) == 2**28
    True
    """
    return max(_LEAST, _GROWTH * size)


@contextlib.contextmanager
def room_for(*paths: str | Path, example_bytes: int = 0) -> Iterator[None]:
    """Inside, which must be in a guarded child, opening the files may take 1 GiB and 10 s more than honest ones of their size.

    An honest file takes up to 32 times its size while it is opened, its activations up to 64 times the example, and its
    description up to 0.3 s of processor time for each kB of it (torch.export takes 10 to 30 ms for a node of some 100 bytes).
    """
    size = sum(_size(Path(p)) for p in paths)
    with room(_ROOM + 32 * size + 64 * example_bytes, 10 + 0.3e-3 * size + 1e-6 * example_bytes):
        yield


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def check_name(name: str, what: str) -> None:
    """Refuses a relative path that could lead elsewhere on any system, or is no printable text. Raises ModelRefused.

    >>> check_name("data/0", "an entry")
    >>> check_name("../0", "an entry")
    Traceback (most recent call last):
    hasten.core.errors.ModelRefused: expected an entry to be named by a plain relative path, got '../0': not opened
    """
    place = PurePosixPath(name)
    strange = not name or len(name.encode(errors="replace")) > _LONGEST or "\\" in name or not name.isprintable()
    drive = len(name) > 1 and name[1] == ":"
    if strange or drive or place.is_absolute() or ".." in place.parts or name.startswith("~"):
        raise ModelRefused(f"expected {what} to be named by a plain relative path, got {name[:100]!r}: not opened")


def plain_file(folder: Path, name: str) -> Path:
    """The file called `name` in `folder`: a regular file with this one name, below the folder, no link on the way.

    Raises:
        ModelRefused: it is anything else, or is not there.
    """
    check_name(name, "a file that belongs to the model")
    file = folder / name
    try:
        found = file.lstat()
        inside = file.resolve() == folder.resolve() / name
    except (OSError, ValueError, RuntimeError) as why:
        raise ModelRefused(f"expected the file {name!r} beside the model, got none that can be read ({type(why).__name__})") from why
    if not inside or not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise ModelRefused(f"expected {name!r} to be a plain file of its own, got a link or no file: not opened")
    return file
