"""A guarded child process: code that may crash, hang, grow or be hostile runs there, never in the parent.

The parent names a function ("hasten.load.files:summarize") with JSON values and arrays; the child imports and calls it. What
travels between them is JSON and raw numbers, never a pickle, so a child that was taken over cannot hand code to its parent.
The child dies with its parent, holds none of its files, and is killed at the deadline.

A frame is: 8 bytes length of the head, the head (JSON with the arrays' types and shapes), the arrays' bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from hasten.core.errors import ChildFailed, HastenError, named
from hasten.core.network import Arrays

_HEAD = 8
_MOST_HEAD = 1 << 26
_START_S = 60.0
_HINTS: dict[int, str] = {
    signal.SIGKILL: " (the system may have run out of memory)",
    signal.SIGXCPU: " (more processor time than it was given)",
}
_to_parent: socket.socket | None = None


@dataclass(frozen=True)
class Reply:
    """What a function in a child returns: a JSON value and arrays."""

    value: Any = None
    arrays: Arrays = ()


class Child:
    """One guarded child process, used by one thread. A context manager; leaving it kills the process.

    Args:
        memory_bytes: address space that it may take; None for no limit.
        log: file that takes what the child prints; a temporary one if None.
        environment: variables to set besides the parent's.
    """

    def __init__(self, *, memory_bytes: int | None = None, log: Path | None = None, environment: dict[str, str] | None = None) -> None:
        self._log: IO[bytes] = open(log, "ab+") if log else tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._socket, theirs = socket.socketpair()
        path = os.pathsep.join(os.path.abspath(p) if p else os.getcwd() for p in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hasten.core.child", str(theirs.fileno()), str(os.getpid()), str(memory_bytes or 0)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C in the terminal is the parent's affair
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )
        theirs.close()
        try:
            _receive(self._socket, time.monotonic() + _START_S)  # from here on it dies with this process
        except (EOFError, OSError):
            why = self._obituary()
            self.close()
            raise ChildFailed(why) from None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process number."""
        return self._process.pid

    def call(
        self,
        function: str,
        /,
        *arrays: np.ndarray[Any, Any],
        deadline_s: float | None = None,
        progress: Callable[[float, str], None] | None = None,
        **values: Any,
    ) -> Reply:
        """Calls `function` ("module:function") in the child with the arrays and the JSON values.

        Raises:
            HastenError: of the class that the function raised, if it is one of the tree.
            ChildFailed: on any other exception, on a crash, and when `deadline_s` seconds have passed (the child is killed).
        """
        end = None if deadline_s is None else time.monotonic() + deadline_s
        try:
            _send(self._socket, {"call": function, "values": values}, arrays)
            while True:
                head, given = _receive(self._socket, end)
                if "progress" not in head:
                    break
                if progress:
                    progress(*head["progress"])
        except TimeoutError:
            self.stop()
            raise ChildFailed(f"no answer within {round(deadline_s or 0, 1):g} s, stopped") from None
        except (EOFError, OSError):
            raise ChildFailed(self._obituary()) from None
        except BaseException:
            self.stop()  # Ctrl-C in the middle of an answer: the rest of it must not be read as the next
            raise
        if "error" in head:
            raise named(*head["error"])
        return Reply(head["value"], given)

    def pause(self) -> None:
        """Stops the process and what it started (SIGSTOP) until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it run on."""
        self._signal(signal.SIGCONT)

    def peak_memory_bytes(self) -> int:
        """Its resident set at the highest so far; 0 where the system does not tell."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return 0

    def stop(self) -> None:
        """Kills it and what it started. May be called from any thread: a call under way there raises ChildFailed."""
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """Kills it and gives back what it held."""
        self.stop()
        self._process.wait()
        self._socket.close()
        self._log.close()

    def _signal(self, number: int) -> None:
        """To its whole session, which is its own: a compiler that it started must not go on either."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _obituary(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.stop()
            code = self._process.wait()
        self._log.seek(0)
        lines = [line for line in self._log.read()[-4000:].decode(errors="replace").splitlines() if line.strip()]
        cause = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        hint = _HINTS.get(-code, "")
        return f"the process {cause}{hint}" + (f": {lines[-1][:300]}" if lines else "")


def report_progress(share: float, words: str) -> None:
    """In a child: tells the parent how far the call is, in [0, 1]. Elsewhere: nothing."""
    if _to_parent is not None:
        _send(_to_parent, {"progress": [share, words]}, ())


