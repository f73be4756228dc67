"""Making things from recipes, in a guarded child: steps are applied, the engine packs, and every beginning of a recipe is kept.

The cache is content-addressed: a folder's name is the SHA-256 of the actions that led to it (steps, and "lower" where a module
became a graph), so recipes that begin alike share the work and a killed run finds it again. Several workshops may fill one cache:
each beginning is locked while it is made, and who comes second finds it there.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from hasten.core import child, folder
from hasten.core.child import Child
from hasten.core.data import View
from hasten.core.errors import ChildFailed, Unsupported
from hasten.core.network import Arrays, Network
from hasten.core.recipe import Context, Loss, Profile, Recipe, Space, Step, fingerprint, part_to_json
from hasten.core.runner import batch_of, piecewise

if TYPE_CHECKING:
    from hasten.search.crew import Crew

Action = Step | str
LOWER = "lower"
ORIGINAL = Path("networks") / "original"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_LEAST_S = 0.1  # of a request that comes when the time is over: it fails by itself


class Halting:
    """Has a process that can be held where it is, or ended, from another thread. Workshops here and outposts elsewhere do."""

    def __init__(self) -> None:
        self._child: Any = None  # a Child, or one on another machine; None until it is needed
        self._starting = threading.Lock()  # held from `pause` to `resume`: no new process begins in between

    def pause(self) -> None:
        """Stops the child, and keeps one from being started, until `resume`."""
        self._starting.acquire()
        if self._child:
            self._child.pause()

    def resume(self) -> None:
        """Lets it go on."""
        if self._child:
            self._child.resume()
        self._starting.release()

    def stop(self) -> None:
        """Kills the child, one that is being started as soon as it is there; a call under way in another thread raises ChildFailed."""
        with self._starting:
            child = self._child
        if child:
            child.stop()


class Workshop(Halting):
    """A child process that makes packages from recipes; started when it is first needed, and again after it failed.

    Args:
        run: the run folder, with `networks/original` and `views` in it.
        loss: what steps learn with.
        seed: of the steps.
        memory_bytes: address space of the child.
        deadline_s: for one request; see `within`.
        threads: of a helper's child; None for the search's own workshop, which takes what there is and keeps a log.
    """

    crew: Crew | None = None  # helpers that build ahead; this workshop then packs what they built

    def __init__(
        self,
        run: Path,
        *,
        loss: Loss,
        seed: int,
        memory_bytes: int | None = None,
        deadline_s: float = 3600,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self._run = run
        self._job = {"run": str(run), "loss": loss, "seed": seed}
        self._memory_bytes = memory_bytes
        self._deadline_s = deadline_s
        self.ends = math.inf  # moment of the monotonic clock at which what is asked for must be there
        self._environment = None if threads is None else {name: str(threads) for name in _THREADS}

    @property
    def deadline_s(self) -> float:
        """Seconds that a request may take now."""
        return min(self._deadline_s, max(self.ends - time.monotonic(), _LEAST_S))

    def make(self, recipe: Recipe, package: Path, progress: Callable[[float, str], None] | None = None) -> dict[str, Any]:
        """Packs what the recipe makes into `package`; gives its parameters and MACs. Raises Unsupported, ChildFailed."""
        if self.crew:
            self.crew.wait(recipe, progress, deadline_s=self.deadline_s)
        return self._call("make", recipe, package=str(package), progress=progress)  # type: ignore[no-any-return]

    def build(self, recipe: Recipe, progress: Callable[[float, str], None] | None = None) -> None:
        """Applies the steps of the recipe, into the cache. Raises Unsupported, ChildFailed."""
        self._call("build", (recipe, recipe.engine.profile), progress=progress)

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """So much time for all that is asked for inside, and as much as before behind it: the result is packed though the time is over."""
        usual, self.ends = self.ends, min(self.ends, time.monotonic() + seconds)
        try:
            yield
        finally:
            self.ends = usual

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """No helper works inside: for timing."""
        return self.crew.rest() if self.crew else contextlib.nullcontext()

    def survey(self, kinds: Sequence[type[Step]]) -> dict[str, Any]:
        """For each kind of step, by name, its space on the original network, or the reason why it cannot treat it."""
        return self._call("survey", list(kinds))  # type: ignore[no-any-return]

    def ship_original(self, into: Path) -> bool:
        """Writes the original as `model.pt2` with its `load.py`; False where it is a graph or torch cannot export it."""
        return bool(self._call("ship", None, into=str(into)))

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child, and the helpers."""
        if self.crew:
            self.crew.close()
            self.crew = None
        self._end()

    def _end(self) -> None:
        if self._child:
            self._child.close()
            self._child = None

    def _call(self, function: str, what: object, progress: Callable[[float, str], None] | None = None, **values: Any) -> Any:
        import cloudpickle

        if self._child is None:
            with self._starting:
                log = None if self._environment else self._run / "workshop.log"
                self._child = Child(memory_bytes=self._memory_bytes, log=log, environment=self._environment)
        pickled = np.frombuffer(cloudpickle.dumps(what), np.uint8)
        target = f"hasten.search.workshop:_{function}"
        try:
            reply = self._child.call(target, pickled, **self._job, **values, deadline_s=self.deadline_s, progress=progress)
        except (ChildFailed, MemoryError, KeyboardInterrupt):
            self._end()
            raise
        return reply.value


