"""A made-up search that takes a fraction of a second: everything of a run is real but the network, the methods and the clock.

The network has no layers, only levels: an example is a row of numbers drawn uniformly from [0, 1), and each column that lies below
its level turns the answer round. A step raises the level of a column of its own, so its true cost is known exactly. Times come
from the recipe. Child processes are functions in this process.
Shapes: inputs (n, COLUMNS), labels (n,), outputs (n, 2).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import runpy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch

from hasten import verbs
from hasten.core import folder
from hasten.core.child import Reply
from hasten.core.data import Sealed, View, Views
from hasten.core.network import Arrays, Network
from hasten.core.recipe import Aim, Context, Profile, Recipe, Space, Stage
from hasten.core.report import Latency, Limit, Report
from hasten.core.store import Store
from hasten.load import saved
from hasten.measure import timing
from hasten.measure.scores import Accuracy
from hasten.search import bench, finals, workshop
from hasten.search.catalogue import Catalogue, Settings
from hasten.search.run import Job, optimize
from hasten.search.watch import Watch, Watcher, nobody

COLUMNS = 64
RIGHT = 0.9  # of the examples before any step


class Levels(torch.nn.Module):
    """The network."""

    def __init__(self) -> None:
        super().__init__()
        self.level = torch.nn.Parameter(torch.zeros(COLUMNS), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wrong = (x < self.level).any(1, keepdim=True)
        return torch.cat([~wrong, wrong], 1).float()


class _Step:
    """What the made-up steps have in common: they raise one level, which depends on the settings and the seed alone."""

    takes: ClassVar[Any] = "module"
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = False

    def apply(self, network: Network, context: Context) -> Network:
        column, cost = planted(self)
        noise = torch.rand((), generator=torch.Generator().manual_seed(context.seed + column)).item()
        made = Levels()
        made.load_state_dict(network.module.state_dict())
        made.level[column] = max(cost * (1 + 1e-3 * noise), float(made.level[column]))
        return network.with_body(made.eval())

    @classmethod
    def space(cls, network: Network) -> Space:
        return {"amount": (1, 2, 3)}


@dataclass(frozen=True, kw_only=True)
class Shape(_Step):
    stage: ClassVar[Stage] = Stage.STRUCTURE
    amount: int = 1


@dataclass(frozen=True, kw_only=True)
class Balance(_Step):
    stage: ClassVar[Stage] = Stage.BALANCE
    amount: int = 1


@dataclass(frozen=True, kw_only=True)
class Numbers(_Step):
    stage: ClassVar[Stage] = Stage.NUMBERS
    amount: int = 1


COST = 0.004  # of the mildest setting, as a share of the examples


def planted(step: Any) -> tuple[int, float]:
    """The column that a step raises, and how far."""
    text = f"{type(step).__name__} {step.amount}"
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % COLUMNS, COST * step.amount


def true_drop(recipe: Recipe) -> float:
    """What a recipe loses of the accuracy on endless data, but for the thousandth that the seed adds."""
    kept = math.prod(1 - cost for _, cost in dict(planted(s) for s in recipe.steps).items())
    return (2 * RIGHT - 1) * (1 - kept)


@dataclass(frozen=True, kw_only=True)
class Given:
    """An engine on NumPy alone."""

    takes: ClassVar[Any] = "module"
    aims: ClassVar[frozenset[Aim]] = frozenset()
    threads: int = 0

    @property
    def lossless(self) -> bool:
        return True

    @property
    def profile(self) -> Profile:
        return Profile()

    def available(self) -> str | None:
        return None

    def space(self) -> Space:
        return {}

    def pack(self, network: Network, folder: Path) -> None:
        np.save(folder / "level.npy", network.module.level.numpy())
        (folder / "load.py").write_text(_LOAD)


@dataclass(frozen=True, kw_only=True)
class Fast(Given):
    """The same, called faster."""

    def space(self) -> Space:
        return {"threads": (0, 1, 2)}


_LOAD = """\
import numpy as np

def load(folder):
    level = np.load(f"{folder}/level.npy")
    def run(x):
        wrong = (x < level).any(1)
        return (np.stack([~wrong, wrong], 1).astype(np.float32),)
    return run
