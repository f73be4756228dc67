"""What each way of making a network smaller costs and buys on real data, beside its controls.

    python benchmarks/compression.py [--quick] [--json] [--save] [--only NETWORK] [--seeds N …] [--prepare | --cached] [--untimed]

Fashion-MNIST, 20,000 training and 10,000 held-out images, and R8, news for a sentence encoder with a trained last layer. For each
network and seed: the original is trained, each recipe is applied and packed for ONNX Runtime and OpenVINO, and all are timed in
the same rounds of fresh launches, batch 1. Accuracy is that of the held-out part in the engine itself; no choice looks at it.
Controls, each given the processor time that the network's first recipe trained for: the original trained further, and a smaller
network of the same kind trained from scratch (at least as many epochs as the original had). Beside them, pruning by chance.

What was trained is kept in the cache of the reference networks and found again by what made it; `--only NETWORK --save` adds to the
saved result, `--seeds 1 2` measures these two. `--prepare` stops when all is trained, which needs no quiet machine; the timing does.
`--untimed` scores and times nothing: another seed is another network of the same layers, whose time is known.
`--quick` takes the MLP, 2,000 images of either part and two recipes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from compression_cases import CASES, Steps
from reference_networks import CACHE, reference, told
from torch import nn

from hasten.core import folder
from hasten.core.data import View
from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.core.recipe import Context, Engine, Step, fingerprint, part_to_json
from hasten.core.runner import Runner
from hasten.engines import Eager, OnnxRuntime, OpenVINO
from hasten.load import saved
from hasten.load.files import from_module
from hasten.load.lower import lower
from hasten.measure import statistics, timing
from hasten.train import FineTune, fit
from hasten.train.loop import AfterStep, go_on

LIMIT = 0.01


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All networks and seeds."""
    wanted = options.only or (["mlp"] if options.quick else list(CASES))
    rows = machine.earlier("compression", "rows") if options.only and options.save else []
    for seed in [0] if options.quick else options.seeds:
        for name in wanted:
            bench = _Bench(name, seed, quick=options.quick, cached=options.cached, timed=not options.untimed)
            if options.prepare:
                bench.candidates()
                continue
            rows = [r for r in rows if (r["network"], r["seed"]) != (name, seed)] + bench.rows()
            options.keep(_summed(rows))
    if options.prepare:
        sys.exit(0)
    return _summed(rows)


