"""hasten against what one would do by hand, on the same networks, all timed in one run.

    python benchmarks/peers.py [--quick] [--json] [--save] [--only NAME]

For each trained reference network: hasten.optimize (limit 1 point, for batch 1 and for batch 32), and six peers with their
usual settings: eager PyTorch, torch.compile with freezing, ONNX Runtime fp32, ONNX Runtime static int8 (its own quantizer),
OpenVINO fp32, OpenVINO int8 by NNCF. Then all are raced in the same rounds of fresh launches. The accuracy of each is that on
held-out data. `--quick` takes one small network and two rounds. `--only` with `--save` keeps what the result holds for the
other networks from the same machine and versions.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import onnx
import reference_networks

import hasten
from hasten.core.data import View
from hasten.core.network import Network
from hasten.core.runner import Runner
from hasten.engines import Eager, OnnxRuntime, OpenVINO, TorchCompile
from hasten.load import files
from hasten.load.lower import lower
from hasten.measure import timing
from hasten.measure.machine import has_int8_dot

BATCHES = (1, 32)
CALIBRATE = 300
Pack = Callable[[Network, Network, View, Path], None]


def ort_int8(module: Network, graph: Network, train: View, folder: Path) -> None:
    """onnxruntime's static quantizer: Q/DQ, per channel, reduced range where the CPU has no 8-bit dot product."""
    del module
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            batches = train.take(slice(0, CALIBRATE)).batches(50)
            names = [i.name for i in graph.graph.graph.input]
            self.rows = iter([dict(zip(names, b.inputs, strict=True)) for b in batches])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    source = folder / "source.onnx"
    onnx.save(graph.graph, source)
    quant_pre_process(str(source), str(source), skip_symbolic_shape=True)
    quantize_static(
        str(source),
        str(folder / "model.onnx"),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=not has_int8_dot(),
    )
    made = onnx.load(folder / "model.onnx")
    source.unlink()
    OnnxRuntime().pack(graph.with_body(made), folder)


def openvino_int8(module: Network, graph: Network, train: View, folder: Path) -> None:
    """NNCF's post-training quantization of the OpenVINO model."""
    del module
    import nncf
    import openvino

    OpenVINO().pack(graph, folder)
    model = openvino.Core().read_model(folder / "model.xml")
    rows = [b.inputs for b in train.take(slice(0, CALIBRATE)).batches(1)]
    made = nncf.quantize(model, nncf.Dataset([row if len(row) > 1 else row[0] for row in rows]), subset_size=CALIBRATE)
    for name in ("model.xml", "model.bin"):
        (folder / name).unlink()
    openvino.save_model(made, folder / "model.xml", compress_to_fp16=False)


PEERS: dict[str, Pack] = {
    "eager": lambda module, graph, train, folder: Eager().pack(module, folder),
    "torch.compile": lambda module, graph, train, folder: TorchCompile().pack(module, folder),
    "ORT fp32": lambda module, graph, train, folder: OnnxRuntime().pack(graph, folder),
    "ORT int8": ort_int8,
    "OpenVINO fp32": lambda module, graph, train, folder: OpenVINO().pack(graph, folder),
    "OpenVINO int8": openvino_int8,
}


def accuracy(folder: Path, view: View) -> float:
    """On held-out data, in the engine itself."""
    with Runner(folder) as runner:
        outputs = runner.outputs(view.inputs)[0]
    return float((outputs.argmax(1) == view.labels).mean())


