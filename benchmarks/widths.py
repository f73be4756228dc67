"""Which widths an engine likes: the time of layers of 24 to 40 channels, in floats and int8, as `PruneStructure(multiple=…)` leaves them.

    python benchmarks/widths.py [--quick] [--json] [--save]

Each network is a first layer of the width and `LAYERS` layers from that width to itself, with ReLU between, of one kind. All widths of a
kind are timed side by side in fresh launches with one thread; a figure is the median over the launches of a call's median time, with the
lowest and the highest. Below it stands the share of the time at the next multiple of 8: near 1, a width between multiples saves nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from torch import nn

from hasten.compress import QuantizeStatic
from hasten.core.data import View
from hasten.core.network import Network
from hasten.core.recipe import Context
from hasten.engines import OnnxRuntime, OpenVINO
from hasten.load.lower import lower
from hasten.measure import timing

LAYERS = 4
WIDTHS = (24, 28, 31, 32, 33, 36, 40)
PROTOCOL = timing.Protocol(fewest=5, most=5)
ENGINES = {"ONNX Runtime": OnnxRuntime(threads=1), "OpenVINO": OpenVINO(threads=1)}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of layer: what makes one of (inputs, outputs), the shape of an input row, and the batch that it is timed at."""

    layer: Callable[[int, int], nn.Module]
    row: tuple[int, ...]
    batch: int


KINDS = {
    "convolution 3×3": Kind(layer=lambda a, b: nn.Conv2d(a, b, 3, padding=1), row=(8, 28, 28), batch=1),
    "convolution 1×1": Kind(layer=lambda a, b: nn.Conv2d(a, b, 1), row=(8, 28, 28), batch=4),
    "linear": Kind(layer=nn.Linear, row=(8,), batch=1024),
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every kind in both engines and both formats."""
    widths = (32, 36, 40) if options.quick else WIDTHS
    protocol = timing.Protocol(fewest=2, most=2, block_ms=10.0) if options.quick else PROTOCOL
    rows = []
    for name, kind in list(KINDS.items())[: 1 if options.quick else None]:
        for engine in list(ENGINES)[: 1 if options.quick else None]:
            rows += [
                {"layer": name, "engine": engine, "int8": int8, "times": _times(kind, engine, int8, widths, protocol)} for int8 in (0, 1)
            ]
    return {"widths": widths, "layers": LAYERS, "threads": 1, "rows": rows}


def _times(kind: Kind, engine: str, int8: int, widths: tuple[int, ...], protocol: timing.Protocol) -> list[dict[str, float]]:
    data = np.random.default_rng(0).normal(size=(max(kind.batch, 64), *kind.row)).astype(np.float32)
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(width) for width in widths]
        for folder, width in zip(folders, widths, strict=True):
            folder.mkdir()
            ENGINES[engine].pack(_network(kind, width, data, engine if int8 else None), folder)
        found = timing.race([timing.Contestant(folder=f) for f in folders], (data,), (kind.batch,), protocol=protocol)
    each = found.medians_ms[:, :, 0].T.tolist()  # (widths, launches)
    return [{"ms": statistics.median(ms), "lowest": min(ms), "highest": max(ms), "launches": len(ms)} for ms in each]


def _network(kind: Kind, width: int, data: np.ndarray, engine: str | None) -> Network:
    """In floats, or rounded as the engine likes it."""
    torch.manual_seed(0)
    body = [kind.layer(kind.row[0], width), nn.ReLU()]
    for _ in range(LAYERS):
        body += [kind.layer(width, width), nn.ReLU()]
    made = lower(Network(kind="module", body=nn.Sequential(*body).eval(), example=(data[:2],)))
    if engine is None:
        return made
    view = View(inputs=(data[:64],))
    return QuantizeStatic().apply(made, Context(train=view, calibrate=view, profile=ENGINES[engine].profile))


def show(found: dict[str, Any]) -> None:
    """A column per width."""
    widths = list(found["widths"])
    print(" " * 34 + "".join(f"{w:8}" for w in widths))
    for row in found["rows"]:
        ms = [time["ms"] for time in row["times"]]
        print(f"{row['layer']:16} {row['engine']:13} {'int8' if row['int8'] else 'fp32'}" + "".join(f"{t:8.3f}" for t in ms) + "  ms")
        above = [next(t for v, t in zip(widths, ms, strict=True) if v >= w and v % 8 == 0) for w in widths]
        print(" " * 34 + "".join(f"{t / a:8.2f}" for t, a in zip(ms, above, strict=True)) + "  of the next multiple of 8")


if __name__ == "__main__":
    machine.run("widths", measure, show)
