"""Nothing is lost: searches that are killed at random, at their writes, and whose disk fills up. benchmarks/ has the large numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import faults
import killing

pytestmark = pytest.mark.skipif(faults.missing() is not None, reason=str(faults.missing()))


@pytest.mark.long(share=1)
def test_kills_and_full_disks_lose_nothing() -> None:
    paths = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, killing.__file__, "--kills", "3", "--writes", "4", "--fill", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths})
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert (found["kills"], found["write_kills"], found["disk_full"]) == (3, 4, 3)
    assert found["trials"] >= 12
    assert found["writes"] > 500
    assert found["bytes"] > 100_000
