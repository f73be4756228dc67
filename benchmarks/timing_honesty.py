"""Does the timing protocol tell two networks apart exactly when they differ?

One network is timed against itself (A/A), and against itself with a planted slowdown of 10 % (A/B: after each call the process
spins for a tenth of the call's time). Each comparison is a full run of the protocol. A difference is called where the interval
of the ratio lies above 1.02 or below 1/1.02. Wanted: at most 5 of 60 A/A called different, at least 54 of 60 A/B found.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

from hasten.core.report import Interval
from hasten.engines import OnnxRuntime
from hasten.load import files, lower
from hasten.measure import timing
from hasten.tasks import networks

SLOWER = """
import runpy, time

def load(folder):
    inner = runpy.run_path(f"{folder}/inner.py")["load"](folder)
    def run(*inputs):
        start = time.perf_counter()
        outputs = inner(*inputs)
        end = time.perf_counter()
        end += (end - start) * 0.10
        while time.perf_counter() < end:
            pass
        return outputs
    return run
"""


def pack(place: Path) -> tuple[Path, Path, tuple[np.ndarray, ...]]:
    """The small CNN in ONNX Runtime on one thread, and the same with a planted slowdown."""
    torch.manual_seed(0)
    x = torch.randn(32, 1, 28, 28)
    network = files.from_module(networks.small_cnn(), (x[:4].numpy(),))
    plain, slow = place / "plain", place / "slow"
    for folder in (plain, slow):
        folder.mkdir()
        OnnxRuntime(threads=1).pack(lower.lower(network), folder)
    (slow / "load.py").rename(slow / "inner.py")
    (slow / "load.py").write_text(SLOWER)
    return plain, slow, (x.numpy(),)


def different(interval: Interval) -> bool:
    """Whether the protocol calls the two different."""
    return interval.low > 1.02 or interval.high < 1 / 1.02


def compare(core: int, count: int) -> dict[str, list[dict[str, Any]]]:
    """Runs `count` comparisons of each kind on one core."""
    os.sched_setaffinity(0, {core})
    rows: dict[str, list[dict[str, Any]]] = {"same": [], "slower": []}
    with tempfile.TemporaryDirectory() as name:
        plain, slow, inputs = pack(Path(name))
        one, other = timing.Contestant(folder=plain), timing.Contestant(folder=slow)
        for i in range(count):
            for kind, pair in (("same", [one, one]), ("slower", [other, one])):
                (interval,) = timing.race(pair, inputs, [1]).speedup(0, 1)
                rows[kind].append({**interval.to_json(), "different": different(interval), "faster": interval.faster})
            said = " ".join(f"{k} {r[-1]['value']:.3f}" for k, r in rows.items())
            print(f"core {core}: {i + 1}/{count} {said}", file=sys.stderr, flush=True)
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the comparisons at batch 1, a series on each core at the same time."""
    cores = sorted(os.sched_getaffinity(0))
    count = 2 if options.quick else 60
    shares = [count // len(cores) + (i < count % len(cores)) for i in range(len(cores))]
    with concurrent.futures.ProcessPoolExecutor(len(cores), mp_context=multiprocessing.get_context("spawn")) as pool:
        series = list(pool.map(compare, cores, shares))
    rows = {kind: [row for one in series for row in one[kind]] for kind in ("same", "slower")}
    return {
        "comparisons": count,
        "same_called_different": sum(r["different"] for r in rows["same"]),
        "slower_found": sum(r["faster"] for r in rows["slower"]),
        "same_ratio_sd": float(np.std([r["value"] for r in rows["same"]], ddof=1)),
        "slower_ratio_mean": float(np.mean([r["value"] for r in rows["slower"]])),
        "launch_pairs": {k: float(np.mean([r["launches"] for r in v])) for k, v in rows.items()},
        "rows": rows,
    }


def show(found: dict[str, Any]) -> None:
    """Prints the verdict."""
    n = found["comparisons"]
    print(f"same network called different: {found['same_called_different']} of {n} (wanted: at most {5 * n // 60})")
    print(f"planted 10 % slowdown found:   {found['slower_found']} of {n} (wanted: at least {54 * n // 60})")
    print(f"sd of the ratio of a network with itself: {found['same_ratio_sd']:.3f}")
    print(f"mean ratio with the slowdown: {found['slower_ratio_mean']:.3f}; launch pairs: {found['launch_pairs']}")


if __name__ == "__main__":
    machine.run("timing_honesty", measure, show)