@contextlib.contextmanager
def room(more_bytes: int, more_s: float) -> Iterator[None]:
    """Inside, this process may take so much more memory and processor time than it has taken until now.

    What asks for more memory fails as on a full machine; with more time the process dies of SIGXCPU, so this is for children.
    Memory counts when it is asked for and may be written, whether or not it is. Only Linux counts it so; elsewhere there is no limit.

    Args:
        more_bytes, more_s: > 0.
    """
    import resource

    limits = {resource.RLIMIT_CPU: math.ceil(sum(os.times()[:2]) + more_s)}
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        taken = next(int(line.split()[1]) for line in lines if line.startswith("VmData:"))
        limits[resource.RLIMIT_DATA] = taken * 1024 + more_bytes
    before = {which: resource.getrlimit(which) for which in limits}
    for which, limit in limits.items():
        hard = before[which][1]
        resource.setrlimit(which, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        for which, old in before.items():
            resource.setrlimit(which, old)


def _send(to: socket.socket, head: dict[str, Any], arrays: Arrays) -> None:
    plain = [np.ascontiguousarray(a).reshape(a.shape) for a in arrays]
    if any(a.dtype.hasobject for a in plain):
        raise TypeError("arrays of objects cannot travel between processes")
    text = json.dumps({**head, "arrays": [[a.dtype.str, a.shape] for a in plain]}).encode()
    to.sendall(len(text).to_bytes(_HEAD, "big") + text)
    for array in plain:
        to.sendall(array.data.cast("B") if array.size else b"")


def _receive(source: socket.socket, end: float | None) -> tuple[dict[str, Any], Arrays]:
    length = int.from_bytes(_exactly(source, _HEAD, end), "big")
    if length > _MOST_HEAD:
        raise EOFError("a frame that no child of ours writes")
    head: dict[str, Any] = json.loads(_exactly(source, length, end))
    arrays = tuple(_array(source, np.dtype(kind), tuple(shape), end) for kind, shape in head["arrays"])
    return head, arrays


def _array(source: socket.socket, kind: np.dtype[Any], shape: tuple[int, ...], end: float | None) -> np.ndarray[Any, Any]:
    array = np.empty(shape, kind)
    if array.size:
        _fill(source, array.data.cast("B"), end)
    return array


def _exactly(source: socket.socket, length: int, end: float | None) -> bytes:
    data = bytearray(length)
    _fill(source, memoryview(data), end)
    return bytes(data)


def _fill(source: socket.socket, into: memoryview, end: float | None) -> None:
    while into:
        if end is not None:
            ready, _, _ = select.select([source], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError
        got = source.recv_into(into)
        if not got:
            raise EOFError
        into = into[got:]


def _die_with(parent: int) -> None:
    """Asks the system to kill this process when its parent ends; a thread looks after it where there is no such call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _limit_memory(limit: int) -> None:
    with contextlib.suppress(OSError):  # should the machine run out of memory, it takes this process and not its parent
        Path("/proc/self/oom_score_adj").write_text("500")
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with contextlib.suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(head: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
    try:
        module, _, function = head["call"].partition(":")
        result = getattr(importlib.import_module(module), function)(*arrays, **head["values"])
    except HastenError as why:
        return {"error": [type(why).__name__, str(why)]}, ()
    except Exception as why:
        import traceback

        traceback.print_exc()
        lines = str(why).strip().splitlines()
        return {"error": [type(why).__name__, lines[0][:500] if lines else "no message"]}, ()
    reply = result if isinstance(result, Reply) else Reply(result)
    return {"value": reply.value}, reply.arrays


def _main(channel: int, parent: int, memory_bytes: int) -> None:
    global _to_parent
    _die_with(parent)
    _limit_memory(memory_bytes)
    _to_parent = socket.socket(fileno=channel)
    _send(_to_parent, {"ready": True}, ())
    while True:
        try:
            head, arrays = _receive(_to_parent, None)
        except (EOFError, OSError):
            return
        _send(_to_parent, *_answer(head, arrays))


if __name__ == "__main__":
    # `-m` runs this file as __main__; the functions that it calls import it under its own name, so that one is set up.
    importlib.import_module("hasten.core.child")._main(*map(int, sys.argv[1:4]))
