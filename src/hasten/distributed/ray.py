"""Guarded children on the nodes of a Ray cluster.

On each node an actor holds a guarded child and passes calls on, so that what crashes, hangs or grows there is contained as it is here,
and only the loss of the machine itself is a loss of the worker. Ray pickles what it carries: a cluster is trusted like this machine.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from hasten.core.child import Child, Reply
from hasten.core.errors import BackendMissing, ChildFailed, HastenError, UsageError, WorkerLost, named

_ANSWER_S = 60.0  # for what should take no time at all: starting, and a call beyond its own deadline


class Cluster:
    """A connection to a running Ray cluster. A context manager.

    Args:
        address: as `ray.init` takes it: "HOST:PORT", "auto" for the one of this machine.

    Raises:
        BackendMissing: where ray is not installed.
        UsageError: if no cluster answers there.
    """

    def __init__(self, address: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise BackendMissing("--ray needs Ray: pip install 'hasten[ray]'") from None
        self._ray = ray
        self._ours = not ray.is_initialized()
        if not self._ours:
            return  # the caller's own connection
        _refuse_silence(address)
        try:
            ray.init(address=address, namespace="hasten", log_to_driver=False, logging_level="ERROR")
        except Exception as why:  # whatever a socket, gRPC or Ray itself says
            raise UsageError(f"no Ray cluster answers at {address!r}: {str(why).strip().splitlines()[-1][:200]}") from None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def nodes(self) -> list[int]:
        """Processors of each living node."""
        return [
            int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
        ]

    def divided(self, workers: int | None) -> tuple[int, int]:
        """How many workers, one on each node for None, and how many threads each of them has.

        Raises:
            UsageError: if no node has a processor.
        """
        nodes = self.nodes()
        if not nodes:
            raise UsageError("the Ray cluster must have a node with a processor, got none")
        count = workers or len(nodes)
        return count, max(min(nodes) // -(-count // len(nodes)), 1)

    def start(self, *, threads: int, memory_bytes: int | None = None) -> RemoteChild:
        """A guarded child on a node that has so many processors free, the least busy one.

        Raises:
            BackendMissing: if there is none within a minute, or if its hasten or torch is another version than ours.
        """
        return RemoteChild(self._ray, threads=threads, memory_bytes=memory_bytes)

    def close(self) -> None:
        """Ends the connection, and with it every child, unless it was there before."""
        if self._ours:
            self._ray.shutdown()


class RemoteChild:
    """A child on another node, with the calls of `hasten.core.child.Child`. Used by one thread, but for `stop`.

    Facts:
        place: a folder of its own on that node.
        near: whether it is on this machine.
    """

    def __init__(self, ray: Any, *, threads: int, memory_bytes: int | None) -> None:
        self._ray = ray
        kind = ray.remote(num_cpus=threads, max_concurrency=2, max_restarts=0, scheduling_strategy="SPREAD")(_Actor)
        self._actor = kind.remote(threads, memory_bytes)
        try:
            facts = self._get(self._actor.facts.remote(), _ANSWER_S)
        except (ChildFailed, TimeoutError) as why:
            self.close()
            raise BackendMissing(f"no worker started in the cluster: {why or 'no node has a processor free'}") from None
        self.place: str = facts["place"]
        self.near: bool = facts["host"] == socket.gethostname()
        if facts["versions"] != _versions():
            self.close()
            raise BackendMissing(f"the node {facts['host']} must have {_versions()}, got {facts['versions']}; install the same there")

    def call(
        self,
        function: str,
        /,
        *arrays: Any,
        deadline_s: float | None = None,
        progress: Callable[[float, str], None] | None = None,
        **values: Any,
    ) -> Reply:
        """As `Child.call`; arrays may be references of `ray.put`. Progress is not carried. Raises WorkerLost besides."""
        del progress
        answer = self._actor.call.remote(function, deadline_s, values, *arrays)
        try:
            head, given = self._get(answer, None if deadline_s is None else deadline_s + _ANSWER_S)
        except TimeoutError:
            self.stop()
            raise WorkerLost(f"no answer from the worker within {deadline_s:.0f} s, given up") from None
        if "error" in head:
            raise named(*head["error"])
        return Reply(head["value"], tuple(given))

    def pause(self) -> None:
        """Stops it where it is on this machine; elsewhere it disturbs nothing."""
        self._tell("pause")

    def resume(self) -> None:
        """Lets it go on."""
        self._tell("resume")

    def peak_memory_bytes(self) -> int:
        """Resident set of its process at its highest so far. Raises WorkerLost."""
        return int(self._get(self._actor.peak_memory_bytes.remote(), _ANSWER_S))

    def stop(self) -> None:
        """Kills it; a call under way raises WorkerLost."""
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor)

    def close(self) -> None:
        """Kills it and removes its folder."""
        self._tell("clear", always=True)
        self.stop()

    def _tell(self, what: str, *, always: bool = False) -> None:
        if always or self.near:
            with contextlib.suppress(ChildFailed, TimeoutError):
                self._get(getattr(self._actor, what).remote(), 5)

    def _get(self, answer: Any, timeout_s: float | None) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(answer, timeout=timeout_s)
        except errors.GetTimeoutError:
            raise TimeoutError from None
        except errors.RayError as why:
            raise WorkerLost(f"a worker of the cluster was lost: {str(why).strip().splitlines()[0][:200]}") from None


class _Actor:
    """Runs on a node."""

    def __init__(self, threads: int, memory_bytes: int | None) -> None:
        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._settings: dict[str, Any] = {"memory_bytes": memory_bytes, "environment": environment}
        self._child = Child(**self._settings)
        self._place = tempfile.mkdtemp(prefix="hasten-")

    def facts(self) -> dict[str, Any]:
        return {"place": self._place, "host": socket.gethostname(), "versions": _versions()}

    def call(self, function: str, deadline_s: float | None, values: dict[str, Any], *arrays: np.ndarray[Any, Any]) -> Any:
        try:
            reply = self._child.call(function, *arrays, deadline_s=deadline_s, **values)
        except HastenError as why:
            if isinstance(why, ChildFailed):  # it may be gone
                self._child.close()
                self._child = Child(**self._settings)
            return {"error": [type(why).__name__, str(why)]}, ()
        return {"value": reply.value}, reply.arrays

    def pause(self) -> None:
        self._child.pause()

    def resume(self) -> None:
        self._child.resume()

    def peak_memory_bytes(self) -> int:
        return self._child.peak_memory_bytes()

    def clear(self) -> None:
        import shutil

        self._child.close()
        shutil.rmtree(self._place, ignore_errors=True)


def _refuse_silence(address: str) -> None:
    """Raises UsageError where nobody listens: Ray itself would try for a quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as why:
        raise UsageError(f"no Ray cluster answers at {address!r}: {why.strerror or why}") from None


def _versions() -> dict[str, str]:
    """What must be equal on all machines: other versions make other numbers."""
    from importlib.metadata import version

    return {name: version(name) for name in ("hasten", "torch", "numpy")}
