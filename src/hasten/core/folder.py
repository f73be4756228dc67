"""The run folder on disk: the lock, atomic writes, folders with a manifest. docs/format.md is its specification."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from hasten.core.errors import RunLocked, StorageError

MANIFEST = "manifest.json"
_AT_ITS_END = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_SHORT = re.compile(r"\d+ requested and \d+ written")  # what NumPy says instead of a number when a file takes no more


class Lock:
    """Holds `folder/lock` until `release` or until the process ends, however it ends.

    The lock belongs to an open file descriptor that no child inherits.

    Raises:
        RunLocked: at once, naming the holder, if another process has it.
    """

    def __init__(self, folder: Path) -> None:
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = open(folder / "lock", "a+")  # noqa: SIM115 - held for the life of the run
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise _in_use(folder) from None
        with storage(folder):
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()

    def release(self) -> None:
        """Gives it back."""
        self._file.close()


def refuse_if_held(folder: Path) -> None:
    """Raises RunLocked if a process works in `folder`; touches nothing, so it can be asked before anything is read."""
    if (folder / "lock").exists() and locked(folder):
        raise _in_use(folder)


def _in_use(folder: Path) -> RunLocked:
    holder = (folder / "lock").read_text().strip() or "another process"
    return RunLocked(f"{folder} is in use by {holder}; wait for it or choose another --run folder")


def locked(folder: Path) -> bool:
    """Whether a process holds the lock of `folder` now."""
    try:
        with open(folder / "lock", "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextlib.contextmanager
def storage(where: Path) -> Iterator[None]:
    """Turns the system's errors on reading and writing into StorageError with a plain line."""
    try:
        yield
    except OSError as why:
        told = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the quota is used up",
            errno.EACCES: "no permission",
            errno.EROFS: "the disk is read-only",
        }
        cause = told.get(_code(why), why.strerror or str(why))
        raise StorageError(f"cannot write in {where}: {cause}; what was finished before is safe there") from why


def at_its_end(why: OSError) -> bool:
    """Whether an error says that the disk takes no more, so that it is no fault of who was writing."""
    return _code(why) in _AT_ITS_END


def _code(why: OSError) -> int:
    """The system's number of an error; found in its words where NumPy and shutil give no number."""
    if why.errno is not None:
        return why.errno
    if _SHORT.search(str(why)):
        return errno.ENOSPC
    return next((code for code in _AT_ITS_END if os.strerror(code) in str(why)), 0)


def write(path: Path, data: bytes | str) -> None:
    """Writes a file whole or not at all: the old content stays until the new one has reached the disk."""
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with storage(path.parent):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it appears as `path`, with a manifest, only when the block ends well. An older one is replaced."""
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.part")
    with storage(path.parent):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        try:
            yield temporary
        except OSError as why:  # of the block; only what says that the disk is at its end is a matter of storage
            if not at_its_end(why):
                raise
            with storage(path.parent):
                raise
        with storage(path.parent):
            _seal(temporary)
            if not (path.exists() and _exchange(temporary, path)):
                shutil.rmtree(path, ignore_errors=True)
                os.replace(temporary, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(root: Path) -> None:
    """Removes what killed processes left half done below `root`; nobody may be working there."""
    for place in root.rglob(".*.part"):
        shutil.rmtree(place, ignore_errors=True)
        if place.is_file():
            place.unlink(missing_ok=True)


def intact(folder: Path) -> bool:
    """Whether the folder has a manifest and every file in it still has its recorded SHA-256."""
    try:
        recorded: dict[str, str] = json.loads((folder / MANIFEST).read_text())["sha256"]
        return all(_sha256(folder / name) == digest for name, digest in recorded.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def size_bytes(folder: Path) -> int:
    """Bytes of all files in the folder but the manifest."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one go, so that at no moment there is none; False where the system has no such call."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _seal(folder: Path) -> None:
    digests = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
        digests[str(file.relative_to(folder))] = _sha256(file)
    write(folder / MANIFEST, json.dumps({"sha256": digests}, indent=1, sort_keys=True) + "\n")


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
