"""A result, or a network as it is, in the file format of another tool: checked in that tool's own runtime before it is handed out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from hasten import prepare
from hasten.applying import RECIPE, read_recipe
from hasten.core import folder
from hasten.core.child import Child, Reply
from hasten.core.data import View
from hasten.core.errors import BackendMissing, ChildFailed, Unsupported, UsageError
from hasten.core.network import Arrays, Kind, Network
from hasten.core.recipe import Aim, Engine, Profile, Recipe, Space, Stage, describe
from hasten.core.runner import Runner, batch_of, piecewise
from hasten.load.guards.places import room_for
from hasten.load.source import Source
from hasten.search.bench import check_alike, difference
from hasten.search.watch import Watch, Watcher, nobody
from hasten.verbs import STORE

TOLERANCE, ROUNDED = 1e-3, 1e-2  # of the largest output; a step of eight bits is 0.004 of a range
_MOST, _RANDOM = 512, 16  # examples that an artifact is checked on, of the user and made up
_OPENING_S, _ROOM_BYTES = 1800.0, 12 << 30
_EXPORT = "export.json"
_README = """\
# {words}

This folder runs without hasten.

    from load import load
    run = load(".")          # or this folder's path
    outputs = run(inputs)    # numpy arrays, one per input, first axis the batch; gives a tuple of arrays

{sentence}