def compare(wanted: reference_networks.Reference, work: Path, protocol: timing.Protocol) -> dict[str, Any]:
    """One network: hasten for each batch size, the peers, and the race among all."""
    trained, data, _ = reference_networks.reference(wanted)
    folders, found = {}, {}
    for batch in BATCHES:
        start = time.perf_counter()
        report = hasten.optimize(trained, data.train, data.held_out, run=work / f"hasten {batch}", options=hasten.Options(batch=batch))
        assert report.chosen
        assert report.artifact
        folders[f"hasten, batch {batch}"] = Path(report.artifact)
        drop = {"value": report.chosen.score_drop.value, "upper": report.chosen.score_drop.upper}
        found[batch] = {"verdict": report.verdict, "words": report.chosen.words, "drop": drop, "sentence": report.sentence}
        found[batch] |= {"seconds": time.perf_counter() - start, "trials": len(report.trials)}
        print(f"{wanted.name}, batch {batch}: {report.sentence}", file=sys.stderr, flush=True)
    module = files.from_module(trained, (data.train.inputs[0][:4],))
    graph = lower(module)
    for name, pack in PEERS.items():
        folders[name] = work / name.replace(" ", "-")
        folders[name].mkdir()
        pack(module, graph, data.train, folders[name])
    scores = {name: accuracy(folder, data.held_out) for name, folder in folders.items()}
    contestants = [timing.Contestant(folder=folder) for folder in folders.values()]
    timed = timing.race(contestants, data.held_out.inputs, BATCHES, protocol=protocol)
    names = list(folders)
    rows = []
    for at, batch in enumerate(BATCHES):
        ours = names.index(f"hasten, batch {batch}")
        for name in PEERS:
            theirs = names.index(name)
            interval = timed.speedup(theirs, ours)[at]
            size = sum(f.stat().st_size for f in folders[name].iterdir())
            rows.append(
                {
                    "peer": name,
                    **interval.to_json(),
                    "peer_ms": float(np.median(timed.medians_ms[:, theirs, at])),
                    "hasten_ms": float(np.median(timed.medians_ms[:, ours, at])),
                    "peer_accuracy": scores[name],
                    "peer_bytes": size,
                }
            )
    ours_accuracy = {batch: scores[f"hasten, batch {batch}"] for batch in BATCHES}
    return {"network": wanted.name, "hasten": found, "accuracy": ours_accuracy, "rows": rows}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all reference networks."""
    if importlib.util.find_spec("nncf") is None:
        sys.exit("one of the peers is not installed: pip install 'hasten[peers]'")
    wanted = [r for r in reference_networks.REFERENCES if not options.only or r.name in options.only]
    protocol = timing.Protocol(fewest=5, most=8, longest_s=120)
    if options.quick:
        wanted = [replace(r, settings=replace(r.settings, epochs=1)) for r in wanted if r.name == "mlp-mnist5k"]
        protocol = timing.Protocol(fewest=2, most=2, block_ms=10, blocks=2)
    timing.FULL = replace(timing.FULL, longest_s=30)  # of hasten's own figures: the race below times all of them again
    networks = {n["network"]: n for n in machine.earlier("peers", "networks")} if options.only else {}
    with tempfile.TemporaryDirectory() as name:
        for reference in wanted:
            work = Path(name) / reference.name
            work.mkdir()
            networks[reference.name] = compare(reference, work, protocol)
            options.keep(_found(networks))
    return _found(networks)


def _found(networks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    ordered = [networks[r.name] for r in reference_networks.REFERENCES if r.name in networks]
    return {"limit": 0.01, "networks": ordered, "summary": summarize(ordered)}


def summarize(networks: list[dict[str, Any]]) -> dict[str, Any]:
    """For each batch size: the speed-up over the fastest peer, its geometric mean, and where hasten is slower."""
    told: dict[str, Any] = {}
    for batch in BATCHES:
        best = [min((r for r in n["rows"] if r["batch"] == batch), key=lambda r: r["peer_ms"]) for n in networks]
        ratios = [row["value"] for row in best]
        told[str(batch)] = {
            "over_best_peer": {n["network"]: row["value"] for n, row in zip(networks, best, strict=True)},
            "geometric_mean": math.exp(sum(map(math.log, ratios)) / len(ratios)),
            "slower": [n["network"] for n, row in zip(networks, best, strict=True) if row["high"] < 1],
        }
    return told


def show(found: dict[str, Any]) -> None:
    """Prints one table per network."""
    for network in found["networks"]:
        for batch in BATCHES:
            ours = network["hasten"][batch if batch in network["hasten"] else str(batch)]
            print(f"\n{network['network']}, batch {batch}: {ours['verdict']}, {ours['words']}, {ours['seconds']:.0f} s")
            print(f"{'peer':16} {'ms':>8} {'accuracy':>9}   hasten is … times as fast (95 %)")
            for row in (r for r in network["rows"] if r["batch"] == batch):
                interval = f"{row['value']:.2f} ({row['low']:.2f}–{row['high']:.2f}, {row['launches']} launches)"
                print(f"{row['peer']:16} {row['peer_ms']:8.3f} {row['peer_accuracy']:9.4f}   {interval}")
    for batch, told in found["summary"].items():
        print(
            f"\nbatch {batch}: {told['geometric_mean']:.2f}× over the fastest peer (geometric mean); slower on {told['slower'] or 'none'}"
        )


if __name__ == "__main__":
    names = [r.name for r in reference_networks.REFERENCES]
    machine.run("peers", measure, show, lambda parser: parser.add_argument("--only", action="append", choices=names))
