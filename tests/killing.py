"""Kills made-up searches, fills their disk, and says what was lost.

    python tests/killing.py --kills 10 --writes 10 --fill 5

prints JSON. benchmarks/kill_search.py runs it with large numbers, tests/test_kill_search.py with small ones. Each search is a fork of
this process, so that it begins at once; the process itself is started again with the library of `faults.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import faults
import madeup
from hasten import verbs
from hasten.core import folder
from hasten.core.errors import HastenError
from hasten.core.store import Store

NO_SPACE = 74


class Campaign:
    """Searches in folders below `place`, all of which must end like the first, which nothing disturbed.

    `wrong` says what did not; `seen` counts the ended trials that were looked for after an interruption.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.faults = faults.Faults()
        self.count = 0
        self.wrong: list[str] = []
        self.seen = 0
        self.shown: set[str] = set()
        assert _searched(self.folder()) == 0  # in this process: its forks need not import what is imported late
        whole = self.folder()
        start = time.monotonic()
        assert self.search(whole, faults.COUNT) == 0
        self.seconds = time.monotonic() - start
        self.calls, self.bytes = self.faults.calls, self.faults.bytes
        self.expected = madeup.remembered(whole / "run")

    def folder(self) -> Path:
        """A place with a prepared run folder, `run`, and a ledger of openings of its own."""
        self.count += 1
        place = self.place / str(self.count)
        madeup.prepare(place / "run")
        return place

    def search(self, place: Path, mode: int, at: int = 0, *, kill_after: float | None = None) -> int:
        """Runs the search in a fork until it ends or its fault comes; the exit code, or minus the signal."""
        self.faults.arm(place, mode, at)
        child = os.fork()
        if child == 0:
            os._exit(_searched(place))
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self.faults.disarm()
        return code

    def check(self, place: Path, before: dict[int, Any], what: str, *, line: str = "") -> dict[int, Any]:
        """The ended trials after an interruption; those of before must be there as they were.

        So must a whole artifact, if there was one at an earlier moment of the same `line` of searches (of this place, if not named).
        """
        now = ended(place / "run")
        self.seen += len(now)
        line, whole = line or str(place), folder.intact(place / "run" / "artifact")
        if line in self.shown and not whole:
            self.wrong.append(f"{what}: the artifact is gone")
        self.shown |= {line} if whole else set()
        self.wrong += [f"{what}: trial {n} was lost or changed" for n, trial in before.items() if now.get(n) != trial]
        return now

    def finish(self, place: Path, before: dict[int, Any], what: str) -> None:
        """Goes on to the end undisturbed, and compares."""
        code = self.search(place, faults.COUNT)
        if code != 0:
            self.wrong.append(f"{what}: going on ended with code {code}")
            return
        self.check(place, before, what)
        found = madeup.remembered(place / "run")
        if any(t["state"] == "running" for t in found["trials"]):
            self.wrong.append(f"{what}: a trial was left running")
        self.wrong += [f"{what}: other {part}" for part in self.expected if found[part] != self.expected[part]]
        if left := [str(p.relative_to(place)) for p in place.rglob("*.part")]:
            self.wrong.append(f"{what}: left {left}")
        shutil.rmtree(place)
        print(what, "; ".join(self.wrong) or "nothing wrong so far", file=sys.stderr)

    def kill_at_random(self, kills: int, seed: int) -> int:
        """Kills searches at random moments until `kills` have hit; how many searches it took."""
        rng, hits, searches = random.Random(seed), 0, 0
        while hits < kills:
            searches += 1
            place, before, code = self.folder(), {}, -1
            while hits < kills and code != 0:
                code = self.search(place, faults.COUNT, kill_after=rng.uniform(0, self.seconds))
                hits += code == -signal.SIGKILL
                before = self.check(place, before, f"kill {hits}")
            self.finish(place, before, f"killed at random, search {searches}")
        return searches

    def kill_at_writes(self, times: int) -> int:
        """Kills one search each at so many of its writes, spread evenly; at all of them if `times` is negative. How many."""
        spots = sorted({part * self.calls // times for part in range(times)}) if times >= 0 else range(self.calls)
        for at in spots:
            place = self.folder()
            code = self.search(place, faults.KILL, at)
            if code != -signal.SIGKILL:
                self.wrong.append(f"write {at}: ended with code {code} before it came")
            self.finish(place, self.check(place, {}, f"write {at}", line="writes"), f"killed at write {at}")
        return len(spots)

    def fill(self, times: int, seed: int) -> int:
        """Fills the disk of one search at each of so many bytes, spread evenly with a random offset; how many."""
        rng = random.Random(seed)
        for part in range(times):
            at = int((part + rng.random()) * self.bytes / times)
            place = self.folder()
            code = self.search(place, faults.FULL, at)
            written = (place / "run" / "report.html").exists()  # behind it comes what SQLite tidies up, and can leave
            if code != NO_SPACE and not (code == 0 and written):
                self.wrong.append(f"disk full at byte {at}: ended with code {code}")
            self.finish(place, self.check(place, {}, f"byte {at}", line="bytes"), f"disk full at byte {at}")
        return times


def ended(run: Path) -> dict[int, Any]:
    """The trials of a run that are not running, by number."""
    if not (run / verbs.STORE).exists():
        return {}
    store = Store(run / verbs.STORE)
    try:
        return {t.number: t.to_json() for t in store.trials() if t.state != "running"}
    finally:
        store.close()


def _searched(place: Path) -> int:
    os.environ["XDG_STATE_HOME"] = str(place / "state")
    try:
        madeup.search(place / "run")
    except HastenError as why:
        return why.exit_code
    except BaseException:
        traceback.print_exc()
        return 99
    return 0


def main() -> None:
    """Runs the campaign that the words ask for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=0, help="at random moments")
    parser.add_argument("--writes", type=int, default=0, help="kills at so many writes; -1 for every one")
    parser.add_argument("--fill", type=int, default=0, help="bytes at which the disk is full")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**faults.environment(), "OMP_NUM_THREADS": "1"})
    fast = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=fast if fast.is_dir() else None) as name:
        campaign = Campaign(Path(name))
        found: dict[str, Any] = {"writes": campaign.calls, "bytes": campaign.bytes, "search_s": round(campaign.seconds, 2)}
        found["trials"] = len(campaign.expected["trials"])
        found["searches_killed"] = campaign.kill_at_random(asked.kills, asked.seed)
        found |= {"kills": asked.kills, "write_kills": campaign.kill_at_writes(asked.writes)}
        found |= {"disk_full": campaign.fill(asked.fill, asked.seed), "ended_trials_checked": campaign.seen, "wrong": campaign.wrong}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
