"""The verbs behind the door and the command line: from what the user brings to a Report, and the files that tell it."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from hasten.core import folder
from hasten.core.child import Child
from hasten.core.errors import BackendMissing, DataRefused, Interrupted, ModelRefused, StorageError, UsageError
from hasten.core.recipe import fingerprint
from hasten.core.report import Accept, Goal, Limit, Report
from hasten.core.store import Store
from hasten.load.source import Source, digest_module, digest_path
from hasten.measure import energy
from hasten.search.clock import parse_duration
from hasten.search.objective import Objective
from hasten.search.watch import Watch, Watcher, nobody

if TYPE_CHECKING:
    from torch import nn

    from hasten.search.run import Job

STORE = "run.sqlite"
_OPENING_S = 600.0
_PICKS = ("fastest", "smallest", "balanced")
_ROOM_BYTES = 12 << 30
_ANY_TIME = ("command", "pick", "workers", "ray")  # may differ when a run goes on


@dataclass(frozen=True, kw_only=True)
class Options:
    """What else can be asked of `optimize`.

    Args:
        batch: the batch size whose latency is to fall; 1 and 32 are reported besides.
        score: "accuracy", "squared-error", "macro-f1", "auc", …; None lets the data choose.
        target: the column or array with the labels; group: the one whose equal values belong together.
        seed: the same seed gives the same result.
        trials: most recipes to try.
        time_limit: of the whole run: seconds, or words like "10m", "90s", "1h30m". Without it "quick" takes at most a minute, "normal"
            ten, "thorough" as long as it takes; nor has a run a limit whose `trials` are given.
        effort: "quick" races engines and integers; "normal" also prunes and trains; "thorough" factorizes and distils besides.
        objective: what is to become small: "latency" (at `batch`), "throughput" (at the largest batch measured), "size", "memory",
            "energy", or several with commas between, which count alike.
        pick: of a finished run, which certified candidate becomes the result: "fastest", "smallest", "balanced", or a trial's number.
        confidence: of the statement about the drop, in (0.5, 1).
        accept: "proof" asks for the bound, "point" takes the estimate.
        latency_ms, size_bytes, peak_memory_bytes, energy_mj, min_speedup, examples_per_s: caps that the result must meet.
        workers: processes that train side by side; the processors are divided among them.
        ray: address of a Ray cluster whose nodes train.
        command: how the user asked, for the report.
    """

    batch: int = 1
    score: str | None = None
    target: str | None = None
    group: str | None = None
    seed: int = 0
    trials: int | None = None
    time_limit: float | str | None = None
    effort: Literal["quick", "normal", "thorough"] = "normal"
    objective: str = "latency"
    pick: str | None = None
    confidence: float = 0.95
    accept: Accept = "proof"
    latency_ms: float | None = None
    size_bytes: int | None = None
    peak_memory_bytes: int | None = None
    energy_mj: float | None = None
    min_speedup: float | None = None
    examples_per_s: float | None = None
    workers: int | None = None
    ray: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if self.effort not in ("quick", "normal", "thorough"):
            raise UsageError(f"effort must be quick, normal or thorough, got {self.effort!r}")
        Objective(goals=self.goals)  # its checks are ours
        if self.pick is not None and self.pick not in _PICKS and not self.pick.isdigit():
            raise UsageError(f"pick must be {', '.join(_PICKS)} or the number of a trial, got {self.pick!r}")
        parse_duration(self.time_limit)
        if ("energy" in self.goals or self.energy_mj is not None) and (why := energy.unreadable()):
            raise BackendMissing(why)

    @property
    def goals(self) -> tuple[Goal, ...]:
        """The objective as a tuple."""
        return tuple(cast(Goal, word.strip()) for word in self.objective.split(","))  # Objective checks the words

    def limit(self, max_drop: float) -> Limit:
        """The limit with all caps."""
        names = [field.name for field in fields(Limit) if field.name != "max_drop"]
        return Limit(max_drop=max_drop, **{name: getattr(self, name) for name in names})


def optimize(
    model: nn.Module | str | Path | Source,
    data: Any,
    prove: Any = None,
    *,
    max_drop: float | str = 0.01,
    run: str | Path | None = None,
    options: Options | None = None,
    watcher: Watcher = nobody,
) -> Report:
    """The fastest network that loses no more score than `max_drop`, with the proof.

    The model is left alone. Everything is kept in the run folder; the same call goes on where a killed one was.

    Args:
        model: a torch module, or where one lies: a path, "net.py:Class", or a `Source` with the weights for the class.
        data: for training, calibrating and selecting: arrays, a Dataset or DataLoader, or a path (see `hasten.load.data.read`).
        prove: data that the network was not trained on. Without it a part of `data` proves, "provenance unknown".
        max_drop: in the score's unit (0.01 of an accuracy is one point), or "1pt", or "1%rel" of the original's score.
        run: the folder; by default one under `runs/` that belongs to this very call.
        options: everything else.
        watcher: is told the progress.

    Returns:
        The report; `report.artifact` is the folder with the result.

    Raises:
        UsageError, DataRefused, ModelRefused, RunLocked, StorageError: see `hasten.core.errors`.
        Interrupted: on Ctrl-C, with the report so far.
    """
    from hasten.search import summary

    options = options or Options()
    drop, relative = parse_drop(max_drop)
    limit = options.limit(drop)
    if run is not None:
        folder.refuse_if_held(Path(run))  # large data take their time to read
    given = _Given.of(model, data, prove, options)
    config = given.config(limit, relative, options)
    place = Path(run) if run is not None else Path("runs") / f"{given.name}-{fingerprint(config)[:8]}"
    lock = folder.Lock(_usable(place))
    try:
        store = Store(place / STORE)
        try:
            _same(place, store, config)
            job = _job(place, store, given, limit, options, relative, watcher)
            return _told(place, job, options.pick)
        except KeyboardInterrupt as why:
            raise Interrupted(_with_sentence(summary.report(place, store))) from why
        finally:
            store.close()
    finally:
        lock.release()


def load_report(run: str | Path) -> Report:
    """The report of a run folder at any moment: finished, running or broken off. Raises StorageError."""
    from hasten.report.sentence import verdict_sentence
    from hasten.search import summary

    place = Path(run)
    store = Store(place / STORE, writable=False)
    try:
        found = summary.report(place, store, state="running" if folder.locked(place) else "interrupted")
        return replace(found, sentence=verdict_sentence(found))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as why:
        raise StorageError(f"{place} holds no run that can be read ({type(why).__name__}: {why})") from why
    finally:
        store.close()


def parse_drop(words: float | str) -> tuple[float, bool]:
    """A drop and whether it is relative to the original's score.

    >>> parse_drop("1pt"), parse_drop("0.5 pt"), parse_drop(0.02), parse_drop("1%rel")
    ((0.01, False), (0.005, False), (0.02, False), (0.01, True))

    Raises:
        UsageError: on anything else; a bare "1%" could mean either and is refused.
    """
    if isinstance(words, (int, float)):
        return float(words), False
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(pt|%rel|%)?\s*", words)
    if not found:
        raise UsageError(f"a drop must look like 1pt, 0.01 or 1%rel, got {words!r}")
    value, unit = float(found[1]), found[2]
    if unit == "%":
        raise UsageError(
            f"{words.strip()!r} can mean two things: write {found[1]}pt for {found[1]} points of the score "
            f"({value / 100:g}), or {found[1]}%rel for that share of the original's score"
        )
    return (value, False) if unit is None else (value / 100, unit == "%rel")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Given:
    """What the user brought, with the digests by which a folder knows it again."""

    model: Any
    data: Any
    prove: Any
    name: str
    digests: dict[str, Any]

    @classmethod
    def of(cls, model: Any, data: Any, prove: Any, options: Options) -> _Given:
        if isinstance(model, (str, Path, Source)):
            model = Source.of(model)
            name, digest = model.stem, model.digest()
        else:
            check_module(model)
            name, digest = type(model).__name__, digest_module(model)
        if not isinstance(data, (str, Path)):
            from hasten.load.data import read

            data = read(data, target=options.target, group=options.group)
            prove = None if prove is None else read(prove, target=options.target, group=options.group, classes=data.classes)
        elif prove is not None and not isinstance(prove, (str, Path)):
            raise UsageError("give data and prove both as paths or both as arrays")
        digests = {"model": digest, "data": _digest_data(data), "prove": None if prove is None else _digest_data(prove)}
        return cls(model=model, data=data, prove=prove, name=name, digests=digests)

    def config(self, limit: Limit, relative: bool, options: Options) -> dict[str, Any]:
        """All that a run depends on; one folder holds one such."""
        asked = {k: v for k, v in vars(options).items() if k not in _ANY_TIME}
        return {**self.digests, "limit": limit.to_json(), "relative": relative, **asked}


def _job(place: Path, store: Store, given: _Given, limit: Limit, options: Options, relative: bool, watcher: Watcher) -> Job:
    from hasten import prepare, presets
    from hasten.load import split
    from hasten.measure import machine
    from hasten.search.catalogue import Settings
    from hasten.search.outpost import Hands
    from hasten.search.run import Job

    watch = Watch(watcher=watcher)
    task = store.once("task", lambda: _prepare(place, given, limit, options, watch))
    store.once("environment", machine.environment)
    batches = tuple(sorted({1, 32, options.batch}))
    if task["fixed_batch"]:
        if options.batch not in (1, task["fixed_batch"]):
            raise UsageError(f"the network takes batches of {task['fixed_batch']} only, got --batch {options.batch}")
        batches = (task["fixed_batch"],)
    views, score = split.reopen(place), prepare.read_score(task["score"])
    time_s = parse_duration(options.time_limit) or (None if options.trials else presets.time_limit_s(options.effort))
    goals = options.goals if limit.size_bytes is None else (*options.goals, "size")  # a cap is reached with what makes files small
    asked = {"imported": task["imported"], "goals": goals, "time_s": time_s or math.inf}
    return Job(
        folder=place,
        store=store,
        views=views,
        score=score,
        loss=task["loss"],
        catalogue=presets.default(task["kind"], options.effort, **asked),
        settings=Settings(
            limit=limit,
            batch=task["fixed_batch"] or options.batch,
            batches=batches,
            seed=options.seed,
            trials=options.trials,
            time_limit_s=time_s,
            relative_drop=limit.max_drop if relative else None,
            goals=options.goals,
            train_examples=len(views.train),
            select_examples=len(views.select),
            prove_examples=views.prove.size if score.zero_one else None,
        ),
        watch=watch,
        hands=Hands(workers=options.workers, ray=options.ray),
    )


def _prepare(place: Path, given: _Given, limit: Limit, options: Options, watch: Watch) -> dict[str, Any]:
    """Fills the run folder; files are opened in a guarded child."""
    from hasten import prepare

    watch.stage("load", "reading the data and opening the network")
    cut: dict[str, Any] = {"seed": options.seed, "max_drop": limit.max_drop}
    here: dict[str, Any] = {"run": str(place), "deadline_s": _OPENING_S}
    with Child(memory_bytes=_ROOM_BYTES) as child:
        if isinstance(given.data, (str, Path)):
            cut |= {"data": str(given.data), "prove": None if given.prove is None else str(given.prove)}
            cut |= {"target": options.target, "group": options.group}
            task = prepare.call(child, "hasten.prepare:read_and_cut", given.data, refusal=DataRefused, **here, **cut).value
        else:
            task = prepare.cut(place, given.data, given.prove, **cut)
        watch.progress(0.5, "opening the network")
        opened = open_network(child, place, given.model, task, options.score)
    notes = [*task["notes"], *opened["network_notes"]]
    return {**task, **opened, "notes": notes, "model": given.name, "command": options.command}


def open_network(child: Child, place: Path, model: Any, task: dict[str, Any], score: str | None) -> dict[str, Any]:
    """What `prepare.admit` says of a `Source` or a module, for a run folder whose views are cut; `task` is what was said of the data."""
    from hasten import prepare

    here: dict[str, Any] = {"run": str(place), "deadline_s": _OPENING_S, "score": score, "highest_label": task["highest_label"]}
    if isinstance(model, Source):
        words = {"model": model.to_json(), "inputs": task["inputs"]}
        opened = prepare.call(child, "hasten.prepare:open_file", model.path, **here, **words)
    else:
        _save_module(model, place, task["inputs"])
        opened = child.call("hasten.prepare:check_saved", **here)
    found: dict[str, Any] = opened.value
    return found


def _save_module(module: nn.Module, place: Path, names: Sequence[str] = ()) -> None:
    """Saves a user's module in a run folder whose views are cut already. Raises ModelRefused, StorageError."""
    from hasten import prepare
    from hasten.load import files, saved

    network = files.from_module(module, prepare.example(place), names)
    with folder.new_folder(place / "networks" / "given") as fresh:
        try:
            saved.save(network, fresh / "network")
        except StorageError as why:
            if isinstance(why.__cause__, OSError):
                raise
            raise ModelRefused(f"{type(module).__name__} cannot be pickled: {why.__cause__}") from why


