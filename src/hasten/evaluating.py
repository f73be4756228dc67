"""The score of a network on data, with what chance leaves open, and beside another network on the same examples."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hasten.applying import Columns
from hasten.core import folder
from hasten.core.child import Child
from hasten.core.data import Array, View
from hasten.core.errors import DataRefused, StorageError, UsageError
from hasten.core.network import Arrays
from hasten.core.recipe import Recipe
from hasten.core.runner import Runner
from hasten.core.score import Score
from hasten.distributed import parcels, shards
from hasten.load.source import Source
from hasten.measure import scores, statistics
from hasten.measure.calibration import calibration_error
from hasten.search.bench import check_alike, finite
from hasten.search.prover import drop_bound
from hasten.search.watch import Watch, Watcher, nobody
from hasten.search.workshop import Workshop

_OPENING_S = 600.0
_MAKING_S = 3600.0
_ROOM_BYTES = 12 << 30
_ARTIFACT = "artifact"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How the answers are got and judged.

    Args:
        columns: which labels, groups and score.
        batch: examples of a call, >= 1; the last call is filled up, so a network that is fixed to a size is asked with that size.
        confidence: of the intervals, in (0.5, 1).
        ray: address of a Ray cluster whose nodes share the examples; None for this machine alone.
        workers: in the cluster; None for one on each node.
        noise: if above 0, the score is taken again with Gaussian noise on every input of floats, of this share of its standard
            deviation over the examples, cut off where the examples end.
        seed: of the bootstrap and the noise.
    """

    columns: Columns = field(default_factory=Columns)
    batch: int = 64
    confidence: float = 0.95
    ray: str | None = None
    workers: int | None = None
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.noise < math.inf:
            raise UsageError(f"noise must be a finite share of at least 0, got {self.noise}")
        if self.batch < 1:
            raise UsageError(f"batch must be at least 1, got {self.batch}")
        if not 0.5 < self.confidence < 1:
            raise UsageError(f"confidence must be in (0.5, 1), got {self.confidence}")
        if self.workers is not None and (self.workers < 1 or self.ray is None):
            raise UsageError(f"workers are for a Ray cluster and at least 1, got {self.workers} and --ray {self.ray}")


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """The examples of one class: how many, and their score, `against` that of the other network."""

    name: str
    examples: int
    score: float
    against: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What a network scores on data.

    Args:
        network: what was evaluated; against: what it was held against, None for nothing.
        score_name, score: higher is better.
        low, high: where the score of the population lies that the examples were drawn from, at `confidence`, None for a score that
            is no mean over examples.
        examples: how many.
        seconds: of the answers of `network`, its start included.
        score_against: of the other network.
        drop: of the score from the other network to this one; drop_upper: the most it is, at `confidence`, one-sided.
        lost, won: examples that only the other one, or only this one has right; None but for a score of right and wrong.
        calibration, calibration_against: expected calibration error in [0, 1]: how far it is from being right as often as it is sure;
            None where the labels are no classes.
        noise, score_in_noise, score_in_noise_against: see `Asked`; None without.
        classes: where the labels are classes.
        notes: what must be said about the data.
    """

    network: str
    score_name: str
    score: float
    low: float | None
    high: float | None
    confidence: float
    examples: int
    seconds: float
    against: str | None = None
    score_against: float | None = None
    drop: float | None = None
    drop_upper: float | None = None
    lost: int | None = None
    won: int | None = None
    calibration: float | None = None
    calibration_against: float | None = None
    noise: float | None = None
    score_in_noise: float | None = None
    score_in_noise_against: float | None = None
    classes: tuple[ClassScore, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        sure = f"{self.confidence:.0%}"
        between = "" if self.low is None else f" ({sure}: {self.low:.4f} to {self.high:.4f})"
        lines = [self.network, f"{self.score_name} {self.score:.4f}{between} on {self.examples:,} examples in {self.seconds:.1f} s"]
        if self.against is not None:
            flips = "" if self.lost is None else f"; right only there {self.lost:,}, only here {self.won:,}"
            drop = f"a drop of {self.drop:.4f}, at most {self.drop_upper:.4f} ({sure})"
            lines.append(f"against {self.against}: {self.score_against:.4f}, {drop}{flips}")
        if self.calibration is not None:
            lines.append(f"calibration error {self.calibration:.4f}" + _beside(self.calibration_against))
        if self.score_in_noise is not None:
            lines.append(
                f"{self.score_name} with noise of {self.noise:g}: {self.score_in_noise:.4f}" + _beside(self.score_in_noise_against)
            )
        width = max((len(c.name) for c in self.classes), default=0)
        for c in self.classes:
            lines.append(f"  {c.name:{width}}  {c.examples:7,}  {c.score:.4f}" + _beside(c.against))
        return "\n".join([*lines, *self.notes])


def evaluate(network: Any, data: Any, *, against: Any = None, asked: Asked | None = None, watcher: Watcher = nobody) -> Evaluated:
    """Scores a network on data, and says how much of the score of another one it keeps there.

    Nothing is searched, changed or sealed: whoever chooses by these figures chooses by these examples.

    Args:
        network: a run folder or its artifact, whose own `load.py` is run; or a torch module, or where one lies, as for `optimize`: it
            runs as it is given.
        data: arrays, a Dataset or DataLoader, or a path (see `hasten.load.data.read`). Without labels it needs `against`, and the
            score is the agreement of the two.
        against: another network.
        asked: how.
        watcher: is told the progress.

    Raises:
        UsageError, DataRefused, ModelRefused, StorageError: see `hasten.core.errors`.
        BackendMissing: a package that the network runs in is not here, or no node of the cluster is like this machine.
    """
    asked, watch, names = asked or Asked(), Watch(watcher=watcher), [_said(network), _said(against)]
    with tempfile.TemporaryDirectory(prefix="hasten-") as name, contextlib.ExitStack() as stack:
        work = Path(name)
        starts = _hands(asked, stack)
        watch.stage("load", "reading the data")
        task = _read(work, data, asked.columns, network)
        view = View.load(work / "views" / "train")
        if view.labels is None and against is None:
            raise UsageError("without labels one network is held against another: give labels, or the other one with --against")
        noisy = _noisy(view, asked)
        answers, troubled, seconds = [], [], []
        for at, given in enumerate(g for g in (network, against) if g is not None):
            watch.stage("load", f"opening {names[at]}")
            package, fixed = _package(work / str(at), given, task, asked.columns.score, work)
            watch.stage("score", f"running {names[at]}")
            began = time.monotonic()
            batch = fixed or asked.batch
            answers.append(shards.outputs(starts(package, batch), view.inputs, batch=batch, progress=watch.progress))
            seconds.append(time.monotonic() - began)
            if noisy:
                watch.stage("noise", f"running {names[at]} on inputs with noise")
                troubled.append(shards.outputs(starts(package, batch), noisy, batch=batch, progress=watch.progress))
    found = _judged(answers, troubled, view, task, asked)
    return Evaluated(network=names[0], against=names[1] if against is not None else None, seconds=seconds[0], **found)


def _beside(value: float | None) -> str:
    return "" if value is None else f"  against {value:.4f}"


def _said(network: Any) -> str:
    return str(network) if isinstance(network, (str, Path, Source)) else type(network).__name__


Starts = Callable[[Path, int], Sequence[Callable[[], Runner]]]


def _hands(asked: Asked, stack: contextlib.ExitStack) -> Starts:
    """What starts the runners of a package: one here, or some in the cluster."""
    if asked.ray is None:
        return lambda package, batch: [lambda: Runner(package, fixed_batch=batch)]
    from hasten.distributed.ray import Cluster

    cluster = stack.enter_context(Cluster(asked.ray))
    nodes = cluster.nodes()
    if not nodes:
        raise UsageError("the Ray cluster must have a node with a processor, got none")
    workers = asked.workers or len(nodes)
    threads = max(min(nodes) // -(-workers // len(nodes)), 1)

    def starts(package: Path, batch: int) -> list[Callable[[], Runner]]:
        parcel = parcels.read(place=str(package))

        def start() -> Runner:
            child = cluster.start(threads=threads)
            place = f"{child.place}/package"
            child.call("hasten.distributed.parcels:write", *parcel.arrays, place=place, names=parcel.value)
            return Runner(Path(place), fixed_batch=batch, child=child)

        return [start] * workers

    return starts


def _read(work: Path, data: Any, columns: Columns, network: Any) -> dict[str, Any]:
    """Reads the data into the one view of the work folder; names of classes get the numbers that they have in an artifact's report."""
    from hasten import prepare
    from hasten.load.data import read

    classes = _classes(network)
    if not isinstance(data, (str, Path)):
        return prepare.take_whole(work, read(data, target=columns.target, group=columns.group, classes=tuple(classes) or None))
    if not Path(data).exists():
        raise UsageError(f"no such file: {data}")
    words = {"data": str(data), "target": columns.target, "group": columns.group, "classes": classes}
    with Child(memory_bytes=_ROOM_BYTES) as child:
        task: dict[str, Any] = prepare.call(
            child, "hasten.prepare:read_whole", data, refusal=DataRefused, run=str(work), deadline_s=_OPENING_S, **words
        ).value
    return task


