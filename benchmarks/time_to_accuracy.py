"""How long it takes to reach an accuracy on unseen images: hasten's recipe against the loops that people write.

    python benchmarks/time_to_accuracy.py [--quick] [--json] [--save] [--only TARGET] [--minutes M] [--tune]

One CNN of 52,000 parameters for all, its weights drawn as torch draws them. "textbook" is Adam at a constant rate: in a DataLoader
loop, in Lightning, in Keras' `fit`. "one cycle" is the honest control: tensors in memory, channels last, fused AdamW, a rate that
rises and falls. "hasten" is Muon, and mirrored pictures and spread labels from four passes on, which the
control has not. `--tune` trains on nine tenths of the training images and looks at the last
tenth alone: for each of the three the better of two rates, then the fewest passes that reach the target there and `MARGIN` more, the
same for all, for the held-out images are harder than a tenth of the others; where none of the passes do, the best of them. Its rows
stay in `results/time_to_accuracy_tuning.jsonl`, and the plans follow from them. The benchmark trains on all training images from
other seeds, each run in a process of its own, and scores the held-out images once, at the end. Seconds are those of the training:
from arrays in memory to the trained network, with whatever is compiled on the way. Targets with the same plan share their trainings.
With `--save` rows that are there are not measured again, so that a run can be ended after `--minutes` and gone on with.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from typing import Any

import machine
import numpy as np
import torch
from accuracy_loops import LOOPS, Plan
from torch import nn

from hasten import tasks
from hasten.core.data import View

Row = dict[str, Any]


SEEDS, MARGIN = range(1, 6), 0.008  # seed 0 went into the margin: with 0.002 five of six ended below the target
TARGETS = {"fashion_mnist 90 %": 0.90, "fashion_mnist 91.5 %": 0.915, "mnist5k 98 %": 0.98}
METHODS = {
    "hasten": "hasten",
    "one cycle": "one cycle",
    "DataLoader": "textbook",
    "Lightning": "textbook",
    "Keras, torch": "textbook",
    "Keras, TensorFlow": "textbook",
}
NEEDS = {"Lightning": "lightning", "Keras, torch": "keras", "Keras, TensorFlow": "tensorflow"}
RATES = {"textbook": (1e-3, 3e-3), "one cycle": (1e-2, 3e-2), "hasten": (2e-2, 4e-2)}
PASSES: dict[str, dict[str, tuple[float, ...]]] = {  # of Fashion-MNIST and of the 3,000 digits
    "fashion_mnist": {"hasten": (1, 1.5, 2, 2.5, 3, 4, 6, 8), "one cycle": (1.5, 2, 2.5, 3, 4, 6, 8, 12), "textbook": tuple(range(1, 11))},
    "mnist5k": {"hasten": (6, 10, 16, 24), "one cycle": (6, 10, 16, 24, 36), "textbook": tuple(range(1, 37))},
}
JUDGED = {"fashion_mnist": {"hasten": 2, "one cycle": 2, "textbook": 3}, "mnist5k": dict.fromkeys(("hasten", "one cycle", "textbook"), 10)}
DRAWS = {"fashion_mnist": (100,), "mnist5k": (100, 101, 102)}  # of the tenth that is looked at: 6,000 images, or 300
TUNING = machine.RESULTS / "time_to_accuracy_tuning.jsonl"


def once(loop: str, task: str, plan: Plan, seed: int, *, tuning: bool) -> dict[str, Any]:
    """One training, in this process: its seconds, and the accuracy on what it did not see; in tuning after each pass, if it can."""
    data = tasks.load(task)
    seen, unseen = data.train, data.held_out
    if tuning:
        order = np.random.default_rng(seed).permutation(len(seen))
        seen, unseen = seen.take(order[len(seen) // 10 :]), seen.take(order[: len(seen) // 10])
    torch.manual_seed(seed)
    if loop.startswith("Keras"):
        import keras

        keras.utils.set_random_seed(seed)
    passes: list[float] = []

    def look(module: nn.Module) -> None:
        if tuning:
            passes.append(_accuracy(module, unseen))
            module.train()

    start = time.perf_counter()
    trained = LOOPS[loop](seen, plan, look)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "accuracy": _accuracy(trained, unseen), "passes": passes}


def _accuracy(trained: Any, view: View) -> float:
    if not isinstance(trained, nn.Module):
        return float((trained(view.inputs[0]).argmax(1) == view.labels).mean())
    trained.eval()
    with torch.no_grad():
        right = [trained(torch.from_numpy(b.inputs[0])).argmax(1).numpy() == b.labels for b in view.batches(500)]
    return float(np.mean(np.concatenate(right)))


def _launch(loop: str, task: str, plan: Plan, seed: int, *, tuning: bool = False) -> dict[str, Any]:
    what = json.dumps([loop, task, asdict(plan), seed, tuning])
    surroundings = {**os.environ, "KERAS_BACKEND": "tensorflow" if loop.endswith("TensorFlow") else "torch"}
    found = subprocess.run([sys.executable, __file__, "--once", what], capture_output=True, text=True, check=False, env=surroundings)
    if found.returncode:
        sys.exit(f"{loop} failed:\n{found.stderr[-2000:]}")
    return dict(json.loads(found.stdout.splitlines()[-1]))


class Tuning:
    """The rows of tuning, put on disk as they come; several processes may add to them."""

    def __init__(self) -> None:
        lines = TUNING.read_text().splitlines() if TUNING.exists() else []
        self._known = {self._key(**row): row["accuracy"] for row in map(json.loads, lines)}

    @staticmethod
    def _key(*, task: str, method: str, rate: float, passes: float, draw: int, accuracy: float = 0.0) -> tuple[Any, ...]:
        del accuracy
        return task, method, rate, float(passes), draw

    def accuracy(self, task: str, method: str, plan: Plan) -> float | None:
        """The mean over the draws, or None where not all were tried."""
        keys = [self._key(task=task, method=method, rate=plan.rate, passes=plan.passes, draw=draw) for draw in DRAWS[task]]
        return statistics.mean(self._known[key] for key in keys) if all(key in self._known for key in keys) else None

    def tried(self, task: str, method: str, plan: Plan) -> float:
        """The same, and trains where it was not tried."""
        loop = next(name for name, used in METHODS.items() if used == method)
        for draw in DRAWS[task]:
            fixed = {"task": task, "method": method, "rate": plan.rate, "draw": draw}
            if self._key(**fixed, passes=plan.passes) in self._known:
                continue
            found = _launch(loop, task, plan, draw, tuning=True)
            looks = found["passes"] or [found["accuracy"]]
            rows = [{**fixed, "passes": plan.passes - len(looks) + 1 + i, "accuracy": accuracy} for i, accuracy in enumerate(looks)]
            self._known |= {self._key(**row): row["accuracy"] for row in rows}
            with open(TUNING, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        told = self.accuracy(task, method, plan)
        assert told is not None
        print(f"{task}, {method}, {plan}: {told:.4f}", file=sys.stderr, flush=True)
        return told

    def best_rate(self, task: str, method: str) -> float | None:
        """Of both rates the better after the passes of `JUDGED`."""
        found = {rate: self.accuracy(task, method, Plan(passes=JUDGED[task][method], rate=rate)) for rate in RATES[method]}
        known = {rate: value for rate, value in found.items() if value is not None}
        return max(known, key=known.__getitem__) if len(known) == len(found) else None

    def plan(self, target: str, method: str) -> Plan | None:
        """The fewest passes that reach the target and the margin; where none does, the best of all; None where tuning has not got there."""
        task, found = target.split()[0], {}
        if (rate := self.best_rate(task, method)) is None:
            return None
        for passes in PASSES[task][method]:
            plan = Plan(passes=passes, rate=rate)
            if (value := self.accuracy(task, method, plan)) is None:
                return None
            if value >= TARGETS[target] + MARGIN:
                return plan
            found[plan] = value
        return max(found, key=found.__getitem__)


def tune(target: str, methods: list[str]) -> None:
    """Trains until the plans of a target can be told."""
    task, tuning = target.split()[0], Tuning()
    for method in methods:
        passes = PASSES[task][method]
        for rate in RATES[method]:
            tuning.tried(task, method, Plan(passes=JUDGED[task][method], rate=rate))
        best = tuning.best_rate(task, method)
        assert best is not None
        if method == "textbook":
            tuning.tried(task, method, Plan(passes=passes[-1], rate=best))
            continue
        for number in passes:
            if tuning.tried(task, method, Plan(passes=number, rate=best)) >= TARGETS[target] + MARGIN:
                break


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Trains every loop from every seed, in turn."""
    targets = options.only or list(TARGETS)
    if options.tune:
        for target in targets:
            tune(target, options.method or list(dict.fromkeys(METHODS.values())))
        sys.exit(0)
    missing = [name for name, package in NEEDS.items() if importlib.util.find_spec(package) is None]
    kept = machine.RESULTS / "time_to_accuracy.json"
    rows: list[Row] = json.loads(kept.read_text())["rows"] if options.save and kept.exists() else []
    end, tuning = time.monotonic() + 60 * options.minutes, Tuning()
    for seed in SEEDS[:1] if options.quick else SEEDS:
        for target in ["mnist5k 98 %"] if options.quick else targets:
            for loop, method in METHODS.items():
                plan = tuning.plan(target, method)
                if plan is None or loop in missing or (options.quick and loop in NEEDS):
                    continue
                row = {"target": target, "loop": loop, "seed": seed, "plan": asdict(plan)}
                if any(row.items() <= known.items() for known in rows) or time.monotonic() > end:
                    continue
                found = _same(row, rows) or _launch(loop, target.split()[0], plan, seed)
                rows.append({**row, "seconds": found["seconds"], "accuracy": found["accuracy"]})
                options.keep(_summed(rows, missing))
    if not rows:
        sys.exit(f"{TUNING} tells no plan for {', '.join(targets)}; run with --tune first")
    return _summed(rows, missing)


