"""The trained networks that the other benchmarks start from: trains each once, keeps it, prints its held-out accuracy.

    python benchmarks/reference_networks.py [--quick] [--json] [--only NAME] [--cache FOLDER]

A training that was interrupted goes on. A network is found again by what made it: its layers, the data, the settings and torch's
version. `--quick` trains for an eighth of the epochs, to see that everything runs; its checkpoints are others. Exit code 1 if a
network misses its goal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hasten import tasks
from hasten.core.data import View
from hasten.core.recipe import fingerprint
from hasten.tasks import TaskData, networks, text
from hasten.train import Checkpoints, Fit, Trainer
from hasten.training import Line

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "hasten-benchmarks"
QUICK = 1 / 8


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One network on one task.

    Args:
        network: the function in `hasten.tasks.networks` that builds it.
        task: as given to `tasks.load`.
        examples: of the training part, from its beginning; None for all.
        goal: accuracy on the held-out part that it must reach.
        settings: how it is trained.
        still: beginning of the names of the parameters that are not trained.
    """

    network: str
    task: str
    examples: int | None = None
    goal: float
    settings: Fit
    still: str = ""

    @property
    def name(self) -> str:
        """Of the checkpoint, and for `--only`."""
        return f"{self.network}-{self.task}"


REFERENCES = (
    Reference(
        network="small_cnn",
        task="mnist5k",
        goal=0.98,
        settings=Fit(epochs=12, batch=32, learning_rate=0.01, augmentation="shift"),
    ),
    Reference(network="mlp", task="mnist5k", goal=0.96, settings=Fit(epochs=30, batch=64, learning_rate=0.003, augmentation="shift")),
    Reference(
        network="resnet20",
        task="mnist5k",
        goal=0.98,
        settings=Fit(epochs=8, batch=64, learning_rate=0.01, augmentation="shift"),
    ),
    Reference(
        network="small_cnn",
        task="fashion_mnist",
        examples=20_000,
        goal=0.90,
        settings=Fit(epochs=6, batch=64, learning_rate=0.01),
    ),
    Reference(network="mlp", task="fashion_mnist", examples=20_000, goal=0.86, settings=Fit(epochs=20, learning_rate=0.003)),
    Reference(
        network="resnet20",
        task="fashion_mnist",
        examples=20_000,
        goal=0.90,
        settings=Fit(epochs=5, batch=64, learning_rate=0.01),
    ),
)


def reference(wanted: Reference, *, cache: Path = CACHE) -> tuple[nn.Module, TaskData, dict[str, Any]]:
    """The trained network in eval mode, its task with the training part it saw, and how long the training took."""
    data = tasks.load(wanted.task)
    data = replace(data, train=data.train.take(slice(wanted.examples)))
    torch.manual_seed(wanted.settings.seed)
    build = text.minilm if wanted.network == "minilm" else getattr(networks, wanted.network)
    module: nn.Module = build(len(data.classes)).eval()
    made_of = {
        "layers": str(module),
        "data": data.train.fingerprint(),
        "settings": told(wanted.settings),
        "torch": torch.__version__,
    }
    file = cache / f"{wanted.name}-{fingerprint(made_of)[:16]}.pt"
    if not file.exists():
        _train(module, data.train, wanted, file)
    kept = torch.load(file, weights_only=True)
    module.load_state_dict(kept["weights"])
    return module, data, kept["training"]


def told(settings: Fit) -> dict[str, Any]:
    """The settings that differ from the defaults: a field that is new, and off, costs nobody a checkpoint."""
    fields = dataclasses.asdict(settings)
    return {name: value for name, value in fields.items() if value != dataclasses.asdict(Fit())[name]}


def accuracy(module: nn.Module, view: View) -> float:
    """Share of the examples whose highest output is at their label."""
    with torch.no_grad():
        right = [(module(*map(torch.from_numpy, b.inputs)).argmax(1).numpy() == b.labels).sum() for b in view.batches(500)]
    return float(sum(right) / len(view))


def _train(module: nn.Module, view: View, wanted: Reference, file: Path) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not (wanted.still and name.startswith(wanted.still)))
    started = file.with_suffix(".started")
    line = Line(sys.stderr)
    trainer = Trainer(settings=wanted.settings, checkpoints=Checkpoints(folder=started), watch=line)
    fitted = trainer.fit(module, view)
    training = {"seconds": fitted.seconds, "threads": torch.get_num_threads(), "steps": fitted.steps}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    module.requires_grad_(True)
    torch.save({"weights": fitted.module.state_dict(), "training": training}, part)
    os.replace(part, file)
    shutil.rmtree(started)


def _row(wanted: Reference, cache: Path) -> dict[str, Any]:
    module, data, training = reference(wanted, cache=cache)
    found, n = accuracy(module, data.held_out), len(data.held_out)
    return {
        "name": wanted.name,
        "parameters": sum(p.numel() for p in module.parameters()),
        "trained_on": len(data.train),
        "held_out": n,
        "accuracy": found,
        "standard_error": math.sqrt(found * (1 - found) / n),
        "goal": wanted.goal,
        **training,
    }


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}


def main() -> int:
    """Prints one row per network."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="an eighth of the epochs; goals are not held")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=[r.name for r in REFERENCES], action="append")
    parser.add_argument("--cache", type=Path, default=CACHE)
    asked = parser.parse_args()
    chosen = [r for r in REFERENCES if not asked.only or r.name in asked.only]
    if asked.quick:
        chosen = [replace(r, goal=0.0, settings=replace(r.settings, epochs=r.settings.epochs * QUICK)) for r in chosen]
    rows = [_row(r, asked.cache) for r in chosen]
    if asked.json:
        print(json.dumps({"machine": _machine(), "networks": rows}, indent=2))
    else:
        print("network                   parameters  trained on  held out  accuracy ± s.e.     goal  training")
        for r in rows:
            print(
                f"{r['name']:24} {r['parameters']:11,} {r['trained_on']:11,} {r['held_out']:9,}  {r['accuracy']:.4f} ± "
                f"{r['standard_error']:.4f}  {r['goal']:7.2f}  {r['seconds']:.0f} s, {r['threads']} threads, {r['steps']} steps"
            )
        print(" · ".join(f"{name} {value}" for name, value in _machine().items()))
    return int(any(r["accuracy"] < r["goal"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
