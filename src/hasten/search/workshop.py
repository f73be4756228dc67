"""Making things from recipes, in a guarded child: steps are applied, the engine packs, and every beginning of a recipe is kept.

The cache is content-addressed: a folder's name is the SHA-256 of the actions that led to it (steps, and "lower" where a module
became a graph), so recipes that begin alike share the work and a killed run finds it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hasten.core import child, folder
from hasten.core.child import Child
from hasten.core.data import View
from hasten.core.errors import ChildFailed, HastenError, Unsupported
from hasten.core.network import Network
from hasten.core.recipe import Context, Engine, Loss, Profile, Recipe, Space, Step, fingerprint, part_to_json

Action = Step | str
LOWER = "lower"
ORIGINAL = Path("networks") / "original"


class Workshop:
    """A child process that makes packages from recipes; started when it is first needed, and again after it failed.

    Args:
        run: the run folder, with `networks/original` and `views` in it.
        loss: what steps learn with.
        seed: of the steps.
        memory_bytes: address space of the child.
        deadline_s: for one recipe; may be changed between recipes.
    """

    def __init__(self, run: Path, *, loss: Loss, seed: int, memory_bytes: int | None = None, deadline_s: float = 3600) -> None:
        self._run = run
        self._job = {"run": str(run), "loss": loss, "seed": seed}
        self._memory_bytes = memory_bytes
        self.deadline_s = deadline_s
        self._child: Child | None = None

    def make(self, recipe: Recipe, package: Path, progress: Callable[[float, str], None] | None = None) -> dict[str, Any]:
        """Packs what the recipe makes into `package`; gives its parameters and MACs. Raises Unsupported, ChildFailed."""
        return self._call("make", recipe, package=str(package), progress=progress)  # type: ignore[no-any-return]

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
        """Ends the child."""
        if self._child:
            self._child.close()
            self._child = None

    def _call(self, function: str, what: object, progress: Callable[[float, str], None] | None = None, **values: Any) -> Any:
        import cloudpickle

        if self._child is None:
            log = self._run / "workshop.log"
            self._child = Child(memory_bytes=self._memory_bytes, log=log)
        pickled = np.frombuffer(cloudpickle.dumps(what), np.uint8)
        target = f"hasten.search.workshop:_{function}"
        try:
            reply = self._child.call(target, pickled, **self._job, **values, deadline_s=self.deadline_s, progress=progress)
        except (ChildFailed, MemoryError, KeyboardInterrupt):
            self.close()
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
    context = _context(Path(run), loss, seed, recipe.engine)
    network = _build(recipe, context, Path(run))
    with folder.new_folder(Path(package)) as fresh:
        recipe.engine.pack(network, fresh)
    return {"parameters": counts.parameters(network), "macs": counts.macs(network), "fixed_batch": network.fixed_batch}


_LOAD_PT2 = """\
import torch
from torch.utils._pytree import tree_leaves

def load(folder):
    network = torch.export.load(f"{folder}/model.pt2").module()
    @torch.inference_mode()
    def run(*inputs):
        return tuple(o.numpy() for o in tree_leaves(network(*map(torch.from_numpy, inputs))))
    return run
"""


def _ship(pickled: np.ndarray[Any, Any], *, run: str, loss: Loss, seed: int, into: str) -> bool:
    del pickled, loss, seed
    from hasten.load.program import export_program

    original = _original(run)
    if original.kind == "graph" or original.source is not None:
        return False
    try:
        program = export_program(original)
    except HastenError:
        return False
    import torch

    torch.export.save(program, Path(into) / "model.pt2")
    (Path(into) / "load.py").write_text(_LOAD_PT2)
    return True


def _survey(pickled: np.ndarray[Any, Any], *, run: str, loss: Loss, seed: int) -> dict[str, Any]:
    import cloudpickle

    del loss, seed
    original = _original(run)
    found: dict[str, Any] = {}
    for kind in cloudpickle.loads(pickled.tobytes()):
        try:
            found[kind.__name__] = {"space": dict(_space(kind, original, Path(run)))}
        except HastenError as why:
            found[kind.__name__] = {"reason": str(why)}
    return found


def _space(kind: type[Step], original: Network, run: Path) -> Space:
    if kind.takes == "module" and original.kind == "graph":
        raise Unsupported(f"{kind.__name__} needs a torch module; give the network as .pt2 or from Python")
    if kind.takes == "graph" and original.kind == "module":
        return kind.space(_advance(original, [LOWER], 1, run, Context(train=_NONE, calibrate=_NONE)))
    return kind.space(original)


_NONE = View(inputs=(np.zeros((0, 1)),))


def _build(recipe: Recipe, context: Context, run: Path) -> Network:
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
    made = lower.lower(network) if isinstance(action, str) else action.apply(network, context)
    with folder.new_folder(run / "cache" / key(plan[:length], context.profile)) as fresh:
        saved.save(made, fresh / "network")
    return made


@functools.cache
def _original(run: str) -> Network:
    from hasten.load import saved

    return saved.load(Path(run) / ORIGINAL / "network")


def _context(run: Path, loss: Loss, seed: int, engine: Engine) -> Context:
    return Context(
        train=View.load(run / "views" / "train"),
        calibrate=View.load(run / "views" / "calibrate"),
        original=_original(str(run)),
        loss=loss,
        profile=engine.profile,
        seed=seed,
        progress=child.report_progress,
    )