def _classes(network: Any) -> list[str]:
    place = _packed(network)
    file = place / "report.json" if place else None
    if file is None or not file.exists():
        return []
    names = [str(c["name"]) for c in json.loads(file.read_text()).get("classes") or []]
    return [] if all(n.isdigit() for n in names) else names


def _packed(network: Any) -> Path | None:
    """The folder that an engine packed, where that is what was given."""
    if not isinstance(network, (str, Path, Source)):
        return None
    path = Path(Source.of(network).path)
    return next((place for place in (path, path / _ARTIFACT) if (place / "load.py").is_file()), None)


def _package(work: Path, network: Any, task: dict[str, Any], score: str | None, views: Path) -> tuple[Path, int | None]:
    """A packed folder, and the one batch size that it takes where that is known."""
    from hasten import presets, verbs

    if place := _packed(network):
        if not folder.intact(place):
            raise StorageError(f"{place} is not what its manifest says: a file was changed or is missing")
        return place, None
    given = Source.of(network) if isinstance(network, (str, Path, Source)) else network
    if isinstance(given, Source) and not Path(given.path).exists():
        raise UsageError(f"no such file: {given.path}")
    if not isinstance(given, Source):
        verbs.check_module(given)
    work.mkdir()
    (work / "views").symlink_to(views / "views")
    with Child(memory_bytes=_ROOM_BYTES) as child:
        opened = verbs.open_network(child, work, given, task, score)
    shop = Workshop(work, loss=task["loss"], seed=0, deadline_s=_MAKING_S)
    try:
        shop.make(Recipe((), presets.default(opened["kind"], imported=opened["imported"]).as_given), work / "package")
    finally:
        shop.close()
    return work / "package", opened["fixed_batch"]