`export.json` says what was checked, `recipe.json` what was done to the network, `manifest.json` the SHA-256 of every file. The model
file itself holds the recipe, the score and the verdict as JSON under the key `hasten`.
"""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What became of an export.

    Args:
        to: the format; `runtime`: the engine that it was checked in.
        place: the folder: as asked, or under `rejected/` beside it.
        accepted: every output lies within `tolerance` of the reference's; `reason`: why not.
        reference: what the outputs were held against.
        difference: the largest |output − reference|, as a share of the largest |reference|; None where it did not run.
        agreement: share of examples whose largest of several outputs is the same one; None for other outputs.
        examples: how many, and `inputs`: "held out" from every step, "given", or "random".
        metadata: what was written into the file.
        notes: what must be said.
    """

    to: str
    runtime: str
    place: str
    accepted: bool
    reason: str | None
    reference: str
    difference: float | None
    tolerance: float
    agreement: float | None
    examples: int
    inputs: str
    metadata: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0, or 3 for what lies in `rejected/`."""
        return 0 if self.accepted else 3

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return "\n".join([self.sentence, *self.notes, self.place])

    @property
    def sentence(self) -> str:
        """What was checked and how it went."""
        on = f"on {self.examples:,} {self.inputs} examples, against {self.reference}, tolerance {self.tolerance:g}"
        if self.difference is None:
            return f"{self.to}: rejected: {self.reason} ({on})"
        same = "" if self.agreement is None else f", {self.agreement:.1%} of the classes the same"
        verdict = "accepted" if self.accepted else f"rejected: {self.reason}"
        return f"{self.to}: {verdict}; {self.runtime} differs by at most {self.difference:.2g} of the largest output{same} ({on})"


@dataclass(frozen=True, kw_only=True)
class _Carrier:
    """An engine that packs a network which was made for another engine: the steps still see that one's profile.

    A graph becomes a module again where the engine takes modules; integers are then roundings in floats, but for LiteRT.
    """

    aims: ClassVar[frozenset[Aim]] = frozenset()
    engine: Engine
    made_for: Engine
    takes: Kind

    @property
    def lossless(self) -> bool:
        return self.engine.lossless

    @property
    def profile(self) -> Profile:
        return self.made_for.profile

    def available(self) -> str | None:
        return self.engine.available()

    def space(self) -> Space:
        return {}

    def pack(self, network: Network, folder: Path) -> None:
        from hasten.load import files

        if self.engine.takes == "module" and network.kind == "graph":
            network = files.imported(network)
            if network.kind == "graph":
                raise Unsupported(f"{describe(self.engine)} needs a torch module: {'; '.join(network.notes)}")
        self.engine.pack(network, folder)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Packed:
    """A packed network with what it is to be held against."""

    fixed_batch: int | None
    inputs: Arrays
    kind: str
    expected: Arrays
    reference: str
    recipe: Recipe
    metadata: dict[str, Any]
    rounds: bool = False
    notes: tuple[str, ...] = ()
    report: str | None = None


def formats() -> dict[str, Engine]:
    """The engine that packs and checks each format."""
    from hasten import engines

    return {
        "onnx": engines.OnnxRuntime(),
        "openvino": engines.OpenVINO(),
        "pt2": engines.Program(),
        "safetensors": engines.Program(weights="safetensors"),
        "aotinductor": engines.AotInductor(),
        "tflite": engines.LiteRT(),
        "executorch": engines.ExecuTorch(),
    }


def export(
    source: str | Path | Source,
    to: str,
    *,
    out: str | Path | None = None,
    data: str | Path | None = None,
    tolerance: float | None = None,
    watcher: Watcher = nobody,
) -> Exported:
    """Writes a result or a network in another format, and checks it there.

    The reference of a run is its own result on the *select* data, which no step has learnt from; *prove* stays sealed. The verdict of
    the run goes into the file, with the engine that it was proved in. The reference of a model file is that model, on `data` or
    on random inputs.

    Args:
        source: a finished run folder, or anything that hasten opens; see `Source`.
        to: "onnx", "openvino", "pt2", "aotinductor", "tflite", "executorch", "safetensors".
        out: a new or empty folder, or one of an earlier export; by default `export/FORMAT` in the run, or `MODEL-FORMAT` beside the file.
        data: inputs to check a model file on.
        tolerance: of |output − reference|, as a share of the largest |reference|; outside, the folder lies in `rejected/` beside `out`.
            By default 0.001, or 0.01 where the network rounds to integers, for two runtimes may round a half either way.
        watcher: is told the progress.

    Raises:
        UsageError, ModelRefused, StorageError: see `hasten.core.errors`.
        Unsupported: the format cannot hold this network.
        BackendMissing: its runtime is not here.
    """
    engine = formats().get(to)
    given = Source.of(source)
    place = Path(given.path)
    run = (place / STORE).exists()
    if engine is None:
        raise UsageError(f"--to must be one of {', '.join(formats())}, got {to!r}")
    if tolerance is not None and not tolerance > 0:
        raise UsageError(f"tolerance must be above 0, got {tolerance}")
    if not place.exists():
        raise UsageError(f"no such file or run: {place}")
    if why := engine.available():
        raise BackendMissing(f"{to}: {why}")
    beside = place / "export" / to if run else place.with_name(f"{given.stem}-{to}")
    out = _usable(beside if out is None else Path(out))
    rejected = _usable(out.parent / "rejected" / out.name)
    watch = Watch(watcher=watcher)
    watch.stage("export", f"making {to} of {given}")
    with tempfile.TemporaryDirectory(prefix="hasten-") as name:
        work = Path(name)
        packed = _of_run(place, to, engine, work) if run else _of_model(given, to, data, work)
        watch.stage("check", f"running it in {describe(engine)}")
        usual = ROUNDED if packed.rounds else TOLERANCE
        found = _checked(work / "new", packed, to, engine, usual if tolerance is None else tolerance)
        found = dataclasses.replace(found, place=str(out if found.accepted else rejected))
        if not found.accepted and (out / _EXPORT).exists():
            found = dataclasses.replace(found, notes=(*found.notes, f"{out} is still the export of before, not this one"))
        _write(work / "new", found, packed)
    return found


def _usable(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _EXPORT).exists())):
        raise UsageError(f"--out must be a new or empty folder, or one of an earlier export, got {out}")
    return out


def _of_run(run: Path, to: str, engine: Engine, work: Path) -> _Packed:
    """The network of a run's result in the workshop of that run, where its beginnings still lie."""
    from hasten import verbs
    from hasten.core.store import Store
    from hasten.engines import Eager, labels
    from hasten.search.workshop import Workshop

    told = verbs.load_report(run)
    artifact = next((run / name for name in ("artifact", "best-so-far") if (run / name / RECIPE).exists()), None)
    if told.state != "finished" or artifact is None:
        raise UsageError(f"{run} holds no finished run; end it first with the command that began it")
    recipe = read_recipe(artifact)
    with contextlib.ExitStack() as stack:
        stack.callback(folder.Lock(run).release)
        store = stack.enter_context(contextlib.closing(Store(run / verbs.STORE, writable=False)))
        task = store.fact("task")
        shop = stack.enter_context(contextlib.closing(Workshop(run, loss=task["loss"], seed=told.seed)))
        steps, notes = recipe.steps, []
        if to == "safetensors":
            steps = tuple(s for s in steps if s.takes == "module")
            notes = [f"left for later, since PyTorch weights cannot hold it: {describe(s)}" for s in recipe.steps[len(steps) :]]
        takes: Kind = "graph" if any(s.takes == "graph" for s in steps) else engine.takes
        carrier = _Carrier(engine=engine, made_for=recipe.engine, takes=takes)
        facts = shop.make(Recipe(steps, carrier), work / "new")  # type: ignore[arg-type]  # what it takes is told by the instance
        reference = artifact
        if len(steps) < len(recipe.steps):
            reference = work / "reference"
            shop.make(Recipe(steps, Eager()), reference)
        metadata = labels.label(recipe, store.fact("config")["model"]) | labels.proved(told, recipe)
    view = View.load(run / "views" / "select").take(slice(0, _MOST))
    with Runner(reference, fixed_batch=facts["fixed_batch"]) as runner:
        expected = runner.outputs(view.inputs)
    return _Packed(
        fixed_batch=facts["fixed_batch"],
        inputs=view.inputs,
        kind="held out",
        expected=expected,
        reference="the result of the run" if reference == artifact else "the network before these steps in PyTorch",
        recipe=recipe,
        rounds=any(step.stage == Stage.NUMBERS for step in recipe.steps),
        metadata=metadata,
        notes=tuple(notes),
        report=(artifact / "report.json").read_text() if (artifact / "report.json").exists() else None,
    )


