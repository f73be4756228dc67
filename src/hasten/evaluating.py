"""The score of a network on data, with what chance leaves open, and beside another network on the same examples."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten import judging
from hasten.applying import Columns
from hasten.core import folder
from hasten.core.child import Child
from hasten.core.data import View
from hasten.core.errors import ChildRaised, DataRefused, StorageError, UsageError
from hasten.core.recipe import Recipe
from hasten.core.runner import Runner
from hasten.distributed import parcels, shards
from hasten.judging import Asked, Evaluated
from hasten.load.source import Source
from hasten.search.watch import Watch, Watcher, nobody
from hasten.search.workshop import Workshop

_OPENING_S = 600.0
_MAKING_S = 3600.0
_ROOM_BYTES = 12 << 30
_ARTIFACT = "artifact"


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
        given = [g if (packed := _packed(g)) is None else packed for g in (network, against) if g is not None]
        task = _read(work, data, asked.columns, _recorded(given, "class_names"), _recorded(given, "input_names"))
        view = View.load(work / "views" / "train")
        judging.early(view, asked, alone=against is None)
        noisy = judging.noisy(view, asked)
        answers, troubled, seconds = [], [], []
        for at, one in enumerate(given):
            watch.stage("load", f"opening {names[at]}")
            package, fixed = (
                (one.place, one.fixed_batch) if isinstance(one, _Packed) else _package(work, at, one, task, asked.columns.score)
            )
            watch.stage("score", f"running {names[at]}")
            began = time.monotonic()
            batch = fixed or asked.batch
            try:
                answers.append(shards.outputs(starts(package, batch), view.inputs, batch=batch, progress=watch.progress))
            except ChildRaised as why:
                raise DataRefused(f"{names[at]} fails on some of the examples: {why}; is every value one that it takes?") from why
            seconds.append(time.monotonic() - began)
            if noisy:
                watch.stage("noise", f"running {names[at]} on inputs with noise")
                troubled.append(shards.outputs(starts(package, batch), noisy, batch=batch, progress=watch.progress))
    found = judging.judged(answers, troubled, view, task, asked)
    return Evaluated(network=names[0], against=names[1] if against is not None else None, seconds=seconds[0], **found)


def _said(network: Any) -> str:
    return str(network) if isinstance(network, (str, Path, Source)) else type(network).__name__


Starts = Callable[[Path, int], Sequence[Callable[[], Runner]]]


def _hands(asked: Asked, stack: contextlib.ExitStack) -> Starts:
    """What starts the runners of a package: one here, or some in the cluster."""
    if asked.ray is None:
        return lambda package, batch: [lambda: Runner(package, fixed_batch=batch)]
    from hasten.distributed.ray import Cluster

    cluster = stack.enter_context(Cluster(asked.ray))
    workers, threads = cluster.divided(asked.workers)

    def starts(package: Path, batch: int) -> list[Callable[[], Runner]]:
        parcel = parcels.read(place=str(package))

        def start() -> Runner:
            child = cluster.start(threads=threads)
            place = f"{child.place}/package"
            try:
                child.call("hasten.distributed.parcels:write", *parcel.arrays, place=place, names=parcel.value, deadline_s=_OPENING_S)
            except BaseException:
                child.close()
                raise
            return Runner(Path(place), fixed_batch=batch, child=child)

        return [start] * workers

    return starts


def _read(work: Path, data: Any, columns: Columns, classes: list[str], inputs: list[str]) -> dict[str, Any]:
    """Reads the data into the one view of the work folder; names of classes and inputs get their places in these, where there are some."""
    from hasten import prepare

    words: dict[str, Any] = {"run": str(work), "target": columns.target, "group": columns.group, "classes": classes, "inputs": inputs}
    if not isinstance(data, (str, Path)):
        return prepare.read_whole(data=data, **words)
    if not Path(data).exists():
        raise UsageError(f"no such file: {data}")
    with Child(memory_bytes=_ROOM_BYTES) as child:
        here = {"data": str(data), "deadline_s": _OPENING_S}
        task: dict[str, Any] = prepare.call(child, "hasten.prepare:read_file", data, refusal=DataRefused, **here, **words).value
    return task


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """A folder that an engine packed, and what its record says."""

    place: Path
    record: dict[str, Any]

    @property
    def fixed_batch(self) -> int | None:
        """The one batch size that the network takes, as far as it is known."""
        return self.record.get("fixed_batch")


def _packed(network: Any) -> _Packed | None:
    """What is packed already, where that is what was given.

    Raises:
        StorageError: if a file in it is not what its manifest says.
        UsageError: on the folder of a search or a training that has no result to run.
    """
    if not isinstance(network, (str, Path, Source)):
        return None
    path = Path(Source.of(network).path)
    place = next((place for place in (path, path / _ARTIFACT) if (place / "load.py").is_file()), None)
    if not place and (path / "run.sqlite").exists():
        raise UsageError(f"{path} is the folder of a search without a result yet; `hasten report {path}` says where it stands")
    if not place and (path / "model.pt2").exists():
        raise UsageError(f"{path} holds a trained network: give {path / 'model.pt2'}")
    if not place:
        return None
    if not folder.intact(place):
        raise StorageError(f"{place} is not what its manifest says: a file was changed or is missing")
    records = (place / name for name in ("report.json", "applied.json"))
    return _Packed(place=place, record=next((json.loads(file.read_text()) for file in records if file.exists()), {}))


def _recorded(networks: Sequence[Any], what: str) -> list[str]:
    """Names in their order from the first report of an artifact that tells them."""
    found = ([str(name) for name in n.record.get(what) or ()] for n in networks if isinstance(n, _Packed))
    return next(filter(None, found), [])


def _package(work: Path, at: int, network: Any, task: dict[str, Any], score: str | None) -> tuple[Path, int | None]:
    """The network as it is given, packed, and the one batch size that it takes. Adds what it is noted for to `task`."""
    from hasten import presets, verbs

    given = Source.of(network) if isinstance(network, (str, Path, Source)) else network
    if isinstance(given, Source) and not Path(given.path).exists():
        raise UsageError(f"no such file: {given.path}")
    if not isinstance(given, Source):
        verbs.check_module(given)
    place = work / str(at)
    place.mkdir()
    (place / "views").symlink_to(work / "views")
    with Child(memory_bytes=_ROOM_BYTES) as child:
        opened = verbs.open_network(child, place, given, task, score)
    task["notes"] += [f"{_said(network)}: {note}" for note in opened["network_notes"]]
    shop = Workshop(place, loss=task["loss"], seed=0, deadline_s=_MAKING_S)
    try:
        shop.make(Recipe((), presets.default(opened["kind"], imported=opened["imported"]).as_given), place / "package")
    finally:
        shop.close()
    return place / "package", opened["fixed_batch"]
