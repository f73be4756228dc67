"""A Ray cluster of several nodes on this machine, each in a network namespace of its own where that is permitted.

with cluster(2) as nodes: nodes.address; nodes.lose(0)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_NET, _PORT = "10.77.0", 6399
_PATIENCE = {  # a busy machine takes its time over Ray's many processes
    "RAY_agent_register_timeout_ms": "900000",
    "RAY_raylet_start_wait_time_s": "900",
    "RAY_health_check_timeout_ms": "60000",
}
_RAY = Path(sys.executable).with_name("ray")


@dataclass
class Nodes:
    """The running cluster: nothing runs on its head, and one worker fits on each of the other nodes."""

    address: str
    apart: bool  # whether each node has a network namespace of its own
    groups: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def lose(self, at: int) -> None:
        """Kills everything on a node, as a power cut would."""
        _end([self.groups[at]])


def namespaces() -> bool:
    """Whether network namespaces can be made here."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        return False
    made = subprocess.run(["ip", "netns", "add", "hasten-try"], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", "hasten-try"], check=False)
    return made


@contextlib.contextmanager
def cluster(count: int) -> Iterator[Nodes]:
    """Starts a head without processors and `count` nodes with one each; ends them all."""
    apart = namespaces()
    home = f"{_NET}.1" if apart else "127.0.0.1"
    nodes = Nodes(address=f"{home}:{_PORT}", apart=apart)
    with contextlib.ExitStack() as stack, _folder() as place:
        if apart:
            stack.enter_context(_bridge())
        head = ["--head", f"--port={_PORT}", "--include-dashboard=false", f"--temp-dir={place}", "--num-cpus=0", "--disable-usage-stats"]
        groups = [_start([], [*head, f"--node-ip-address={home}"])]
        stack.callback(_end, groups)
        _until_open(home)
        for at in range(count):
            before, own = (stack.enter_context(_namespace(at)), f"{_NET}.{at + 11}") if apart else ([], "127.0.0.1")
            # a folder of its own, because nodes that start at once on one machine choose the same sockets
            words = [f"--address={nodes.address}", "--num-cpus=1", f"--node-ip-address={own}", f"--temp-dir={place}/{at}"]
            groups.append(_start(before, words))
        nodes.groups = groups[1:]
        _until_joined(nodes.address, count)
        yield nodes


def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True)  # what was killed may write a last time


def _start(before: list[str], words: list[str]) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0", **_PATIENCE}
    return subprocess.Popen(
        [*before, str(_RAY), "start", "--block", "--object-store-memory=100000000", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment,
    )


def _end(groups: list[subprocess.Popen[bytes]]) -> None:
    import psutil  # Ray brings it

    for group in groups:
        with contextlib.suppress(psutil.NoSuchProcess):
            started = psutil.Process(group.pid)
            for process in (*started.children(recursive=True), started):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        group.wait()


def _until_open(home: str) -> None:
    import socket

    end = time.monotonic() + 300
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((home, _PORT), timeout=1):
            return
        time.sleep(0.5)
    raise RuntimeError("the head of the cluster did not start")


def _until_joined(address: str, count: int) -> None:
    look = f"import ray; ray.init('{address}', logging_level='ERROR'); print(sum(n['Resources'].get('CPU', 0) for n in ray.nodes()))"
    end = time.monotonic() + 900
    while time.monotonic() < end:
        found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False)
        if found.stdout and float(found.stdout.split()[-1]) >= count:
            return
        time.sleep(2)
    raise RuntimeError(f"{count} nodes did not join the cluster: {found.stderr[-500:]}")


@contextlib.contextmanager
def _bridge() -> Iterator[None]:
    _ip("link", "add", "hasten0", "type", "bridge")
    try:
        _ip("addr", "add", f"{_NET}.1/24", "dev", "hasten0")
        _ip("link", "set", "hasten0", "up")
        yield
    finally:
        subprocess.run(["ip", "link", "del", "hasten0"], check=False, capture_output=True)


@contextlib.contextmanager
def _namespace(at: int) -> Iterator[list[str]]:
    """A namespace on the bridge; gives the words that run a command in it."""
    name, outer, inner = f"hasten{at}", f"hastenv{at}", f"hastenw{at}"
    _ip("netns", "add", name)
    try:
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        _ip("link", "set", inner, "netns", name)
        _ip("link", "set", outer, "master", "hasten0")
        _ip("link", "set", outer, "up")
        _ip("-n", name, "addr", "add", f"{_NET}.{at + 11}/24", "dev", inner)
        _ip("-n", name, "link", "set", inner, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield ["ip", "netns", "exec", name]
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
