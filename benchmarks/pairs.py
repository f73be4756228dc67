"""Every step behind every other one: the pair composes and runs, or it is refused with a reason.

    python benchmarks/pairs.py [--quick] [--json] [--save]

On a residual CNN, an encoder and an LSTM with random weights. For each pair the first step is applied, then the second (a module is
lowered where a graph is wanted), then the result is packed for ONNX Runtime and run: it must give finite numbers of the right
shape. `--quick` takes the CNN and one pair in twenty.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
import zoo

from hasten import compress, train
from hasten.core.data import View
from hasten.core.errors import HastenError, Unsupported, UsageError
from hasten.core.network import Network
from hasten.core.recipe import Context, Recipe, Step
from hasten.core.runner import Runner
from hasten.engines import OnnxRuntime
from hasten.load.lower import forward, lower, quiet

NETWORKS = ("SE-ResNet", "nn.TransformerEncoder", "LSTM, 2 layers")
SETTINGS: dict[str, dict[str, Any]] = {
    "FoldInput": {"mean": (0.5,), "std": (0.25,)},
    "PruneStructure": {"multiple": 2},
    "ReplaceActivation": {"to": "hardswish", "of": ("relu", "gelu", "silu")},
    "QuantizeMixed": {"floats": 0.4},
}
LEFT_OUT = ("UseStudent",)  # needs a file of the user's own


def steps() -> list[Step]:
    """One of each kind, in the order of stages; trainings as short as they can be."""
    found: list[Step] = []
    for room in (compress, train):
        for name in room.__all__:
            kind = getattr(room, name)
            if not (isinstance(kind, type) and hasattr(kind, "apply")) or name in LEFT_OUT:
                continue
            fields = {f.name: f.default for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
            short = {"epochs": 0.5} if fields.get("epochs") else {}
            found.append(kind(**SETTINGS.get(name, {}) | short))
    return sorted(found, key=lambda step: (step.stage, type(step).__name__))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Applies all pairs."""
    networks = NETWORKS[:1] if options.quick else NETWORKS
    rows = []
    for name in networks:
        bench = _Bench(name)
        pairs = [(a, b) for a in steps() for b in steps() if a.stage <= b.stage and type(a) is not type(b)]
        for a, b in pairs[:: 20 if options.quick else 1]:
            rows.append({"network": name, "first": type(a).__name__, "second": type(b).__name__, **bench.pair(a, b)})
        options.keep(_summed(rows))
    return _summed(rows)


def _summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"pairs": len(rows), "outcomes": dict(Counter(r["outcome"] for r in rows)), "rows": rows}


class _Bench:
    """One network, what each step alone makes of it, and what comes of pairs."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        module, example = zoo.own()[name]()
        self.network = Network(kind="module", body=module.eval(), example=(example.numpy(),))
        rows = np.arange(32) % len(example)
        noise = np.random.default_rng(0).standard_normal((32, *example.shape[1:])).astype(np.float32)
        view = View(inputs=(self.network.example[0][rows] + 0.1 * noise,), labels=np.arange(32) % 4)
        self.context = Context(train=view, calibrate=view, original=self.network, loss="classes", profile=OnnxRuntime().profile)
        self.alone = functools.cache(self._alone)

    def pair(self, first: Step, second: Step) -> dict[str, Any]:
        """The outcome and, where it is no "composes", the reason."""
        try:
            Recipe((first, second), OnnxRuntime())
            made = self._applied(second, self.alone(first))
            self._run(made)
        except UsageError as why:
            return {"outcome": "no recipe", "reason": str(why)}
        except Unsupported as why:
            return {"outcome": "refused", "reason": str(why)[:300]}
        except HastenError as why:
            return {"outcome": "failed", "reason": str(why)[:300]}
        return {"outcome": "composes"}

    def _alone(self, step: Step) -> Network:
        return self._applied(step, self.network)

    def _applied(self, step: Step, network: Network) -> Network:
        with quiet():
            return step.apply(lower(network) if step.takes == "graph" else network, self.context)

    def _run(self, network: Network) -> None:
        expected = forward(self.network, self.network.example)
        with tempfile.TemporaryDirectory() as folder, quiet():
            OnnxRuntime(threads=1).pack(lower(network), Path(folder))
            with Runner(Path(folder)) as runner:
                given = runner(*self.network.example)
        assert [a.shape for a in expected] == [a.shape for a in given]
        assert all(np.isfinite(a).all() for a in given)


def show(found: dict[str, Any]) -> None:
    """Prints the counts, and every pair that does not compose."""
    for row in found["rows"]:
        if row["outcome"] != "composes":
            print(f"{row['network']}: {row['first']} → {row['second']}: {row['outcome']}: {row['reason']}")
    print(f"\n{found['pairs']} pairs: " + ", ".join(f"{n} {words}" for words, n in found["outcomes"].items()))


if __name__ == "__main__":
    machine.run("pairs", measure, show)