def _of_model(model: Source, to: str, data: str | Path | None, work: Path) -> _Packed:
    from hasten.engines import labels

    asked: dict[str, Any] = {"model": model.to_json(), "data": None if data is None else str(data), "to": to, "into": str(work / "new")}
    with Child(memory_bytes=_ROOM_BYTES) as child:
        reply = prepare.call(child, "hasten.exporting:_pack_model", model.path, **asked, deadline_s=_OPENING_S)
    value, count = reply.value, reply.value["inputs"]
    recipe = Recipe((), formats()[to])
    claimed = {} if value["claimed"] is None else {"claimed": value["claimed"]}
    return _Packed(
        fixed_batch=value["fixed_batch"],
        inputs=reply.arrays[:count],
        kind="given" if data is not None else "random",
        expected=reply.arrays[count:],
        reference="the file as it is",
        recipe=recipe,
        rounds=value["rounds"],
        metadata=labels.label(recipe, model.digest()) | claimed,
        notes=tuple(value["notes"]),
    )


def _pack_model(*, model: dict[str, Any], data: str | None, to: str, into: str) -> Reply:
    """In a child: opens the file, packs it, and gives inputs with the outputs of the network as it is."""
    from hasten.engines import labels
    from hasten.load import files, lower
    from hasten.load.data import read
    from hasten.load.importer.integers import has_integers

    source = Source(**model)
    with contextlib.nullcontext() if data is None else room_for(data):
        loaded = None if data is None else read(data)
    given = None if loaded is None else loaded.view
    network = files.open_in_room(source, given.take(slice(0, 4)).inputs if given else None, loaded.names if loaded else ())
    engine = formats()[to]
    if engine.takes == "module" and network.kind == "graph":
        raise Unsupported(f"{to} needs a torch module: {'; '.join(network.notes)}")
    with folder.new_folder(Path(into)) as fresh:
        engine.pack(lower.lower(network) if engine.takes == "graph" else network, fresh)
    inputs = _random(network, _RANDOM) if given is None else given.take(slice(0, _MOST)).inputs
    as_it_is = network
    if engine.takes == "graph" and network.source is not None:
        as_it_is = network.with_body(network.source, kind="graph")  # it must give what ONNX Runtime makes of its integers
    size = network.fixed_batch or min(batch_of(inputs), len(inputs[0]))
    expected = piecewise(lambda *rows: lower.forward(as_it_is, rows), tuple(map(np.asarray, inputs)), size)
    graph = as_it_is.body if as_it_is.kind == "graph" else network.source
    facts: dict[str, Any] = {"fixed_batch": network.fixed_batch, "notes": list(network.notes), "inputs": len(inputs)}
    facts |= {"rounds": graph is not None and has_integers(graph), "claimed": labels.read(Path(source.path))}
    return Reply(facts, (*(np.asarray(a) for a in inputs), *expected))


