"""hasten's search against what others do with the same time: each result within 1 point, all timed in the same rounds.

    python benchmarks/search_peers.py [--quick] [--json] [--save] [--only NETWORK] [--minutes N] [--batch N] [--packages FOLDER]

Every network is given to hasten and to each peer with the same data and at most the same time (10 minutes unless told otherwise):
- plain conversions to ONNX Runtime and OpenVINO, onnxruntime's static int8, NNCF's `quantize`: their usual settings;
- NNCF's `quantize_with_accuracy_control` with the same limit, on the quarter of the held-out data that hasten selects by;
- Torch-Pruning at a uniform 50 %, by magnitude, then fine-tuned with Adam for what is left of the time, then NNCF's `quantize`.
Each result is then judged as hasten judges its own: its outputs are equal, or the upper bound of its drop on the held-out examples is
within the limit. A peer that is not `kept` is shown and does not count as the best. A network without labels is judged by agreement
with its own answers.
`--only NETWORK --save` adds to the saved result. `--quick` takes an eighth of an epoch of the small CNN, half a minute, and the peers
that do not train.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import compression_cases
import machine
import numpy as np
import peers
import placement
import reference_networks
import torch
import trained_cases
from torch import nn

import hasten
from hasten.core.data import View
from hasten.core.network import Network
from hasten.core.report import Limit
from hasten.core.runner import Runner
from hasten.engines import OpenVINO
from hasten.load import files
from hasten.load.lower import lower
from hasten.load.split import split
from hasten.measure import scores, timing
from hasten.search import prover

LIMIT = Limit(max_drop=0.01)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A trained network with its data; `held_out` was not trained on. Without labels it is judged by agreement with itself."""

    module: nn.Module
    train: View
    held_out: View

    def score(self, outputs: tuple[Any, ...]) -> Any:
        """Accuracy, or the share of the answers that are the original's `outputs`; of each position where there are several."""
        return scores.choose(self.held_out.labels, outputs, name="accuracy" if self.held_out.labels is not None else "agreement")


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """What a peer gets: the network in both forms, the data cut as hasten cuts it, and when its time is up."""

    module: Network
    graph: Network
    train: View
    select: View
    score: Any
    ends: float


Peer = Callable[[Work, Path], None]


def controlled(work: Work, folder: Path) -> None:
    """NNCF's quantization with accuracy control: layers go back to floats until the drop on *select* is within the limit."""
    import nncf
    import openvino

    model = _intermediate(work.graph, folder)
    rows = [b.inputs for b in work.train.take(slice(0, peers.CALIBRATE)).batches(1)]
    checked = [(tuple(a[i : i + 1] for a in work.select.inputs), i) for i in range(len(work.select))]
    labels = work.select.labels
    target = _answers(work.module, work.select)[0] if labels is None else labels

    def validate(compiled: Any, items: Any) -> float:
        if time.monotonic() > work.ends:
            raise TimeoutError("no result within the time that all have")
        values = [work.score.per_example((next(iter(compiled(inputs).values())),), target[at : at + 1])[0] for inputs, at in items]
        return float(np.mean(values))

    made = nncf.quantize_with_accuracy_control(
        model,
        calibration_dataset=nncf.Dataset(rows),
        validation_dataset=nncf.Dataset(checked),
        validation_fn=validate,
        max_drop=LIMIT.max_drop,
    )
    openvino.save_model(made, folder / "model.xml", compress_to_fp16=False)


def pruned(work: Work, folder: Path) -> None:
    """Torch-Pruning at a uniform 50 % by magnitude, fine-tuned with Adam until the time is up, quantized by NNCF."""
    import copy

    import torch_pruning

    example = tuple(torch.from_numpy(np.array(a[:2])) for a in work.train.inputs)
    module = copy.deepcopy(work.module.module)
    last = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    torch_pruning.pruner.MagnitudePruner(
        module, example, importance=torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=[last], round_to=8
    ).step()
    _tuned(module, work)
    graph = lower(files.from_module(module.eval(), work.module.example))
    peers.openvino_int8(work.module, graph, work.train, folder)


