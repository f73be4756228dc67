"""Opens every hostile file of the corpus (tests/hostile) and thousands of spoilt ones of each format in guarded children.

    python benchmarks/hostile.py [--quick] [--count 5000] [--whole 5000] [--only pt2] [--json] [--save]

Each file must be refused in one printable line, or loaded, within 10 s of processor time and 1 GiB of memory; the child may die
of it (of SIGXCPU, if it does not end), this process not; no code of a file may run. Whatever else happens is listed by name.
"""

from __future__ import annotations

import argparse
import collections
import os
import shutil
import sys
import tempfile
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
DEADLINE_S = 600.0
AT_ONCE = 250  # mutants to a child, whose imports take seconds
QUICK = 20
WHOLE = ("onnx", "pt2")
Found = dict[str, Any]


def corpus(work: Path) -> Iterator[Found]:
    """Each case of the corpus in turn; a child lives until a case kills it."""
    child: Child | None = None
    for case in CASES:
        child = child or _child()
        place = Path(tempfile.mkdtemp(dir=work))
        try:
            found = child.call("hostile.doors:bring_case", name=case.name, folder=str(place), deadline_s=DEADLINE_S).value
        except ChildFailed as why:
            found = {"kind": "died", "said": str(why), "seconds": 0.0, "bytes": 0}
            child.close()
            child = None
        shutil.rmtree(place, ignore_errors=True)
        yield {"name": case.name, "door": case.door, **found}
    if child:
        child.close()


def mutants(kind: str, count: int, work: Path) -> list[Found]:
    """The first `count` mutants of a format."""
    found: list[Found] = []
    place = Path(tempfile.mkdtemp(dir=work))
    left = [(first, min(AT_ONCE, count - first)) for first in range(0, count, AT_ONCE)][::-1]
    while left:
        first, several = left.pop()
        at = [first]

        def look(now: float, _: str, at: list[int] = at) -> None:
            at[0] = int(now)

        try:
            with _child() as child:
                here = {"kind": kind, "first": first, "count": several, "folder": str(place)}
                found += child.call("hostile.doors:bring_mutants", **here, deadline_s=DEADLINE_S, progress=look).value
        except ChildFailed as why:
            found.append({"number": at[0], "kind": "died", "said": str(why), "seconds": 0.0, "bytes": 0})
            # What the child had found before went with it.
            left += [(n, m) for n, m in ((at[0] + 1, first + several - at[0] - 1), (first, at[0] - first)) if m]
    return [{"name": f"{kind} {f['number']}", "door": SEEDS[kind].door, **f} for f in found]


def _child() -> Child:
    return Child(memory_bytes=12 << 30)


def told(found: list[Found]) -> Found:
    """Counts by outcome, the worst time and memory, and what broke a promise."""
    kinds = collections.Counter(f["kind"] for f in found)
    bad = [
        {key: f[key] for key in ("name", "kind", "said", "seconds", "bytes")}
        for f in found
        if f["kind"] == "raised"
        or "no answer within" in f["said"]
        or f["seconds"] > SECONDS
        or f["bytes"] > BYTES
        or not f["said"].isprintable()
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
    counts = {k: QUICK if options.quick else options.whole if k in WHOLE else options.count for k in SEEDS}
    jobs = [k for k in (*(k for k in SEEDS if k not in WHOLE), "corpus", *WHOLE) if not options.only or k in options.only]
    jobs = [j for j in jobs if j != "corpus" or not options.quick]
    with tempfile.TemporaryDirectory(prefix="hostile-") as name, ThreadPoolExecutor(max_workers=2) as pool:
        work, rows = Path(name), dict(machine.earlier("hostile", "rows") or {}) if options.only and options.save else {}
        os.environ[MARK] = str(work / "ran")
        found: Found = {"limits": {"seconds": SECONDS, "bytes": BYTES}, "rows": rows}

        def do(job: str) -> list[Found]:
            return list(corpus(work)) if job == "corpus" else mutants(job, counts[job], work)

        for job, several in zip(jobs, pool.map(do, jobs), strict=True):
            rows[job] = told(several)
            found["code_ran"] = (work / "ran").exists()
            options.keep(found)  # what was found so far is on disk
    return found


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
    parser.add_argument("--whole", type=int, default=5000, help="mutants of the formats that are opened whole, which takes longest")
    parser.add_argument(
        "--only", action="append", choices=sorted((*SEEDS, "corpus")), help="one format, or the corpus, alone; again for more"
    )


if __name__ == "__main__":
    machine.run("hostile", measure, show, options)
