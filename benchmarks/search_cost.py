"""What a search costs: the wall time of `quick` on a CNN of 100,000 parameters, stage by stage, and hasten's own share of it.

    python benchmarks/search_cost.py [--quick] [--json] [--save] [--effort EFFORT] [--time-limit WORDS]

Stages are those that the run itself tells. hasten's own share is the processor time of the parent process, which proposes, compares, writes
down and reports, over the wall time; training, packing, scoring and timing happen in other processes. The profile lists the parent's
dearest functions. With a time limit, what was taken beyond it is shown. `--quick` takes an eighth of an epoch of training for the network.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import reference_networks

import hasten
from hasten import presets
from hasten.search.clock import parse_duration
from hasten.search.watch import Event


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One run under the profiler."""
    wanted = reference_networks.REFERENCES[0]
    if options.quick:
        wanted = replace(wanted, settings=replace(wanted.settings, epochs=1 / 8))
    module, data, _ = reference_networks.reference(wanted)
    marks: list[tuple[str, float]] = []

    def watch(event: Event) -> None:
        if not marks or marks[-1][0] != event.stage:
            marks.append((event.stage, time.monotonic()))

    asked = hasten.Options(effort=options.effort, time_limit=options.time_limit)
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as place:
        start, own = time.monotonic(), time.process_time()
        profile.enable()
        report = hasten.optimize(module, data.train, data.held_out, run=Path(place) / "run", options=asked, watcher=watch)
        profile.disable()
        wall, own = time.monotonic() - start, time.process_time() - own
    ends = [at for _, at in marks[1:]] + [start + wall]
    stages: dict[str, float] = {}
    for (name, begin), end in zip(marks, ends, strict=True):
        stages[name] = stages.get(name, 0.0) + end - begin
    limit_s = parse_duration(options.time_limit) or presets.time_limit_s(options.effort)
    return {
        "network": wanted.name,
        "parameters": sum(p.numel() for p in module.parameters()),
        "effort": options.effort,
        "verdict": report.verdict,
        "sentence": report.sentence,
        "trials": len(report.trials),
        "wall_seconds": wall,
        "limit_seconds": limit_s,
        "over_limit": wall / limit_s - 1 if limit_s else None,
        "stages": stages,
        "own_seconds": own,
        "own_share": own / wall,
        "dearest": _dearest(profile),
    }


def _dearest(profile: cProfile.Profile, most: int = 12) -> list[dict[str, Any]]:
    table = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = sorted(table.items(), key=lambda item: -item[1][2])[:most]
    return [{"function": f"{Path(file).name}:{line} {name}", "seconds": told[2], "calls": told[1]} for (file, line, name), told in rows]


def show(found: dict[str, Any]) -> None:
    """The stages, the share, the profile."""
    print(found["sentence"])
    for name, seconds in found["stages"].items():
        print(f"{name:10} {seconds:7.1f} s  {seconds / found['wall_seconds']:6.1%}")
    over = "" if found["limit_seconds"] is None else f", limit {found['limit_seconds']:.0f} s ({found['over_limit']:+.1%})"
    print(f"{found['trials']} trials in {found['wall_seconds']:.1f} s{over}; hasten's own processor time {found['own_share']:.1%}")
    print("waiting for other processes counts as time of the function that waits:")
    for row in found["dearest"]:
        print(f"{row['seconds']:8.2f} s {row['calls']:8,} × {row['function']}")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--effort", choices=("quick", "normal", "thorough"), default="quick")
    parser.add_argument("--time-limit")


if __name__ == "__main__":
    machine.run("search_cost", measure, show, _options)