class _Bench:
    """One network and seed: its candidates, made once and kept, and their figures."""

    def __init__(self, name: str, seed: int, *, quick: bool, cached: bool = False, timed: bool = True) -> None:
        self.name, self.seed, self.quick, self.cached, self.timed, self.case = name, seed, quick, cached, timed, CASES[name]
        if quick:
            self.case = replace(self.case, recipes=dict(list(self.case.recipes.items())[:3:2]))
        original = self.case.original
        made = replace(original, settings=replace(original.settings, seed=original.settings.seed if self.case.one_original else seed))
        self.made = replace(made, examples=2_000, settings=replace(made.settings, epochs=2)) if quick else made
        module, self.data, self.training = reference(self.made)
        self.original = from_module(module, tuple(a[:4] for a in self.data.train.inputs))
        calibrate = self.data.train.take(slice(0, 256))
        self.context = Context(train=self.data.train, calibrate=calibrate, original=self.original, seed=seed)
        self.seconds: dict[str, float] = {}

    def candidates(self) -> dict[tuple[str, Engine], Network | str]:
        """Words and engine → the network, or why there is none."""
        found: dict[tuple[str, Engine], Network | str] = {}
        first, *others = self.case.recipes
        self._add(found, first)
        further = self._control("trained further", lambda: self._further(self.seconds[first]))
        small = self._control("from scratch", lambda: self._small(self.seconds[first]))
        for words in others:
            self._add(found, words)
        rounding = [step for step in self.case.recipes[first] if step.takes == "graph"]
        for engine in (OnnxRuntime(), OpenVINO()):
            found["as given", engine] = self.original
            found["control: trained further", engine] = further
            found["control: small from scratch", engine] = small if isinstance(small, str) else self._rounded(small, rounding, engine)
        return found

    def _control(self, words: str, train: Callable[[], Network]) -> Network | str:
        try:
            return self._kept([str(self.case.smaller()), words], train)[0]
        except Unsupported as why:
            return str(why)

    def _add(self, found: dict[tuple[str, Engine], Network | str], words: str) -> None:
        for engine in (OnnxRuntime(packed=words in ("90 % zeros", "16 values")), OpenVINO()):
            try:
                found[words, engine] = self._applied(words, self.case.recipes[words], engine)
            except Unsupported as why:
                found[words, engine] = str(why)[:200]

    def rows(self) -> list[dict[str, Any]]:
        """Every candidate's figures."""
        common = {"network": self.name, "seed": self.seed, "training_seconds": self.training["seconds"]}
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as place:
            folders: dict[tuple[str, str], Path] = {}

            def pack(words: str, network: Network, engine: Engine) -> None:
                into = Path(place) / str(len(folders))
                into.mkdir()
                engine.pack(lower(network) if engine.takes == "graph" else network, into)
                folders[words, type(engine).__name__] = into

            pack("as given", self.original, Eager())
            for (words, engine), network in self.candidates().items():
                if isinstance(network, str):
                    rows.append({"recipe": words, "engine": type(engine).__name__, "reason": network})
                else:
                    pack(words, network, engine)
            rows += self._figures(folders)
        return [common | row for row in rows]

    def _applied(self, words: str, steps: Steps, engine: Engine) -> Network:
        """What the steps make; beginnings that recipes share are made once. A step that finds nothing to do is left out."""
        network, done, changed, reason, spent = self.original, list[Step](), False, "", 0.0
        for step in steps:
            context = replace(self.context, profile=engine.profile) if step.reads_profile else self.context
            taken = lower(network) if step.takes == "graph" else network
            try:
                network, seconds = self._kept([*done, step], lambda s=step, n=taken, c=context: s.apply(n, c), engine)
            except Unsupported as why:
                reason = str(why)
                continue
            done.append(step)
            spent += seconds
            changed = changed or not (step.lossless or step.aims == {"score"})
        if not changed:
            raise Unsupported(reason)
        self.seconds[words] = spent
        return network

    def _rounded(self, network: Network, steps: list[Step], engine: Engine) -> Network | str:
        graph, context = lower(network), replace(self.context, profile=engine.profile)
        try:
            for step in steps:
                graph = step.apply(graph, context)
        except Unsupported as why:
            return str(why)[:200]
        return graph

    def _further(self, budget: float) -> Network:
        """The control: the original, trained further for as long."""
        epochs = self._epochs(lambda look: FineTune().train(self.original, self.context, after_step=look), FineTune().batch, budget)
        return FineTune(epochs=epochs).apply(self.original, self.context)

    def _small(self, budget: float) -> Network:
        """The control: another network of the same kind, trained from scratch for as long."""

        def trained(epochs: float, after_step: AfterStep = go_on) -> Network:
            torch.manual_seed(self.seed)
            settings = replace(self.made.settings, epochs=epochs, seed=self.seed)
            return self.original.with_body(
                fit(self.case.smaller().eval(), self.data.train, settings=settings, after_step=after_step).module
            )

        epochs = self._epochs(lambda look: trained(1, look), self.made.settings.batch, budget)
        return trained(max(epochs, self.made.settings.epochs))

    def _epochs(self, train: Callable[[AfterStep], object], batch: int, budget: float) -> float:
        """How many epochs of a training take so many seconds of processor time, what is done once (a teacher's pass) among them."""
        marks = [time.process_time()]

        def look(module: nn.Module, step: int, steps: int) -> bool:
            marks.append(time.process_time())
            return len(marks) > 25

        train(look)
        each = (marks[-1] - marks[5]) / (len(marks) - 6)  # the first steps warm up
        return round(max(0.1, (budget - (marks[5] - marks[0] - 5 * each)) / (each * (len(self.data.train) // batch))), 1)

    def _kept(self, steps: list[Any], make: Callable[[], Network], engine: Engine | None = None) -> tuple[Network, float]:
        """The network and the seconds of processor time that its last step took, from the cache where it is there."""
        profile = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in vars(engine.profile).items()} if engine else None
        plain = [s if isinstance(s, str) else part_to_json(s) for s in steps]
        reads = any(not isinstance(s, str) and s.reads_profile for s in steps)
        start = [self.made.name, self.made.examples, told(self.made.settings), self.data.train.fingerprint(), torch.__version__]
        key = [*start, plain, profile if reads else None, *([self.seed] if self.seed != self.made.settings.seed else [])]
        place = CACHE / "networks" / fingerprint(key)[:24]
        if not folder.intact(place):
            if self.cached and any(isinstance(s, str) or s.aims == {"score"} for s in steps):
                raise Unsupported("not trained yet; --prepare does it")
            print(f"{self.name}, seed {self.seed}: {steps[-1]}", file=sys.stderr)
            start = time.process_time()
            network = make()
            seconds = time.process_time() - start
            place.parent.mkdir(parents=True, exist_ok=True)
            with folder.new_folder(place) as fresh:
                saved.save(network, fresh / "network")
                (fresh / "seconds.json").write_text(json.dumps(seconds))
        return saved.load(place / "network"), float(json.loads((place / "seconds.json").read_text()))

    def _figures(self, folders: dict[tuple[str, str], Path]) -> list[dict[str, Any]]:
        held_out = self.data.held_out.take(slice(0, 2_000 if self.quick else None))
        times = self._times(folders, held_out) if self.timed else [{} for _ in folders]
        right = {name: _right(into, held_out) for name, into in folders.items()}
        before, rows = right["as given", "Eager"], []
        for more, ((words, engine), into) in zip(times, folders.items(), strict=True):
            after = right[words, engine]
            lost, won = int((before & ~after).sum()), int((after & ~before).sum())
            rows.append(
                {
                    "recipe": words,
                    "engine": engine,
                    "accuracy": float(after.mean()),
                    "drop_upper": statistics.tango_upper(lost, won, len(held_out), confidence=0.95),
                    **more,
                    "size_bytes": folder.size_bytes(into),
                    "training_seconds_of_recipe": self.seconds.get(words),
                }
            )
        return rows

    def _times(self, folders: dict[tuple[str, str], Path], held_out: View) -> list[dict[str, Any]]:
        quick, full = timing.Protocol(fewest=2, most=2, block_ms=10, blocks=2), timing.Protocol(fewest=5, most=5, longest_s=300)
        contestants = [timing.Contestant(folder=f) for f in folders.values()]
        timed = timing.race(contestants, held_out.inputs, (1,), protocol=quick if self.quick else full)
        medians = timed.medians_ms[:, :, 0]  # (rounds, contestants)
        names = list(folders)
        int8 = [i for i, (words, _) in enumerate(names) if words == "int8"]
        best = min(int8, key=lambda i: float(np.log(medians[:, i]).mean()))
        against = {"eager": 0, "ort": names.index(("as given", "OnnxRuntime")), "best_int8": best}
        against["openvino_int8"] = next(i for i in int8 if names[i][1] == "OpenVINO")
        return [
            {
                "ms": float(np.exp(np.log(medians[:, at]).mean())),
                "over": {who: tuple(statistics.ratio_interval(np.log(medians[:, i] / medians[:, at]))) for who, i in against.items()},
            }
            for at in range(len(names))
        ]


def _right(package: Path, held_out: View) -> np.ndarray:
    with Runner(package) as runner:
        return runner.outputs(held_out.inputs)[0].argmax(1) == held_out.labels


def _summed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each network and recipe, in its faster engine: mean and standard deviation over seeds; times over those that were timed."""
    table = []
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if "accuracy" in row and row["engine"] != "Eager":
            groups.setdefault((row["network"], row["recipe"]), {}).setdefault(row["engine"], []).append(row)
    given = {r["network"]: [x for x in rows if x.get("engine") == "Eager" and x["network"] == r["network"]] for r in rows}
    for (network, recipe), engines in groups.items():
        times = {engine: [r for r in found if "ms" in r] for engine, found in engines.items()}
        if not any(times.values()):
            continue
        engine = min((e for e in times if times[e]), key=lambda e: np.mean([r["ms"] for r in times[e]]))
        found, timed = engines[engine], times[engine]
        accuracy = [r["accuracy"] for r in found]
        table.append(
            {
                "network": network,
                "recipe": recipe,
                "engine": engine,
                "seeds": len(found),
                "accuracy": float(np.mean(accuracy)),
                "accuracy_std": float(np.std(accuracy, ddof=1)) if len(found) > 1 else None,
                "kept": sum(r["drop_upper"] <= LIMIT for r in found),
                "timed": len(timed),
                "ms": float(np.mean([r["ms"] for r in timed])),
                "over": {who: float(np.exp(np.mean([np.log(r["over"][who][0]) for r in timed]))) for who in timed[0]["over"]},
                "smaller": float(np.mean([r["size_bytes"] for r in given[network]]) / np.mean([r["size_bytes"] for r in found])),
            }
        )
    return {"limit": LIMIT, "table": table, "rows": rows}


def show(found: dict[str, Any]) -> None:
    """Prints one line per network and recipe."""
    print(f"{'network':10} {'recipe':34} {'engine':12} {'accuracy':>15}  kept {'ms':>8}   × over: eager   ORT  int8  OV int8  smaller")
    for r in found["table"]:
        spread = f" ± {r['accuracy_std']:.4f}" if r["accuracy_std"] is not None else ""
        over = r["over"]
        print(
            f"{r['network']:10} {r['recipe']:34} {r['engine']:12} {r['accuracy']:.4f}{spread:9}  {r['kept']}/{r['seeds']}  {r['ms']:8.3f}  "
            f"{over['eager']:14.1f} {over['ort']:5.2f} {over['best_int8']:5.2f}    {over['openvino_int8']:5.2f}  {r['smaller']:7.1f}"
        )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--prepare", action="store_true", help="train what is missing, time nothing")
    parser.add_argument("--untimed", action="store_true", help="score, and time nothing; needs no quiet machine")
    parser.add_argument("--cached", action="store_true", help="leave out what is not trained yet, and say so")


if __name__ == "__main__":
    machine.run("compression", measure, show, _options)
