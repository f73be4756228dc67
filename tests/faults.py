"""A disk that fills up at a byte and a process that dies at a write: `faults.c`, compiled, loaded into a process and armed there."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COUNT, KILL, FULL = 0, 1, 2
_SOURCE = Path(__file__).with_name("faults.c")


def missing() -> str | None:
    """Why faults cannot be injected here; None if they can."""
    if sys.platform != "linux":
        return "needs Linux"
    return None if shutil.which("cc") else "needs a C compiler"


def library() -> Path:
    """The compiled library; made once for each version of the source."""
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    made = Path(tempfile.gettempdir()) / f"hasten-faults-{os.getuid()}-{digest}.so"
    if not made.exists():
        part = made.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(part), str(_SOURCE), "-ldl"], check=True)
        part.rename(made)
    return made


def environment() -> dict[str, str]:
    """What a process must be started with to be armed."""
    return {**os.environ, "LD_PRELOAD": str(library())}


class Faults:
    """The library in this process. Forked children share its counters, and are armed and disarmed with it."""

    def __init__(self) -> None:
        self._calls = ctypes.CDLL(None)
        for name in ("fault_calls", "fault_bytes"):
            getattr(self._calls, name).restype = ctypes.c_long

    def arm(self, root: Path, mode: int, at: int = 0) -> None:
        """From here on what writes below `root` is counted, and meets its end at call (KILL) or byte (FULL) number `at`."""
        self._calls.fault_arm(str(root).encode(), mode, ctypes.c_long(at))

    def disarm(self) -> None:
        """Nothing is counted or disturbed any more; the counters stay as they are."""
        self._calls.fault_disarm()

    @property
    def calls(self) -> int:
        """Calls that changed the disk since `arm`."""
        return int(self._calls.fault_calls())

    @property
    def bytes(self) -> int:
        """Bytes that reached it."""
        return int(self._calls.fault_bytes())
