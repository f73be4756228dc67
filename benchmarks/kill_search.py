"""What is lost when a search is killed or its disk fills up: nothing, it should say.

A 12-trial search on made-up parts (tests/madeup.py; the store, the folders, the cache and the search are the real ones) is killed with
SIGKILL at 200 random moments, and once at every call that writes to its folder, and goes on each time. Then its disk fills up at 100
bytes. In the end it must have the trials, the choices, the files and the scores of the search that nothing disturbed, byte for byte.

    python benchmarks/kill_search.py [--quick] [--json] [--save]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).parents[1]
FULL, QUICK = {"kills": 200, "writes": -1, "fill": 100}, {"kills": 10, "writes": 10, "fill": 5}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Kills searches and fills their disk; counts what differs in the end."""
    asked = QUICK if options.quick else FULL
    words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    paths = os.pathsep.join([str(ROOT / "tests"), *(p for p in sys.path if p)])
    command = [sys.executable, str(ROOT / "tests" / "killing.py"), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "PYTHONPATH": paths})
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def show(found: dict[str, Any]) -> None:
    """The counts, and what was wrong."""
    print(f"one search: {found['trials']} trials, {found['writes']} writing calls, {found['bytes']:,} bytes, {found['search_s']} s")
    print(f"killed at random: {found['kills']} times in {found['searches_killed']} searches; at a write: {found['write_kills']} times")
    print(f"disk full: {found['disk_full']} times; ended trials looked for afterwards: {found['ended_trials_checked']}")
    print("\n".join(found["wrong"]) or "nothing was lost, doubled, left running or came out otherwise")


if __name__ == "__main__":
    machine.run("kill_search", measure, show)