def _random(network: Network, rows: int) -> Arrays:
    """Other rows than the example's, so that nothing that was fixed on the example passes unseen; integers are its own, shuffled."""
    rng = np.random.default_rng(1)
    return tuple(
        rng.standard_normal((rows, *a.shape[1:])).astype(a.dtype) if a.dtype.kind == "f" else a[rng.integers(0, len(a), rows)]
        for a in network.example
    )


def _checked(place: Path, packed: _Packed, to: str, engine: Engine, tolerance: float) -> Exported:
    """Labels the packed folder and runs that very folder."""
    from hasten.engines import labels

    labels.write(place, packed.metadata)
    apart: float | None = None
    same: float | None = None
    reason: str | None = None
    try:
        with Runner(place, fixed_batch=packed.fixed_batch) as runner:
            got = runner.outputs(packed.inputs)
        check_alike(packed.expected, got)
        apart, same = difference(packed.expected, got), _agreement(packed.expected, got)
        if not apart <= tolerance:
            reason = f"the outputs must lie within {tolerance:g} of the reference's, and differ by {apart:.2g}"
    except (ChildFailed, ValueError) as why:
        reason = str(why)
    return Exported(
        to=to,
        runtime=describe(engine),
        place="",
        accepted=reason is None,
        reason=reason,
        reference=packed.reference,
        difference=apart,
        tolerance=tolerance,
        agreement=same,
        examples=len(packed.inputs[0]),
        inputs=packed.kind,
        metadata=packed.metadata,
        notes=packed.notes,
    )


def _agreement(expected: Arrays, got: Arrays) -> float | None:
    """Of the first output, where it looks like classes."""
    if expected[0].ndim != 2 or expected[0].shape[1] < 2:
        return None
    return float(np.mean(expected[0].argmax(1) == got[0].argmax(1)))


def _write(made: Path, found: Exported, packed: _Packed) -> None:
    with folder.new_folder(Path(found.place)) as fresh:
        shutil.copytree(made, fresh, dirs_exist_ok=True, ignore=shutil.ignore_patterns(folder.MANIFEST))
        (fresh / RECIPE).write_text(json.dumps(packed.recipe.to_json(), indent=1) + "\n")
        (fresh / _EXPORT).write_text(json.dumps(found.to_json(), indent=1) + "\n")
        (fresh / "README.md").write_text(_README.format(words=found.metadata["words"], sentence=found.sentence))
        if packed.report is not None:
            (fresh / "report.json").write_text(packed.report)