def actions(recipe: Recipe, kind: str) -> list[Action]:
    """The steps of a recipe with "lower" where a module must become a graph, for a network that begins as `kind`."""
    found: list[Action] = []
    for part in recipe.parts:
        if kind == "module" and part.takes == "graph":
            found.append(LOWER)
            kind = "graph"
        if part is not recipe.engine:
            found.append(part)  # type: ignore[arg-type]
    return found


def key(done: Sequence[Action], profile: Profile) -> str:
    """The name in the cache of what a sequence of actions makes."""
    told = any(not isinstance(a, str) and a.reads_profile for a in done)
    facts = {k: sorted(v) if isinstance(v, frozenset) else v for k, v in vars(profile).items()}
    plain = [a if isinstance(a, str) else part_to_json(a) for a in done]
    return fingerprint([plain, facts if told else None])[:32]


def _make(pickled: np.ndarray[Any, Any], *, run: str, loss: Loss, seed: int, package: str) -> dict[str, Any]:
    import cloudpickle

    from hasten.measure import counts

    recipe: Recipe = cloudpickle.loads(pickled.tobytes())
    context = _context(Path(run), loss, seed, recipe.engine.profile)
    network = _built(recipe, context, Path(run))
    with folder.new_folder(Path(package)) as fresh:
        recipe.engine.pack(network, fresh)
    return {"parameters": counts.parameters(network), "macs": counts.macs(network), "fixed_batch": network.fixed_batch}


def _build(pickled: np.ndarray[Any, Any], *, run: str, loss: Loss, seed: int) -> None:
    import cloudpickle

    recipe, profile = cloudpickle.loads(pickled.tobytes())
    _built(recipe, _context(Path(run), loss, seed, profile), Path(run))


_LOAD_PT2 = """\
import torch
from torch.utils._pytree import tree_leaves

def load(folder):
    network = torch.export.load(f"{folder}/model.pt2").module()
    @torch.inference_mode()
    def run(*inputs):
        return tuple(o.numpy() for o in tree_leaves(network(*map(torch.from_numpy, inputs))) if isinstance(o, torch.Tensor))
    return run
"""


def _ship(pickled: np.ndarray[Any, Any], *, run: str, loss: Loss, seed: int, into: str) -> bool:
    del pickled, loss, seed
    original, model = _original(run), Path(into) / "model.pt2"
    if original.kind == "graph" or original.source is not None:
        return False
    (Path(into) / "load.py").write_text(_LOAD_PT2)
    shipped = False
    try:
        shipped = _shipped(original, model)
    except Exception as why:  # torch raises what it likes on nodes that it can export and cannot write
        if isinstance(why, OSError) and folder.at_its_end(why):
            raise
    if not shipped:
        for file in (model, model.with_name("load.py")):
            file.unlink(missing_ok=True)
    return shipped


