"""What every benchmark shares: its options, and a result that names the machine it was measured on."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.measure import machine

RESULTS = Path(__file__).parent / "results"


def run(
    name: str,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
    more: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> None:
    """Parses --quick, --json and --save, measures, prints, and writes `results/NAME.json` if asked. No search here has the guesses of
    an earlier one."""
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--quick", action="store_true", help="at most a minute, fewer repetitions")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{name}.json")
    more(parser)
    options = parser.parse_args()
    start = time.time()
    options.keep = lambda found: _complete(name, found, options, start)
    with tempfile.TemporaryDirectory() as state:
        os.environ["XDG_STATE_HOME"] = state
        found = options.keep(measure(options))
    if options.json:
        print(json.dumps(found, indent=1))
        return
    show(found)
    where = found["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items())
    print(f"\n{where['cpu']}, {where['cores']} cores, {', '.join(where['flags'])}; {versions}; {found['seconds']:.0f} s")


def earlier(name: str, part: str) -> Any:
    """The part of the saved result, if it was measured in full, on this machine and with these versions; else an empty list."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return []
    saved, ours = json.loads(file.read_text()), machine.environment()
    same = all(saved["environment"][k] == ours[k] for k in ("cpu", "cores", "versions"))
    return saved[part] if same and not saved["quick"] else []


def _complete(name: str, found: dict[str, Any], options: argparse.Namespace, start: float) -> dict[str, Any]:
    """Adds where and when it was measured, and writes the file; a long benchmark calls this after each part as well."""
    whole = {
        **found,
        "quick": options.quick,
        "seconds": round(time.time() - start, 1),
        "environment": machine.environment(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    return whole