def _told(place: Path, job: Job, pick: str | None = None) -> Report:
    """Runs the job, or picks from a finished one, and writes report.json and report.html, in the run folder and beside the result."""
    from hasten.report import json_text
    from hasten.search import export, run

    found = run.optimize(job)
    finished = _with_sentence(run.pick(job, pick) if pick else found)
    text = json_text(finished)
    if finished.artifact:
        export.add(Path(finished.artifact), "report.json", text)
    folder.write(place / "report.json", text)
    write_page(finished, place / "report.html")
    return finished


def write_page(finished: Report, file: Path) -> None:
    """Writes the HTML page of a report."""
    from hasten.report.html import page

    folder.write(file, page(finished))


def _with_sentence(found: Report) -> Report:
    from hasten.report.sentence import verdict_sentence

    return replace(found, sentence=verdict_sentence(found))


def _usable(place: Path) -> Path:
    """The folder, if it is new, empty, or a run of ours."""
    if place.exists() and not place.is_dir():
        raise UsageError(f"--run must be a folder, {place} is a file")
    if place.is_dir() and any(place.iterdir()) and not (place / STORE).exists() and not (place / "lock").exists():
        raise UsageError(f"{place} is not empty and holds no run; choose a new folder")
    return place


def _same(place: Path, store: Store, config: dict[str, Any]) -> None:
    if store.fact("task") is None:  # nothing was opened yet
        store.remember("config", config)
    known = store.once("config", lambda: config)
    if known != json.loads(json.dumps(config)):
        different = sorted(k for k in config if known.get(k) != json.loads(json.dumps(config[k])))
        raise UsageError(f"{place} holds a run with another {', '.join(different)}; choose a new --run folder")


def _digest_data(data: Any) -> str:
    return digest_path(Path(data)) if isinstance(data, (str, Path)) else data.view.fingerprint()


def check_module(module: Any) -> None:
    """Raises UsageError on a model that is no torch module; imports no torch for it."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(module, torch.nn.Module):
        raise UsageError(f"model must be a torch module or the path of one, got {type(module).__name__}")
