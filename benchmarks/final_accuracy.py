"""What a network gets right in the end: hasten's default recipe against the textbook's, the same passes, batches and first weights.

    python benchmarks/final_accuracy.py [--quick] [--json] [--save] [--only TASK]

The default recipe is `Fit(epochs=…)` with nothing else said. The textbook's is Adam at its usual constant rate, 0.001, without clipping
or decay. Nothing is tuned for a task. Each seed draws first weights and orders, shared by both recipes where they can be; the network is
scored once on held-out data. The gain is the mean over the seeds of (default − textbook) with its 95 % t-interval. With `--save`, seeds
that are there are not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import machine
import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from hasten import tasks
from hasten.core.data import View
from hasten.tasks import networks
from hasten.train import Fit, fit

EPOCHS, SEEDS = 10, 20
DEFAULT = Fit(epochs=EPOCHS)
TEXTBOOK = replace(
    DEFAULT, optimizer=torch.optim.Adam, learning_rate=1e-3, schedule="constant", warm_up=0.0, weight_decay=0.0, clip=float("inf")
)


class Words(nn.Module):
    """The mean of the tokens' vectors and a linear layer: ids and mask, (batch, tokens) each → (batch, classes)."""

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30_522, width), nn.Linear(width, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        shares = mask.unsqueeze(-1).to(self.table.weight.dtype)
        mean = (self.table(ids) * shares).sum(1) / shares.sum(1)
        result: Tensor = self.head(mean)
        return result


def table() -> nn.Module:
    """16-128-64-26."""
    return nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 26))


def sequence() -> nn.Module:
    """Two convolutions along 60 bases and a linear layer: (batch, 4, 60) → (batch, 3)."""
    layers: list[nn.Module] = []
    for before, after in ((4, 32), (32, 32)):
        layers += [nn.Conv1d(before, after, 7, padding=3, bias=False), nn.BatchNorm1d(after), nn.ReLU(), nn.MaxPool1d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 15, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "fashion_mnist": networks.mlp,
    "letter": table,
    "r8": lambda: Words(8),
    "splice": sequence,
}


def accuracy(module: nn.Module, view: View) -> float:
    """The share of `view` that the network gets right."""
    with torch.no_grad():
        right = [module.eval()(*(torch.from_numpy(a) for a in b.inputs)).argmax(1).numpy() == b.labels for b in view.batches(500)]
    return float(np.mean(np.concatenate(right)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Trains both recipes from each seed."""
    kept = machine.RESULTS / "final_accuracy.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text())["rows"] if options.save and kept.exists() else []
    chosen = options.only or (["splice"] if options.quick else list(NETWORKS))
    for name in chosen:
        data = tasks.load(name)
        for seed in range(2 if options.quick else SEEDS):
            if any((r["task"], r["seed"]) == (name, seed) for r in rows):
                continue
            row = {"task": name, "seed": seed}
            for recipe, settings in (("default", DEFAULT), ("textbook", TEXTBOOK)):
                torch.manual_seed(seed)
                row[recipe] = accuracy(fit(NETWORKS[name](), data.train, settings=replace(settings, seed=seed)).module, data.held_out)
            rows.append(row)
            options.keep(_summed(rows))
    return _summed(rows)


def _summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    table = []
    for name in dict.fromkeys(r["task"] for r in rows):
        mine = [r for r in rows if r["task"] == name]
        gains = [r["default"] - r["textbook"] for r in mine]
        row: dict[str, Any] = {"task": name, "seeds": len(mine), "gain": statistics.fmean(gains), "won": sum(g > 0 for g in gains)}
        for recipe in ("default", "textbook"):
            row[recipe] = statistics.fmean(r[recipe] for r in mine)
            row[f"{recipe}_std"] = statistics.stdev(r[recipe] for r in mine) if len(mine) > 1 else None
        if len(mine) > 1:
            half = float(stats.t.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / len(gains) ** 0.5
            row["gain_interval"] = [row["gain"] - half, row["gain"] + half]
        table.append(row)
    return {"epochs": EPOCHS, "batch": DEFAULT.batch, "table": table, "rows": rows}


def show(found: dict[str, Any]) -> None:
    """One line per task."""
    print(f"{found['epochs']} passes, batches of {found['batch']}; accuracy in %, mean ± standard deviation over seeds")
    for r in found["table"]:
        both = "  ".join(f"{recipe} {100 * r[recipe]:.2f} ± {100 * (r[f'{recipe}_std'] or 0):.2f}" for recipe in ("default", "textbook"))
        low, high = (100 * g for g in r.get("gain_interval", (float("nan"),) * 2))
        print(
            f"{r['task']:14} {both}  gain {100 * r['gain']:+.2f} ({low:+.2f} to {high:+.2f}) points, better in {r['won']} of {r['seeds']}"
        )


if __name__ == "__main__":
    machine.run("final_accuracy", measure, show, lambda parser: parser.add_argument("--only", action="append", choices=list(NETWORKS)))
