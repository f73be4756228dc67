"""The guarded child: what crashes, hangs or grows there costs an error here and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hasten.core.child import Child, Reply, report_progress
from hasten.core.errors import ChildFailed, Unsupported
from hasten.core.runner import Runner


def double(*arrays: np.ndarray, add: float = 0.0) -> Reply:
    return Reply({"add": add}, tuple(a * 2 + add for a in arrays))


def refuse() -> None:
    raise Unsupported("no such layer")


def stumble() -> None:
    raise KeyError("w")


def hang() -> None:
    time.sleep(60)


def grow() -> int:
    return len(bytearray(3 << 30))


def die() -> None:
    os.abort()


def chatter() -> str:
    print("text on standard output must not reach the parent's protocol")
    for i in range(3):
        report_progress(i / 3, f"part {i}")
    return "done"


def test_arrays_and_values_travel_unchanged() -> None:
    given = [np.arange(6, dtype=np.int64).reshape(2, 3), np.zeros((0, 4), np.float32), np.array(1.5), np.ones(3, np.bool_)]
    with Child() as child:
        reply = child.call("test_child:double", *given, add=1.0)
    assert reply.value == {"add": 1.0}
    for sent, got in zip(given, reply.arrays, strict=True):
        assert got.shape == sent.shape
        np.testing.assert_array_equal(got, sent * 2 + 1.0)


def test_errors_come_back_as_what_they_are() -> None:
    with Child() as child:
        with pytest.raises(Unsupported, match="no such layer"):
            child.call("test_child:refuse")
        with pytest.raises(ChildFailed, match="KeyError: 'w'"):
            child.call("test_child:stumble")
        assert child.call("test_child:chatter").value == "done"  # still alive


def test_progress_reaches_the_parent() -> None:
    heard: list[tuple[float, str]] = []
    with Child() as child:
        child.call("test_child:chatter", progress=lambda share, words: heard.append((share, words)))
    assert heard == [(0.0, "part 0"), (1 / 3, "part 1"), (2 / 3, "part 2")]


def test_a_hang_ends_at_the_deadline() -> None:
    start = time.monotonic()
    with Child() as child, pytest.raises(ChildFailed, match="no answer within 1 s"):
        child.call("test_child:hang", deadline_s=1)
    assert time.monotonic() - start < 30


def test_a_crash_names_its_signal() -> None:
    with Child() as child, pytest.raises(ChildFailed, match="SIGABRT"):
        child.call("test_child:die")


def test_memory_is_limited() -> None:
    with Child(memory_bytes=2 << 30) as child, pytest.raises(ChildFailed, match="MemoryError"):
        child.call("test_child:grow")
    with Child() as child:
        assert child.call("test_child:grow").value == 3 << 30


def test_objects_do_not_travel() -> None:
    with Child() as child, pytest.raises(TypeError, match="arrays of objects"):
        child.call("test_child:double", np.array([object()]))


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from hasten.core.child import Child\n"
        "child = Child()\n"
        "child.pause()\n"  # even a stopped one
        "open(sys.argv[1], 'w').write(str(child.pid))\n"
        "child.call('test_child:hang')\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(note), str(Path(__file__).parent)])
    while not (note.exists() and note.read_text()):
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    pid = int(note.read_text())
    deadline = time.monotonic() + 120
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_runner_gives_outputs_in_batches_and_times_them(packed: Path) -> None:
    x = np.arange(20, dtype=np.float32).reshape(10, 2)
    with Runner(packed) as runner:
        np.testing.assert_array_equal(runner.outputs((x,), batch=4)[0], x * 2)
        times = runner.time((x,), calls=5)
        assert times.shape == (5,)
        assert (times > 0).all()
        assert runner.peak_memory_bytes() > 1 << 20
        runner.pause()
        runner.resume()
        np.testing.assert_array_equal(runner(x)[0], x * 2)


def test_runner_pads_to_a_fixed_batch(packed: Path) -> None:
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    with Runner(packed, fixed_batch=3) as runner:
        np.testing.assert_array_equal(runner(x)[0], x * 2)


@pytest.mark.parametrize(("batch", "message"), [(7, "no answer within 1 s"), (13, "SIGABRT"), (17, "seventeen")])
def test_runner_tells_what_went_wrong(packed: Path, batch: int, message: str) -> None:
    with Runner(packed, deadline_s=1) as runner, pytest.raises(ChildFailed, match=message):
        runner(np.zeros((batch, 1)))


def test_runner_answers_nothing_when_its_time_is_over(packed: Path) -> None:
    x = np.zeros((2, 1))
    with Runner(packed, ends=time.monotonic() + 600) as runner:
        runner(x)
        runner._ends = time.monotonic()
        with pytest.raises(ChildFailed, match="the time that there was for it is over"):
            runner.outputs((x,))


def test_runner_saves_what_it_runs(packed: Path, tmp_path: Path) -> None:
    with Runner(packed) as runner:
        runner.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "load.py").read_bytes() == (packed / "load.py").read_bytes()