def _tuned(module: nn.Module, work: Work, batch: int = 64) -> None:
    """Adam with a rate that rises over a fifth of the time and falls to 0 at its end; labels, or the original's answers."""
    begin, order = time.monotonic(), np.random.default_rng(0)
    length = max(work.ends - begin, 1.0)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    module.train()
    while (gone := (time.monotonic() - begin) / length) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(gone / 0.2, (1 - gone) / 0.8)
        rows = work.train.take(np.sort(order.integers(0, len(work.train), batch)))
        inputs = tuple(torch.from_numpy(np.array(a)) for a in rows.inputs)
        optimizer.zero_grad()
        if rows.labels is None:
            torch.stack([nn.functional.mse_loss(a, b) for a, b in _pairs(module, work.module.module, inputs)]).sum().backward()
        else:
            nn.functional.cross_entropy(module(*inputs), torch.from_numpy(np.array(rows.labels))).backward()
        optimizer.step()


def _pairs(module: nn.Module, original: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    with torch.no_grad():
        answers = original(*inputs)
    outputs = module(*inputs)
    yield from zip(outputs, answers, strict=True) if isinstance(answers, tuple) else [(outputs, answers)]


def _answers(network: Network, view: View) -> tuple[Any, ...]:
    """The original's first output on all rows."""
    with torch.no_grad():
        pieces = [network.module(*map(torch.from_numpy, b.inputs)) for b in view.batches(64)]
    return (np.concatenate([(p[0] if isinstance(p, tuple) else p).numpy() for p in pieces]),)


def _intermediate(graph: Network, folder: Path) -> Any:
    import openvino

    OpenVINO().pack(graph, folder)
    model = openvino.Core().read_model(folder / "model.xml")
    for name in ("model.xml", "model.bin"):  # read_model maps the file, and the result takes its place
        (folder / name).rename(folder / f"plain-{name}")
    return model


def _usual(name: str) -> Peer:
    return lambda work, folder: peers.PEERS[name](work.module, work.graph, work.train, folder)


PLAIN: dict[str, Peer] = {name: _usual(name) for name in ("ORT fp32", "ORT int8", "OpenVINO fp32", "OpenVINO int8")}
PEERS: dict[str, Peer] = PLAIN | {"NNCF, accuracy control": controlled, "Torch-Pruning 50 %, int8": pruned}


def _reference(wanted: reference_networks.Reference) -> Case:
    module, data, _ = reference_networks.reference(wanted)
    return Case(module=module, train=data.train, held_out=data.held_out)


def _of(made: tuple[nn.Module, View, View]) -> Case:
    module, train, held_out = made
    return Case(module=module.eval(), train=train, held_out=held_out)


CASES: dict[str, Callable[[], Case]] = {
    "small_cnn-mnist5k": lambda: _reference(reference_networks.REFERENCES[0]),
    **{name: lambda n=name: _reference(compression_cases.CASES[n].original) for name in ("resnet20", "mobilenet", "lstm", "minilm")},  # type: ignore[misc]
    "efficientnet-lite0": lambda: _of(placement._efficientnet()),
    "silero-vad": lambda: _of(trained_cases.speech()),
    "pp-ocr": lambda: _of(trained_cases.words()),
}


def compare(name: str, case: Case, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One network: hasten, the peers, the verdicts, and the race among all."""
    seconds = 60 * options.minutes
    module = files.from_module(case.module, tuple(a[:4] for a in case.train.inputs))
    base = _answers(module, case.held_out)
    score = case.score(base)
    start = time.monotonic()
    effort = "quick" if options.quick else "normal"
    asked = hasten.Options(time_limit=seconds, effort=effort, batch=options.batch, score=score.name)
    report = hasten.optimize(case.module, case.train, case.held_out, max_drop=LIMIT.max_drop, run=place / "run", options=asked)
    took = {"hasten": time.monotonic() - start}
    assert report.artifact
    print(f"{name}: {report.sentence} ({took['hasten']:.0f} s)", file=sys.stderr, flush=True)
    folders: dict[str, Path] = {"hasten": Path(report.artifact)}
    cut = split(case.train, case.held_out, seed=0, max_drop=LIMIT.max_drop)
    graph, refused = lower(module), dict[str, str]()
    for peer, make in (PLAIN if options.quick else PEERS).items():
        start, folder = time.monotonic(), place / peer.replace(" ", "-")
        folder.mkdir()
        try:
            make(Work(module=module, graph=graph, train=cut.train, select=cut.select, score=score, ends=start + seconds), folder)
            folders[peer] = folder
        except Exception as why:  # a peer may raise anything on a network that it does not know
            refused[peer] = f"{type(why).__name__}: {why}"[:200]
        took[peer] = time.monotonic() - start
    verdicts = _judged(base, score, case.held_out, folders)
    protocol = timing.Protocol(fewest=2, most=2, block_ms=10, blocks=2) if options.quick else timing.Protocol(fewest=8, most=12)
    runners = [timing.Contestant(folder=f) for f in folders.values()]
    timed = timing.race(runners, case.held_out.inputs, [options.batch], protocol=protocol)
    rows = []
    for at, peer in enumerate(folders):
        interval = timed.speedup(at, 0)[0].to_json()
        row = {"peer": peer, "ms": timed.latency(at)[0].p50_ms, "over": interval, **verdicts[peer], "seconds": took[peer]}
        rows.append(row | {"bytes": sum(f.stat().st_size for f in folders[peer].iterdir() if not f.name.startswith("plain-"))})
    return {"network": name, "recipe": report.chosen and report.chosen.words, "minutes": options.minutes, "rows": rows, "refused": refused}


def _judged(base: tuple[Any, ...], score: Any, held_out: View, folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """The drop of each result on the held-out data, in its own engine, with its upper bound and verdict."""
    target: Any = base[0] if held_out.labels is None else held_out.labels
    found = {}
    for name, folder in folders.items():
        with Runner(folder) as runner:
            outputs = runner.outputs(held_out.inputs)[: len(base)]  # the first is scored
        bound = prover.drop_bound(base, outputs, target, score=score, confidence=LIMIT.confidence, seed=0)
        found[name] = {
            "score": score.value(outputs, target),
            "drop": bound.value,
            "upper": bound.upper,
            "kept": bound.upper <= LIMIT.max_drop or prover.equal_outputs(base, outputs),
        }
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All networks."""
    if importlib.util.find_spec("nncf") is None:
        sys.exit("one of the peers is not installed: pip install 'hasten[peers]'")
    if options.quick:
        options.minutes = min(options.minutes, 0.4)
        short = reference_networks.REFERENCES[0]
        cases = {"small_cnn-mnist5k": lambda: _reference(replace(short, settings=replace(short.settings, epochs=1 / 8)))}
    else:
        cases = {name: make for name, make in CASES.items() if not options.only or name in options.only}
    sys.path.extend(options.packages)
    networks = machine.earlier("search_peers", "networks") if options.only and options.save else []
    for name, make in cases.items():
        with tempfile.TemporaryDirectory() as place:
            found = compare(name, make(), Path(place), options)
        networks = [n for n in networks if n["network"] != name] + [found]
        options.keep(_found(networks, options))
    return _found(networks, options)


def _found(networks: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    best = {n["network"]: min((r for r in n["rows"][1:] if r["kept"]), key=lambda r: r["ms"], default=None) for n in networks}
    over = {name: row["over"]["value"] for name, row in best.items() if row}
    mean = math.exp(sum(map(math.log, over.values())) / len(over)) if over else None
    slower = [name for name, row in best.items() if row and row["over"]["high"] < 1]
    told = {"over_best_kept_peer": over, "geometric_mean": mean, "slower": slower}
    return {"limit": LIMIT.max_drop, "batch": options.batch, "networks": networks, "summary": told}


def show(found: dict[str, Any]) -> None:
    """One table per network."""
    for network in found["networks"]:
        print(f"\n{network['network']}: {network['recipe']}")
        print(f"{'':26} {'ms':>8} {'kB':>8} {'score':>7} {'drop ≤':>8} {'kept':>5} {'s':>5}   hasten is … times as fast (95 %)")
        for row in network["rows"]:
            over = row["over"]
            figures = (
                f"{row['ms']:8.3f} {row['bytes'] / 1e3:8,.0f} {row['score']:7.4f} {row['upper']:8.4f} {'yes' if row['kept'] else 'no':>5}"
            )
            print(f"{row['peer']:26} {figures} {row['seconds']:5.0f}   {over['value']:.2f} ({over['low']:.2f}–{over['high']:.2f})")
        for peer, why in network["refused"].items():
            print(f"{peer:26} {why}")
    told = found["summary"]
    if told["geometric_mean"]:
        print(f"\n{told['geometric_mean']:.2f}× over the fastest kept peer (geometric mean); slower on {told['slower'] or 'none'}")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=list(CASES))
    parser.add_argument("--minutes", type=float, default=10.0, help="for hasten, and for each peer")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--packages", nargs="*", default=[], help="folders of packages with trained networks, see trained_networks.py")


if __name__ == "__main__":
    machine.run("search_peers", measure, show, _options)
