"""Our placement of Q/DQ pairs against the quantizer that each engine's makers ship: speed, accuracy and size, side by side.

    python benchmarks/placement.py [--quick] [--json] [--save]

Our file in ONNX Runtime against `onnxruntime.quantization.quantize_static`, our file in OpenVINO against `nncf.quantize` on
OpenVINO's own model; minmax ranges from the same images, one thread. Each launch opens both anew and times blocks of calls in
ABBA order; a speed ratio is theirs ÷ ours (above 1: ours is faster), the median over the launches, with the lowest and highest.
Accuracy is held against labels, `agreement` is the share of unseen images with the float network's answer; networks without
training have `error` alone, the root mean squared difference of the outputs relative to the float network's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from machine import run
from torch import Tensor, nn

from hasten import tasks
from hasten.compress import FoldBatchNorm, QuantizeStatic
from hasten.core.data import View
from hasten.core.network import Network
from hasten.core.recipe import Context, Profile
from hasten.load.lower import lower
from hasten.measure import machine
from hasten.tasks import networks
from hasten.train import Fit, fit

TARGET = 0.97
Runner = Callable[[np.ndarray], np.ndarray]

_BITS = 8 if machine.has_int8_dot() else 7
_MOVES = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split"})
_COMMON = frozenset({"Conv", "Gemm", "MatMul", "Add", "GlobalAveragePool", "AveragePool"})
ONNXRUNTIME = Profile(integer_ops=_COMMON | {"Concat"}, passing_ops=_MOVES, weight_bits=_BITS)
OPENVINO = Profile(integer_ops=_COMMON | {"ConvTranspose"}, passing_ops=_MOVES | {"Concat"}, weight_bits=_BITS, symmetric_activations=True)


class Inverted(nn.Module):
    """An inverted residual block with a depthwise convolution (Sandler et al., 2018, arXiv 1801.04381)."""

    def __init__(self, before: int, after: int, stride: int, widen: int) -> None:
        super().__init__()
        wide = before * widen
        self.body = nn.Sequential(
            *_conv(before, wide, 1), nn.ReLU6(), *_conv(wide, wide, 3, stride, wide), nn.ReLU6(), *_conv(wide, after, 1)
        )
        self.short = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.short else y


class Block(nn.Module):
    """A transformer's encoder layer, written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Any:  # (batch, tokens, width)
        n, tokens, width = x.shape
        q, k, v = (f(x).view(n, tokens, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        shares = torch.softmax(q @ k.transpose(-1, -2) / (width / self.heads) ** 0.5, dim=-1)
        x = self.first(x + self.out((shares @ v).transpose(1, 2).reshape(n, tokens, width)))
        return self.second(x + self.feed(x))


class Tokens(nn.Module):
    """Encoder layers between an embedding of image rows and a classifier."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embed, self.last = nn.Linear(28, width), nn.Linear(width, 10)
        self.body = nn.Sequential(*(Block(width, heads) for _ in range(layers)))

    def forward(self, x: Tensor) -> Any:  # (batch, 1, 28, 28)
        return self.last(self.body(self.embed(x.flatten(1, 2))).mean(1))


def _conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(after)


def _mobile(first: int, plan: tuple[tuple[int, int, int, int], ...], last: int) -> nn.Module:
    """A MobileNetV2: (widening, channels, blocks, stride) per stage."""
    layers: list[nn.Module] = [*_conv(1, first, 3, 2 if last > 500 else 1), nn.ReLU6()]
    width = first
    for widen, channels, blocks, stride in plan:
        layers += [Inverted(channels if i else width, channels, 1 if i else stride, widen) for i in range(blocks)]
        width = channels
    return nn.Sequential(*layers, *_conv(width, last, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))


_SMALL = ((4, 24, 2, 2), (4, 32, 2, 2), (4, 64, 2, 1))
_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network. `passes` over the training images, 0 for random weights; `side` of the images in pixels."""

    name: str
    build: Callable[[], nn.Module]
    passes: float = 0
    side: int = 28
    batches: tuple[int, ...] = (1, 16)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much of everything: images to calibrate and to compare on, launches, and seconds of timing in each."""

    calibrate: int
    unseen: int
    launches: int
    seconds: float


CASES = (
    Case(name="small CNN", build=networks.small_cnn, passes=4),
    Case(name="ResNet-20", build=networks.resnet20, passes=2),
    Case(name="MobileNet, small", build=lambda: _mobile(16, _SMALL, 128), passes=4),
    Case(name="MLP", build=networks.mlp, passes=8),
    Case(name="MobileNetV2", build=lambda: _mobile(32, _V2, 1280), side=224, batches=(1,)),
    Case(name="BERT-base layers × 2", build=lambda: Tokens(768, 12, 2)),
)
QUICK = (replace(CASES[0], passes=1), replace(CASES[1], passes=0), replace(CASES[2], passes=0))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Quantizes each network four ways and times them, two and two."""
    torch.set_num_threads(1)
    quick, full = Effort(calibrate=32, unseen=500, launches=3, seconds=0.2), Effort(calibrate=128, unseen=2000, launches=9, seconds=1.0)
    rows = []
    for case in QUICK if options.quick else CASES:
        print(f"{case.name} …", file=sys.stderr)
        rows += _compare(case, quick if options.quick else full)
    return {"target": TARGET, "networks": rows}


def _compare(case: Case, effort: Effort) -> list[dict[str, Any]]:
    graph, calibrate, unseen = _prepared(case, effort)
    rows = []
    with tempfile.TemporaryDirectory() as folder, _quiet():
        files = _files(graph, calibrate, Path(folder))
        float_answers = _answers(_onnxruntime(files["float"]), unseen)
        for engine, start in (("ONNX Runtime", _onnxruntime), ("OpenVINO", _openvino)):
            held = {"ours": files[f"{engine}, ours"], "theirs": files[f"{engine}, theirs"], "float": files["float"]}
            row: dict[str, Any] = {"network": case.name, "engine": engine, "bytes": {who: _bytes(f) for who, f in held.items()}}
            for who in ("ours", "theirs"):
                row[who] = _quality(_answers(start(held[who]), unseen), float_answers, unseen.labels if case.passes else None)
            row["speed"] = {str(size): _race(start, held, unseen.inputs[0][:size], effort) for size in case.batches}
            rows.append(row)
    return rows


def _prepared(case: Case, effort: Effort) -> tuple[Network, View, View]:
    """The network as a float graph, the images to calibrate on and those to compare on."""
    data = tasks.load("mnist5k")
    calibrate = _sized(data.train.take(slice(0, effort.calibrate)), case.side)
    unseen = _sized(data.held_out.take(slice(0, effort.unseen if case.passes else 32)), case.side)
    torch.manual_seed(0)
    module = case.build()
    if case.passes:
        module = fit(module, data.train, settings=Fit(epochs=case.passes, batch=64, learning_rate=0.01)).module
    else:
        with torch.no_grad():
            module.train()(torch.from_numpy(np.array(calibrate.inputs[0])))  # statistics for its norms
    network = Network(kind="module", body=module.eval(), example=(calibrate.inputs[0][:4],))
    if any(isinstance(m, nn.BatchNorm2d) for m in module.modules()):
        network = FoldBatchNorm().apply(network, Context(train=calibrate, calibrate=calibrate))
    return lower(network), calibrate, unseen


def _sized(view: View, side: int) -> View:
    images = torch.from_numpy(np.array(view.inputs[0]))
    if side != images.shape[-1]:
        images = nn.functional.interpolate(images, size=side, mode="bilinear")
    return View(inputs=(images.numpy(),), labels=view.labels)


def _files(graph: Network, calibrate: View, folder: Path) -> dict[str, Path]:
    """The float graph and its four quantized forms on disk."""
    import nncf
    import openvino
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    files = {"float": folder / "float.onnx"}
    model = onnx.ModelProto()
    model.CopyFrom(graph.graph)
    del model.graph.value_info[:]
    onnx.save(model, files["float"])
    for engine, profile in (("ONNX Runtime", ONNXRUNTIME), ("OpenVINO", OPENVINO)):
        ours = QuantizeStatic().apply(graph, Context(train=calibrate, calibrate=calibrate, profile=profile))
        files[f"{engine}, ours"] = folder / f"{engine} ours.onnx"
        onnx.save(ours.graph, files[f"{engine}, ours"])
    batches = iter([{model.graph.input[0].name: b.inputs[0]} for b in calibrate.batches(8)])

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(batches, None)

    theirs = files["ONNX Runtime, theirs"] = folder / "onnxruntime.onnx"
    quantize_static(
        files["float"], theirs, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=_BITS == 7,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    examples = nncf.Dataset([example[None] for example in calibrate.inputs[0]])
    theirs = files["OpenVINO, theirs"] = folder / "nncf.xml"
    openvino.save_model(nncf.quantize(openvino.Core().read_model(files["float"]), examples, subset_size=len(calibrate)), theirs)
    return files


def _onnxruntime(file: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def _openvino(file: Path) -> Runner:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()
    return lambda x: request.infer([x], share_inputs=True)[0].copy()


def _answers(runner: Runner, view: View) -> np.ndarray:
    return np.concatenate([runner(b.inputs[0]) for b in view.batches(50)])


def _quality(new: np.ndarray, old: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
    found = {"error": float(np.sqrt(((new - old) ** 2).mean() / (old**2).mean()))}
    if labels is not None:
        found["accuracy"] = float((new.argmax(1) == labels).mean())
        found["float_accuracy"] = float((old.argmax(1) == labels).mean())
        found["agreement"] = float((new.argmax(1) == old.argmax(1)).mean())
    return found


def _race(start: Callable[[Path], Runner], files: dict[str, Path], x: np.ndarray, effort: Effort) -> dict[str, Any]:
    """Medians in ms of one call, and the ratios of the launches."""
    medians = []
    for launch in range(effort.launches):
        order = list(files) if launch % 2 else list(reversed(files))
        times = _blocks({who: start(files[who]) for who in order}, x, effort.seconds)
        medians.append({who: statistics.median(times[who]) for who in files})
    ratios = [m["theirs"] / m["ours"] for m in medians]
    found = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "launches": effort.launches}
    return found | {f"{who}_ms": statistics.median(m[who] for m in medians) for who in files}


def _blocks(runners: dict[str, Runner], x: np.ndarray, seconds: float) -> dict[str, list[float]]:
    """Times per call in ms; blocks of calls in turn, forwards and backwards."""
    times: dict[str, list[float]] = {who: [] for who in runners}
    for runner in runners.values():
        for _ in range(5):
            runner(x)
    once = max(_timed(runner, x, 3) for runner in runners.values())
    calls = max(1, int(3.0 / once))  # a block takes about 3 ms
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 6:
        for who in (*runners, *reversed(runners)):
            times[who].append(_timed(runners[who], x, calls))
    return times


def _timed(runner: Runner, x: np.ndarray, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        runner(x)
    return (time.perf_counter() - begin) / calls * 1e3


def _bytes(file: Path) -> int:
    return sum(f.stat().st_size for f in (file, file.with_suffix(".bin")) if f.exists())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and notices of the other quantizers."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def show(found: dict[str, Any]) -> None:
    """One line for each network, engine and batch size."""
    print("network               engine        batch  theirs ÷ ours       low–high  ours ms  theirs  float    kB: ours  theirs  float")
    for row in found["networks"]:
        sizes = "  ".join(f"{row['bytes'][who] / 1e3:6.0f}" for who in ("ours", "theirs", "float"))
        for batch, s in row["speed"].items():
            mark = "" if s["ratio"] >= found["target"] else f"  below {found['target']}"
            print(
                f"{row['network']:21} {row['engine']:13} {batch:>5}  {s['ratio']:13.3f}  {s['low']:6.3f}–{s['high']:6.3f}  "
                f"{s['ours_ms']:7.3f} {s['theirs_ms']:7.3f} {s['float_ms']:6.3f}      {sizes}{mark}"
            )
    print("\nnetwork               engine         error: ours  theirs   agreement: ours  theirs   accuracy: ours  theirs   float")
    for row in found["networks"]:
        line = f"{row['network']:21} {row['engine']:13} {row['ours']['error']:12.4f}  {row['theirs']['error']:.4f}"
        if "accuracy" in row["ours"]:
            shown = [row[who][what] for what in ("agreement", "accuracy") for who in ("ours", "theirs")]
            line += f"   {shown[0]:15.4f}  {shown[1]:.4f}   {shown[2]:14.4f}  {shown[3]:.4f}  {row['ours']['float_accuracy']:.4f}"
        print(line)


if __name__ == "__main__":
    run("placement", measure, show)