def _noisy(view: View, asked: Asked) -> Arrays:
    """The inputs with noise, none beyond the least and the largest value that there is; nothing without."""
    if not asked.noise:
        return ()
    draw = np.random.default_rng(asked.seed)

    def noisy(a: Array) -> Array:
        if a.dtype.kind != "f":
            return a
        found = a + asked.noise * a.std(dtype=np.float64) * draw.standard_normal(a.shape)
        return np.asarray(found.clip(a.min(), a.max()), a.dtype)

    return tuple(noisy(np.asarray(a)) for a in view.inputs)


def _judged(answers: list[Arrays], troubled: list[Arrays], view: View, task: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """The fields of `Evaluated` that come from outputs."""
    outputs, reference = answers[0], answers[-1]
    check_alike(reference, outputs)
    score = scores.choose(view.labels, reference, name=asked.columns.score)
    if score.target == "original" and len(answers) == 1:
        raise UsageError(f"the score {score.name} holds one network against another: give the other one with --against")
    _check_classes(task["classes"], outputs)
    target = view.labels if score.target == "labels" else reference[0]
    assert target is not None
    low, high = _interval(score.per_example(outputs, target), score, asked)
    found: dict[str, Any] = {"score_name": score.name, "score": finite(score.value(outputs, target)), "low": low, "high": high}
    if len(answers) == 2:
        bound = drop_bound(reference, outputs, target, score=score, confidence=asked.confidence, seed=asked.seed)
        found |= {"score_against": score.value(reference, target), "drop": bound.value, "drop_upper": bound.upper}
        found |= {"lost": bound.lost, "won": bound.won}
    found |= _named("calibration", [_calibration(a[0], view.labels) for a in answers])
    if troubled:
        found |= {"noise": asked.noise, **_named("score_in_noise", [score.value(a, target) for a in troubled])}
    classes = tuple(_by_class(score, answers, target, view.labels, task["classes"]))
    return {**found, "confidence": asked.confidence, "examples": len(view), "classes": classes, "notes": tuple(task["notes"])}


def _named(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_against"), values, strict=False))


def _calibration(outputs: Array, labels: Array | None) -> float | None:
    """None where there are no classes with a score each."""
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu" or outputs.ndim != 2 or outputs.shape[1] <= max(labels.max(), 1):
        return None
    return calibration_error(scores.shares_of_classes(outputs), labels)


def _check_classes(names: Sequence[str], outputs: Arrays) -> None:
    if names and outputs[0].ndim == 2 and outputs[0].shape[1] != len(names):
        raise DataRefused(
            f"the labels name {len(names)} classes and the network has {outputs[0].shape[1]}: which number a name has cannot be told; "
            "give the labels as numbers"
        )


def _interval(values: Array | None, score: Score, asked: Asked) -> tuple[float | None, float | None]:
    """Two-sided: Clopper and Pearson's for right and wrong, else from the bootstrap of the mean."""
    if values is None or len(values) < 2:
        return None, None
    each = (1 + asked.confidence) / 2
    if score.zero_one:
        right = int(values.sum())
        wrong = len(values) - right
        upper = [statistics.clopper_pearson_upper(k, len(values), confidence=each) for k in (wrong, right)]
        return 1 - upper[0], upper[1]
    none = np.zeros_like(values)
    seed = {"confidence": each, "seed": asked.seed}
    return -statistics.bca_upper(none, values, **seed), statistics.bca_upper(values, none, **seed)  # type: ignore[arg-type]


def _by_class(score: Score, answers: list[Arrays], target: Array, labels: Array | None, names: Sequence[str]) -> Iterator[ClassScore]:
    values = [score.per_example(outputs, target) for outputs in answers]
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu" or any(v is None for v in values):
        return
    for label in np.unique(labels):
        means = [float(v[labels == label].mean()) for v in values if v is not None]
        name = names[label] if label < len(names) else str(label)
        yield ClassScore(name=name, examples=int((labels == label).sum()), score=means[0], against=means[1] if len(means) == 2 else None)
