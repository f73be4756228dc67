"""The 784-128-64-10 network on images of handwritten digits: plain SGD at 0.01, and Adam in batches of 128, ten passes each.

Data: the task `mnist5k` where its package is here, else `digits`. Run: python examples/digits.py [curves.html]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from hasten import Fit, Trainer, tasks
from hasten.report import curves
from hasten.tasks.networks import mlp

RECIPES = {
    "SGD 0.01": Fit(batch=32, optimizer=torch.optim.SGD, learning_rate=0.01, schedule="constant", warm_up=0, weight_decay=0),
    "Adam": Fit(batch=128, optimizer=torch.optim.Adam, learning_rate=1e-3, schedule="constant", warm_up=0, weight_decay=0),
    "hasten's default": Fit(),
}


def main(page: Path | None = None, task: str | None = None, epochs: float = 10) -> dict[str, float]:
    """Accuracy on held-out images of each recipe; writes the curves where a file is named."""
    data = tasks.load(task or ("digits" if tasks.missing("mnist5k") else "mnist5k"))
    runs: dict[str, list[object]] = {}
    for name, settings in RECIPES.items():
        seen: list[object] = []
        torch.manual_seed(0)
        Trainer(settings=replace(settings, epochs=epochs), validation=data.held_out, watch=seen.append).fit(mlp(), data.train)
        runs[name] = seen
        print(f"{name:17} {100 * runs[name][-1].accuracy:.2f} % of {len(data.held_out)} held-out images")  # type: ignore[attr-defined]
    if page is not None:
        page.write_text(curves.page(runs, {"data": data.name, "training images": len(data.train)}))
    return {name: records[-1].accuracy for name, records in runs.items()}  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