"""
CATALOGUE = Catalogue(as_given=Given(), engines=(Fast(),), steps=(Shape, Balance, Numbers))


def milliseconds(recipe: dict[str, Any]) -> float:
    """The time that a recipe is said to take, from its JSON: each step helps, more of it helps more."""
    engine = recipe["engine"]
    ms = {"Given": 10.0, "Fast": 6.0}[engine["name"].rpartition(".")[2]] * (1 + 0.1 * engine["threads"])
    return ms * math.prod(0.8 - 0.1 * step["amount"] for step in recipe["steps"])


def view(n: int, seed: Sequence[int]) -> View:
    """Examples that no other seed gives."""
    rng = np.random.default_rng(seed)
    return View(inputs=(rng.random((n, COLUMNS), dtype=np.float32),), labels=(rng.random(n) >= RIGHT).astype(np.int64))


_ONE_AT_A_TIME = threading.Lock()  # what keeps processes from one another's files keeps no threads


class _Inside:
    """A child process that is none."""

    def __init__(self, **_: Any) -> None:
        pass

    def call(self, function: str, /, *arrays: Any, deadline_s: float | None = None, progress: Any = None, **values: Any) -> Reply:
        module, _, name = function.partition(":")
        with _ONE_AT_A_TIME:
            result = getattr(importlib.import_module(module), name)(*arrays, **json.loads(json.dumps(values)))
        return result if isinstance(result, Reply) else Reply(result)

    def close(self) -> None:
        pass

    pause = resume = stop = close


class _Runner:
    """A packed network in this process."""

    def __init__(self, package: Path, **_: Any) -> None:
        self.folder = package
        self._run = runpy.run_path(str(package / "load.py"))["load"](str(package))

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def outputs(self, inputs: Arrays, *, batch: int | None = None) -> Arrays:
        return self._run(*map(np.asarray, inputs))  # type: ignore[no-any-return]

    def peak_memory_bytes(self) -> int:
        return 1 << 20


@contextmanager
def stand_ins(store: Store) -> Iterator[None]:
    """Processes and clocks are the made-up ones inside; the times of trial N are those of its recipe in `store`."""
    recipes: dict[str, dict[str, Any]] = {}

    def ms(package: Path) -> float:
        if package.name not in recipes:
            recipes.update({str(t.number): t.recipe for t in store.trials()})
        return milliseconds(recipes[package.name])

    def quick(runner: _Runner, _: Arrays, batches: Sequence[int]) -> tuple[Latency, ...]:
        return tuple(_latency(ms(runner.folder), batch) for batch in batches)

    def race(contestants: Sequence[timing.Contestant], _: Arrays, batches: Sequence[int], **__: Any) -> timing.Timing:
        times = np.array([[[ms(c.folder)] * len(batches) for c in contestants]] * 2)
        calls = {(who, at): times[:, who, at] for who in range(len(contestants)) for at in range(len(batches))}
        return timing.Timing(
            batches=tuple(batches),
            medians_ms=times,
            calls_ms=calls,
            first_call_ms=times[0],
            peak_memory_bytes=(1 << 20,) * len(contestants),
        )

    with (
        mock.patch.object(workshop, "Child", _Inside),
        mock.patch.object(bench, "Runner", _Runner),
        mock.patch.object(finals, "Runner", _Runner),
        mock.patch.object(timing, "quick", quick),
        mock.patch.object(timing, "race", race),
    ):
        workshop._original.cache_clear()
        yield


def _latency(ms: float, batch: int) -> Latency:
    return Latency(batch=batch, p50_ms=ms, p95_ms=ms, calls=1, launches=1, first_call_ms=ms)


def prepare(run: Path, *, select: int = 400, prove: int = 600, draw: int = 0) -> None:
    """Fills a new run folder with the network and the views; `draw` numbers the data."""
    with folder.new_folder(run / workshop.ORIGINAL) as fresh:
        saved.save(Network(kind="module", body=Levels().eval(), example=(np.zeros((2, COLUMNS), np.float32),)), fresh / "network")
    sizes = {"train": 8, "calibrate": 8, "select": select, "prove": prove}
    for at, (name, n) in enumerate(sizes.items()):
        view(n, (draw, at)).save(run / "views" / name)


def job(run: Path, store: Store, settings: Settings, *, catalogue: Catalogue = CATALOGUE, watcher: Watcher = nobody, **more: Any) -> Job:
    """The run in a prepared folder."""
    views = {name: View.load(run / "views" / name) for name in ("train", "calibrate", "select", "prove")}
    sealed = Sealed(lambda: views["prove"], size=len(views["prove"]), fingerprint=views["prove"].fingerprint())
    opened = Views(**{**views, "prove": sealed}, provenance="held out")  # type: ignore[arg-type]
    return Job(
        folder=run,
        store=store,
        views=opened,
        score=Accuracy(),
        loss="classes",
        catalogue=catalogue,
        settings=settings,
        watch=Watch(watcher=watcher),
        **more,
    )


SETTINGS = Settings(limit=Limit(max_drop=0.02), trials=12, batches=(1,))


def search(run: Path, settings: Settings = SETTINGS, *, told: bool = True, **more: Any) -> Report:
    """The search in a prepared folder, from where it is to its end; its report is written where it is to be `told`."""
    lock = folder.Lock(run)
    try:
        store = Store(run / verbs.STORE)
        try:
            with stand_ins(store):
                begun = job(run, store, settings, **more)
                return verbs._told(run, begun) if told else optimize(begun)
        finally:
            store.close()
    finally:
        lock.release()


def remembered(run: Path) -> dict[str, Any]:
    """What a run has found out, without what differs from run to run: durations, the run's identity, the date."""
    store = Store(run / verbs.STORE, writable=False)
    try:
        rows = store._db.execute("SELECT name, value FROM facts ORDER BY name").fetchall()
        facts = {name: json.loads(value) for name, value in rows if name not in ("aside", "seconds", "identity")}
        trials = [replace(t, seconds=0.0).to_json() for t in store.trials()]
        openings = [(o.fingerprint, o.candidates, o.reused) for o in store.openings()][-1:]
    finally:
        store.close()
    digests = {str(f.parent.relative_to(run)): json.loads(f.read_text()) for f in sorted(run.rglob(folder.MANIFEST))}
    told = digests.pop("artifact", {"sha256": {}})["sha256"]
    told.pop("report.json", None)  # holds the seconds
    return {"facts": facts, "trials": trials, "openings": openings, "folders": digests, "artifact": told}