def _same(row: Row, rows: list[Row]) -> Row | None:
    """A row of the same training: it does not know which accuracy it is for."""
    wanted = {**row, "target": row["target"].split()[0]}
    return next((r for r in rows if wanted.items() <= {**r, "target": r["target"].split()[0]}.items()), None)


def _summed(rows: list[Row], missing: list[str]) -> dict[str, Any]:
    table = []
    names = [(target, loop) for target in TARGETS for loop in METHODS]
    for target, loop in sorted({(r["target"], r["loop"]) for r in rows}, key=names.index):
        mine = {r["seed"]: r for r in rows if (r["target"], r["loop"]) == (target, loop)}
        ours = {r["seed"]: r for r in rows if (r["target"], r["loop"]) == (target, "hasten")}
        ratios = [r["seconds"] / ours[seed]["seconds"] for seed, r in mine.items() if seed in ours]
        accuracy, seconds = [r["accuracy"] for r in mine.values()], [r["seconds"] for r in mine.values()]
        several = len(mine) > 1
        table.append(
            {
                "target": target,
                "loop": loop,
                "seeds": len(mine),
                **next(iter(mine.values()))["plan"],
                "seconds": statistics.mean(seconds),
                "seconds_std": statistics.stdev(seconds) if several else None,
                "accuracy": statistics.mean(accuracy),
                "accuracy_std": statistics.stdev(accuracy) if several else None,
                "reached": sum(a >= TARGETS[target] for a in accuracy),
                "over_hasten": statistics.mean(ratios) if ratios else None,
                "over_hasten_std": statistics.stdev(ratios) if len(ratios) > 1 else None,
            }
        )
    return {"threads": torch.get_num_threads(), "table": table, "missing": missing, "rows": rows}