def _shipped(original: Network, model: Path) -> bool:
    """Whether the original is written as a program that torch alone can read and that gives the same."""
    import runpy

    import torch

    from hasten.load.lower import forward, relative_difference
    from hasten.load.program import export_program
    from hasten.search.prover import EQUAL_TOLERANCE

    program = export_program(original)
    called = [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    if any(target.namespace not in ("aten", "prims", "prim", "quantized") for target in called):
        return False  # an operator of another package, which a reader would have to import
    torch.export.save(program, model)
    given = runpy.run_path(str(model.with_name("load.py")))["load"](str(model.parent))(*original.example)
    pairs = zip(forward(original, original.example), given, strict=True)
    return all(relative_difference(a, b) <= EQUAL_TOLERANCE for a, b in pairs)


def _survey(pickled: np.ndarray[Any, Any], *, run: str, loss: Loss, seed: int) -> dict[str, Any]:
    import cloudpickle

    del loss, seed
    original = _original(run)
    found: dict[str, Any] = {}
    for kind in cloudpickle.loads(pickled.tobytes()):
        try:
            found[kind.__name__] = {"space": dict(_space(kind, original, Path(run)))}
        except Exception as why:  # a step that fails on this network costs itself, not the search
            found[kind.__name__] = {"reason": str(why) or type(why).__name__}
    return found


def _space(kind: type[Step], original: Network, run: Path) -> Space:
    if kind.takes == "module" and original.kind == "graph":
        raise Unsupported(f"{kind.__name__} needs a torch module; give the network as .pt2 or from Python")
    if kind.takes == "graph" and original.kind == "module":
        return kind.space(_advance(original, [LOWER], 1, run, Context(train=_NONE, calibrate=_NONE)))
    return kind.space(original)


_NONE = View(inputs=(np.zeros((0, 1)),))


def _built(recipe: Recipe, context: Context, run: Path) -> Network:
    """Applies what is not in the cache yet."""
    from hasten.load import saved

    original = _original(str(run))
    plan = actions(recipe, original.kind)
    start, network = 0, original
    for length in range(len(plan), 0, -1):
        place = run / "cache" / key(plan[:length], context.profile)
        if folder.intact(place):
            start, network = length, saved.load(place / "network")
            break
    for length in range(start + 1, len(plan) + 1):
        network = _advance(network, plan, length, run, context)
    return network


def _advance(network: Network, plan: Sequence[Action], length: int, run: Path, context: Context) -> Network:
    """The network after action number `length`, put into the cache."""
    from hasten.load import lower, saved

    action = plan[length - 1]
    name = key(plan[:length], context.profile)
    with alone(run / "cache", name):
        if folder.intact(run / "cache" / name):
            return saved.load(run / "cache" / name / "network")
        made = lower.lower(network) if isinstance(action, str) else action.apply(network, context)
        with folder.new_folder(run / "cache" / name) as fresh:
            saved.save(made, fresh / "network")
    return made


@contextlib.contextmanager
def alone(cache: Path, name: str) -> Iterator[None]:
    """No other process is in here for the same entry: each has a byte of its own in one file, locked while this process lives.

    Threads of one process share its locks; they must take turns themselves.
    """
    with folder.storage(cache):
        cache.mkdir(parents=True, exist_ok=True)
        file = _lock_file(cache / "lock")
    byte = int(name[:12], 16)
    fcntl.lockf(file, fcntl.LOCK_EX, 1, byte)
    try:
        yield
    finally:
        fcntl.lockf(file, fcntl.LOCK_UN, 1, byte)


_LOCKS: dict[Path, BinaryIO] = {}


def _lock_file(path: Path) -> BinaryIO:
    """Open as long as the process lives: closing any descriptor of a file gives up all of a process's locks on it."""
    file = _LOCKS.get(path)
    if file is None or not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
        file = _LOCKS[path] = open(path, "ab")  # noqa: SIM115 - see above
    return file


@functools.cache
def _original(run: str) -> Network:
    from hasten.load import saved

    return saved.load(Path(run) / ORIGINAL / "network")


def _context(run: Path, loss: Loss, seed: int, profile: Profile) -> Context:
    return Context(
        train=View.load(run / "views" / "train"),
        calibrate=View.load(run / "views" / "calibrate"),
        original=_original(str(run)),
        loss=loss,
        profile=profile,
        seed=seed,
        answers=functools.partial(_answers, str(run)),
        progress=child.report_progress,
    )


@functools.cache
def _answers(run: str) -> Arrays:
    """The original's outputs on *train*, asked for once in a run."""
    from hasten.load.lower import forward

    name = fingerprint("answers")[:32]
    place = Path(run) / "cache" / name
    with alone(place.parent, name):
        if not folder.intact(place):
            original, train = _original(run), View.load(Path(run) / "views" / "train")
            size = original.fixed_batch or batch_of(train.inputs)
            outputs = piecewise(lambda *rows: forward(original, tuple(map(np.array, rows))), train.inputs, size)
            with folder.new_folder(place) as fresh:
                View(inputs=outputs).save(fresh)
    return tuple(np.array(a) for a in View.load(place).inputs)
