"""Opens every hostile file of the corpus (tests/hostile) and thousands of spoilt ones of each format in guarded children.

    python benchmarks/hostile.py [--quick] [--count 5000] [--only pt2] [--json] [--save]

Each file must be refused in one printable line, or loaded, within 10 s of wall time (of a machine without other work) and 1 GiB
of memory; the child may die of it, this process not; no code of a file may run. Whatever else happens is listed by name.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hasten.core.child import Child
from hasten.core.errors import ChildFailed
from hostile import CASES
from hostile.cases import MARK
from hostile.mutations import SEEDS

SECONDS, BYTES = 10.0, 2**30
DEADLINE_S = 120.0
AT_ONCE = 200  # mutants to a child
QUICK = 20
Found = dict[str, Any]


def corpus(work: Path) -> Iterator[Found]:
    """Each case of the corpus in turn; a child lives until a case kills it."""
    child: Child | None = None
    for case in CASES:
        child = child or _child()
        place = Path(tempfile.mkdtemp(dir=work))
        start = time.monotonic()
        try:
            found = child.call("hostile.doors:bring_case", name=case.name, folder=str(place), deadline_s=DEADLINE_S).value
        except ChildFailed as why:
            found = {"kind": "died", "said": str(why), "seconds": time.monotonic() - start, "bytes": 0}
            child.close()
            child = None
        shutil.rmtree(place, ignore_errors=True)
        yield {"name": case.name, "door": case.door, **found}
    if child:
        child.close()


def mutants(kind: str, count: int, work: Path) -> list[Found]:
    """The first `count` mutants of a format."""
    found: list[Found] = []
    place, number = Path(tempfile.mkdtemp(dir=work)), 0
    while number < count:
        with _child() as child:
            at = [number]
            start = time.monotonic()

            def look(now: float, _: str, at: list[int] = at) -> None:
                at[0] = int(now)

            several = min(AT_ONCE, count - number)
            here = {"kind": kind, "first": number, "count": several, "folder": str(place)}
            try:
                found += child.call("hostile.doors:bring_mutants", **here, deadline_s=DEADLINE_S + several, progress=look).value
                number += several
            except ChildFailed as why:
                taken = time.monotonic() - start
                found.append({"number": at[0], "kind": "died", "said": str(why), "seconds": taken, "bytes": 0})
                number = at[0] + 1
    return [{"name": f"{kind} {f['number']}", "door": SEEDS[kind].door, **f} for f in found]


def _child() -> Child:
    return Child(memory_bytes=12 << 30, environment={MARK: os.environ[MARK], "PYTHONPATH": os.pathsep.join(sys.path)})


def told(found: list[Found]) -> Found:
    """Counts by outcome, the worst time and memory, and what broke a promise."""
    kinds = collections.Counter(f["kind"] for f in found)
    bad = [
        {key: f[key] for key in ("name", "kind", "said", "seconds", "bytes")}
        for f in found
        if f["kind"] == "raised" or f["seconds"] > SECONDS or f["bytes"] > BYTES or not f["said"].isprintable()
    ]
    slow, large = max(found, key=lambda f: f["seconds"]), max(found, key=lambda f: f["bytes"])
    return {
        "files": len(found),
        "outcomes": dict(kinds.most_common()),
        "worst_seconds": [round(slow["seconds"], 2), slow["name"]],
        "worst_bytes": [large["bytes"], large["name"]],
        "broken": bad,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The corpus, and the mutants of each format."""
    count = QUICK if options.quick else options.count
    kinds = [k for k in SEEDS if options.only in (None, k)]
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        work = Path(name)
        os.environ[MARK] = str(work / "ran")
        rows = {} if options.only or options.quick else {"corpus": told(list(corpus(work)))}
        with ThreadPoolExecutor(max_workers=2) as pool:
            for kind, found in zip(kinds, pool.map(lambda k: mutants(k, count, work), kinds), strict=True):
                rows[kind] = told(found)
        return {"limits": {"seconds": SECONDS, "bytes": BYTES}, "rows": rows, "code_ran": (work / "ran").exists()}


def show(found: dict[str, Any]) -> None:
    """Prints the table."""
    for name, row in found["rows"].items():
        outcomes = ", ".join(f"{kind} {count}" for kind, count in row["outcomes"].items())
        seconds, slow = row["worst_seconds"]
        size, large = row["worst_bytes"]
        print(f"{name:12} {row['files']:6} files: {outcomes}; worst {seconds} s ({slow}), {size / 2**20:.0f} MiB ({large})")
        for bad in row["broken"]:
            print(f"    {bad['name']}: {bad['kind']} after {bad['seconds']:.1f} s, {bad['bytes'] / 2**20:.0f} MiB: {bad['said'][:200]!r}")
    print("code ran" if found["code_ran"] else "no code ran")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=5000, help="mutants of each format")
    parser.add_argument("--only", choices=sorted(SEEDS), help="one format's mutants alone")


if __name__ == "__main__":
    machine.run("hostile", measure, show, options)
