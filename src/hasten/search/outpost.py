"""Who helps a search: workshops on this machine, or outposts on the nodes of a Ray cluster."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hasten.core import folder
from hasten.core.errors import ChildFailed, UsageError
from hasten.core.recipe import Loss, Recipe
from hasten.distributed import parcels
from hasten.measure import machine
from hasten.search.crew import Crew, Progress
from hasten.search.workshop import ORIGINAL, Halting, Workshop, actions, alone, key

if TYPE_CHECKING:
    from hasten.distributed.ray import Cluster, RemoteChild

_LEAST_BYTES = 8 << 30  # of address space: torch maps much that it never touches
_FETCHING = threading.Lock()
_SENT = (str(ORIGINAL), "views/train", "views/calibrate")


@dataclass(frozen=True, kw_only=True)
class Hands:
    """How many help.

    Args:
        workers: processes that train side by side, >= 1; the processors are divided among them. None for one, or with `ray` for
            one on each node.
        ray: address of a Ray cluster whose nodes train; None for this machine.
    """

    workers: int | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers must be at least 1, got {self.workers}")

    def hire(self, run: Path, *, loss: Loss, seed: int) -> Crew | None:
        """The helpers of a run; None where the search does all itself.

        Raises:
            BackendMissing, UsageError: if the cluster cannot be used.
        """
        if self.ray is not None:
            from hasten.distributed.ray import Cluster

            return _outposts(Cluster(self.ray), self.workers, run, loss=loss, seed=seed)
        if self.workers in (None, 1):
            return None
        assert self.workers
        threads = max(machine.cores() // self.workers, 1)
        memory = max(machine.memory_bytes() // self.workers, _LEAST_BYTES)
        return Crew([Workshop(run, loss=loss, seed=seed, memory_bytes=memory, threads=threads) for _ in range(self.workers)])


def _outposts(cluster: Cluster, workers: int | None, run: Path, *, loss: Loss, seed: int) -> Crew:
    count, threads = cluster.divided(workers)
    outposts = [Outpost(run, lambda: cluster.start(threads=threads), loss=loss, seed=seed) for _ in range(count)]
    outposts[0].begin()  # what keeps all of them from starting is told now and not by every trial
    return Crew(outposts, at_the_end=cluster.close)


class Outpost(Halting):
    """A helper on another node: it gets the network and the data once, and sends back what it built.

    Args:
        run: the run folder here.
        start: starts a child there; raises BackendMissing where none can be had.
    """

    def __init__(self, run: Path, start: Callable[[], RemoteChild], *, loss: Loss, seed: int) -> None:
        super().__init__()
        self._run = run
        self._start = start
        self._job = {"loss": loss, "seed": seed}
        self._kind = json.loads((run / ORIGINAL / "network" / "network.json").read_text())["kind"]
        self._there: set[str] = set()

    def begin(self) -> None:
        """Starts the process there and sends it what it needs. Raises BackendMissing, WorkerLost."""
        self._ready()

    def build(self, recipe: Recipe, progress: Progress | None = None) -> None:
        """Applies the steps there and brings every beginning that they made into the cache here. Raises WorkerLost besides."""
        import cloudpickle

        profile = recipe.engine.profile  # of this machine, where the engine will run
        plan = actions(recipe, self._kind)
        names = [key(plan[:length], profile) for length in range(1, len(plan) + 1)]
        here = [name for name in names if folder.intact(self._run / "cache" / name)]
        if names[-1] in here:
            return
        try:
            child = self._ready()
            self._send(child, [f"cache/{name}" for name in here[-1:]])
            pickled = np.frombuffer(cloudpickle.dumps((recipe, profile)), np.uint8)
            child.call("hasten.search.workshop:_build", pickled, run=child.place, **self._job, deadline_s=3600, progress=progress)
            self._there |= {f"cache/{name}" for name in names}
            for name in names:
                if name not in here:
                    self._fetch(child, name)
        except ChildFailed:
            self.close()
            raise

    def close(self) -> None:
        """Ends the process there."""
        child, self._child = self._child, None
        self._there = set()
        if child:
            child.close()

    def _ready(self) -> RemoteChild:
        if self._child is None:
            with self._starting:
                self._child = self._start()
            self._send(self._child, _SENT)
        child: RemoteChild = self._child
        return child

    def _send(self, child: RemoteChild, places: tuple[str, ...] | list[str]) -> None:
        for place in places:
            if place not in self._there:
                parcel = parcels.read(place=str(self._run / place))
                child.call("hasten.distributed.parcels:write", *parcel.arrays, place=f"{child.place}/{place}", names=parcel.value)
                self._there.add(place)

    def _fetch(self, child: RemoteChild, name: str) -> None:
        """The entry, unless it is an older one there that a longer beginning made needless."""
        parcel = child.call("hasten.distributed.parcels:read", place=f"{child.place}/cache/{name}", deadline_s=600)
        place = self._run / "cache" / name
        with _FETCHING, alone(place.parent, name):
            if parcel.value and not folder.intact(place):
                parcels.write(*parcel.arrays, place=str(place), names=parcel.value)