def show(found: dict[str, Any]) -> None:
    """One line per target and loop."""
    print(f"{'target':22} {'loop':18} {'passes':>6} {'seconds':>13} {'accuracy':>16}  reached  time ÷ hasten's")
    for r in found["table"]:
        spread = [f" ± {r[key]:{form}}" if r[key] is not None else "" for key, form in (("seconds_std", ".1f"), ("accuracy_std", ".4f"))]
        over = f"{r['over_hasten']:.2f}" if r["over_hasten"] else "–"
        over += f" ± {r['over_hasten_std']:.2f}" if r["over_hasten_std"] else ""
        seconds, accuracy = f"{r['seconds']:.1f}{spread[0]}", f"{r['accuracy']:.4f}{spread[1]}"
        print(f"{r['target']:22} {r['loop']:18} {r['passes']:6g} {seconds:>13} {accuracy:>16}  {r['reached']}/{r['seeds']}      {over}")
    if found["missing"]:
        print(f"not installed, left out: {', '.join(found['missing'])}; pip install lightning keras tensorflow-cpu")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=list(TARGETS))
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after these")
    parser.add_argument("--method", action="append", choices=sorted(set(METHODS.values())), help="to tune; all by default")
    parser.add_argument("--tune", action="store_true", help="find passes and rates; goes on with what is there")


if __name__ == "__main__":
    if "--once" in sys.argv:
        warnings.simplefilter("ignore")
        loop, task, plan, seed, tuning = json.loads(sys.argv[2])
        print(json.dumps(once(loop, task, Plan(**plan), seed, tuning=tuning)))
    else:
        machine.run("time_to_accuracy", measure, show, _options)
