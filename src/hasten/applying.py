"""A recipe again: the steps and the engine that one search has found, applied to another network. Nothing is searched or proved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.core import folder
from hasten.core.child import Child
from hasten.core.data import View
from hasten.core.errors import BackendMissing, DataRefused, HastenError, ModelRefused, Unsupported, UsageError
from hasten.core.network import Arrays
from hasten.core.recipe import Engine, Recipe, Step, describe, part_from_json
from hasten.core.runner import Runner
from hasten.core.score import Score
from hasten.load.guards import read_json
from hasten.load.source import Source
from hasten.search import export, workshop
from hasten.search.bench import check_alike
from hasten.search.watch import Watch, Watcher, nobody
from hasten.search.workshop import Workshop

RECIPE = "recipe.json"
_OPENING_S = 600.0
_MAKING_S = 7 * 86_400.0
_ROOM_BYTES = 12 << 30
_README = """\
# {words}

This folder runs without hasten.

    from load import load
    run = load(".")          # or this folder's path
    outputs = run(inputs)    # numpy arrays, one per input, first axis the batch; gives a tuple of arrays

`load.py` names the packages that it needs: {needs}. `recipe.json` rebuilds the network from the original with hasten,
`applied.json` holds its score before and after, `manifest.json` the SHA-256 of every file.

**Nothing is certified.** {caution}
"""
_CAUTION = "The recipe was applied as it is, and the scores are estimates; `hasten optimize --prove` searches and proves."


@dataclass(frozen=True, kw_only=True)
class Columns:
    """How data and score are read.

    Args:
        score: "accuracy", "squared-error", "macro-f1", "auc", …; None lets the data choose.
        target: the column or array with the labels; group: the one whose equal values belong together.
    """

    score: str | None = None
    target: str | None = None
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What became of the network.

    Args:
        artifact: the folder with the result.
        recipe, words: what was applied, as JSON and as a person would type it.
        score_name: what was scored, on examples that no step has seen.
        score_before, score_after: of the network as given and of the result, higher is better.
        examples: {"train": seen by the steps, "score": kept back from them}.
        size_bytes, parameters, macs: {"before": of the network as given, "after": of the result}, None where unknown.
        fixed_batch: the only batch size that the result takes, None for any.
        notes: what must be said about the data.
        certified: always False: nothing was proved.
    """

    artifact: str
    recipe: dict[str, Any]
    words: str
    score_name: str
    score_before: float
    score_after: float
    examples: dict[str, int]
    size_bytes: dict[str, int]
    parameters: dict[str, int | None]
    macs: dict[str, int | None]
    fixed_batch: int | None = None
    notes: tuple[str, ...] = ()
    certified: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        counts = [
            f"{name} {value['before']:,} → {value['after']:,}"
            for name, value in (("bytes", self.size_bytes), ("parameters", self.parameters), ("MACs", self.macs))
            if value["before"] is not None and value["after"] is not None
        ]
        seen = f"{self.examples['score']:,} examples kept back from {self.examples['train']:,} that the steps saw"
        return "\n".join(
            [
                self.words,
                f"{self.score_name} {self.score_before:.4f} → {self.score_after:.4f} on {seen}",
                " · ".join(counts),
                *self.notes,
                f"Nothing is certified. {_CAUTION}",
                self.artifact,
            ]
        )


def apply(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    model: Any,
    data: Any,
    *,
    out: str | Path,
    columns: Columns | None = None,
    seed: int = 0,
    watcher: Watcher = nobody,
) -> Applied:
    """Applies a recipe to a network and writes the result as a folder that runs without hasten.

    A part of `data` is kept back from the steps and gives the score before and after. The model is left alone. No part of the
    recipe is left out or changed: what cannot be done is an error that names the step.

    Args:
        recipe: itself, its JSON, the path of such a file, or an artifact with a `recipe.json` in it.
        model: a torch module, or where one lies: a path, "net.py:Class", or a `Source` with the weights for the class.
        data: for training, calibrating and scoring: arrays, a Dataset or DataLoader, or a path (see `hasten.load.data.read`).
        out: a new or empty folder.
        columns: which labels, groups and score.
        seed: of the cut and of the steps; the same gives the same result.
        watcher: is told the progress.

    Raises:
        UsageError, DataRefused, ModelRefused, StorageError: see `hasten.core.errors`.
        Unsupported: a step or the engine cannot treat this network.
        BackendMissing: the engine is not here.
    """
    asked, columns, watch = read_recipe(recipe), columns or Columns(), Watch(watcher=watcher)
    if why := asked.engine.available():
        raise BackendMissing(f"{describe(asked.engine)}: {why}")
    with _place(Path(out)) as place, tempfile.TemporaryDirectory(prefix="hasten-") as name:
        work = Path(name)
        watch.stage("load", "reading the data and opening the network")
        task = _prepare(work, model, data, columns, seed)
        _check_form(asked, task)
        made = _make(work, asked, task, seed, watch)
        watch.stage("score", "scoring the network as given and the result")
        before, after = _scores(work, made, task)
        found = Applied(
            artifact=str(place),
            recipe=asked.to_json(),
            words=str(asked),
            score_name=task["score_name"],
            score_before=before,
            score_after=after,
            examples=task["examples"],
            size_bytes={which: folder.size_bytes(work / which) for which in made},
            parameters={which: facts["parameters"] for which, facts in made.items()},
            macs={which: facts["macs"] for which, facts in made.items()},
            fixed_batch=made["after"]["fixed_batch"],
            notes=tuple(task["notes"]),
        )
        _write(work / "after", place, asked, found)
    return found


def read_recipe(given: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """The recipe in a file, an artifact or a JSON object. Raises UsageError naming the part that is wrong."""
    if isinstance(given, Recipe):
        return given
    where, record = ("the recipe", given) if isinstance(given, Mapping) else _opened(Path(given))
    steps, engine = (record.get("steps"), record.get("engine")) if isinstance(record, Mapping) else (None, None)
    if not isinstance(steps, (list, tuple)) or not isinstance(engine, Mapping):
        raise UsageError(f"{where} must be a JSON object with a list `steps` and an `engine`, got {str(record)[:100]}")
    parts = [_part(part, f"{where}, step {number}") for number, part in enumerate(steps, start=1)]
    last = _part(engine, f"{where}, engine")
    for part, needed, kind in (*((p, "apply", "step") for p in parts), (last, "pack", "engine")):
        if not hasattr(part, needed):
            raise UsageError(f"{where}: {type(part).__name__} is no {kind}")
    return Recipe(tuple(parts), last)


def _opened(path: Path) -> tuple[str, Any]:
    file = path / RECIPE if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"no such file: {file}")
    try:
        return str(file), read_json(file.read_bytes(), file.name)
    except (ModelRefused, OSError) as why:
        raise UsageError(f"{file} must hold a recipe as JSON: {why}") from why


def _part(record: Any, where: str) -> Any:
    if not isinstance(record, Mapping) or not isinstance(record.get("name"), str):
        raise UsageError(f"{where}: expected an object with a `name`, got {str(record)[:100]}")
    try:
        return part_from_json(record)
    except (TypeError, ValueError, ImportError) as why:  # of a constructor, or UsageError
        raise UsageError(f"{where}, {record['name']}: {why}") from why


@contextlib.contextmanager
def _place(out: Path) -> Iterator[Path]:
    """The new folder, made at once so that a place that cannot be written is known before the work; gone if it fails."""
    with folder.storage(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"--out must be a new or empty folder, got {out}")
        out.mkdir(parents=True, exist_ok=True)
        whole = out.resolve()
        if whole.stat().st_dev != whole.parent.stat().st_dev or not os.access(whole.parent, os.W_OK):
            raise UsageError(f"--out {out} must lie in a folder that can be written, on the same disk; choose a folder inside it")
    try:
        yield out
    except BaseException:
        with contextlib.suppress(OSError):
            out.rmdir()
        raise


def _prepare(work: Path, model: Any, data: Any, columns: Columns, seed: int) -> dict[str, Any]:
    """Fills the work folder; files are opened in a guarded child."""
    from hasten import prepare, verbs
    from hasten.load.data import read

    given = Source.of(model) if isinstance(model, (str, Path, Source)) else None
    for path in (p for p in (given and given.path, data) if isinstance(p, (str, Path)) and not Path(p).exists()):
        raise UsageError(f"no such file: {path}")
    if given is None:
        verbs.check_module(model)
    here: dict[str, Any] = {"run": str(work), "deadline_s": _OPENING_S}
    with Child(memory_bytes=_ROOM_BYTES) as child:
        if isinstance(data, (str, Path)):
            asked: dict[str, Any] = {"data": str(data), "target": columns.target, "group": columns.group, "seed": seed}
            task = prepare.call(child, "hasten.prepare:read_and_keep_back", data, refusal=DataRefused, **here, **asked).value
        else:
            task = prepare.keep_back(work, read(data, target=columns.target, group=columns.group), seed=seed)
        opened = verbs.open_network(child, work, given or model, task, columns.score)
    return {**task, **opened, "notes": [*task["notes"], *opened["network_notes"]]}


def _check_form(recipe: Recipe, task: dict[str, Any]) -> None:
    for part in recipe.parts:
        if task["kind"] == "graph" and part.takes == "module":
            why = "; ".join(task["network_notes"])
            raise Unsupported(
                f"{describe(part)} needs a torch module, and the network is an ONNX graph ({why}); give it as .pt2 or from Python"
            )


def _make(work: Path, recipe: Recipe, task: dict[str, Any], seed: int, watch: Watch) -> dict[str, dict[str, Any]]:
    """Packs the network as given and what the recipe makes of it, as `work/before` and `work/after`; the facts of both."""
    from hasten import presets

    shop = Workshop(work, loss=task["loss"], seed=seed, deadline_s=_MAKING_S)
    try:
        plain = Recipe((), presets.default(task["kind"], imported=task["imported"]).as_given)
        made = {"before": shop.make(plain, work / "before")}
        watch.stage("apply", str(recipe))
        try:
            made["after"] = shop.make(recipe, work / "after", watch.progress)
        except HastenError as why:
            raise type(why)(f"{_culprit(work, recipe, task['kind'])}: {why}") from why
        return made
    finally:
        shop.close()


def _culprit(work: Path, recipe: Recipe, kind: str) -> str:
    """The part of the recipe that failed: the first whose result is not in the workshop's cache."""
    plan, profile = workshop.actions(recipe, kind), recipe.engine.profile
    for length in range(1, len(plan) + 1):
        action = plan[length - 1]
        if not folder.intact(work / "cache" / workshop.key(plan[:length], profile)):
            return "lowering to ONNX" if isinstance(action, str) else _numbered(recipe, action, plan[: length - 1])
    return _named(recipe.engine, "engine")


def _numbered(recipe: Recipe, step: Step, before: list[workshop.Action]) -> str:
    number = 1 + sum(not isinstance(action, str) for action in before)
    return _named(step, f"step {number} of {len(recipe.steps)}")


def _named(part: Step | Engine, what: str) -> str:
    return f"{what}, {describe(part)}"


def _scores(work: Path, made: dict[str, dict[str, Any]], task: dict[str, Any]) -> tuple[float, float]:
    from hasten import prepare

    score, kept = prepare.read_score(task["score"]), View.load(work / "views" / "select")
    before, after = (_outputs(work / which, made[which], kept) for which in ("before", "after"))
    check_alike(before, after)
    return _score(score, before, before, kept), _score(score, before, after, kept)


def _outputs(package: Path, facts: dict[str, Any], view: View) -> Arrays:
    with Runner(package, fixed_batch=facts["fixed_batch"]) as runner:
        return runner.outputs(view.inputs)


def _score(score: Score, original: Arrays, outputs: Arrays, view: View) -> float:
    target = view.labels if score.target == "labels" else original[0]
    if target is None:
        raise DataRefused(f"the score {score.name} needs labels, and the data has none")
    return score.value(outputs, target)


def _write(package: Path, out: Path, recipe: Recipe, found: Applied) -> None:
    with folder.new_folder(out) as fresh:
        shutil.copytree(package, fresh, dirs_exist_ok=True, ignore=shutil.ignore_patterns(folder.MANIFEST))
        (fresh / RECIPE).write_text(json.dumps(recipe.to_json(), indent=1) + "\n")
        (fresh / "applied.json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
        needs = ", ".join(export.needs((fresh / "load.py").read_text()))
        (fresh / "README.md").write_text(_README.format(words=found.words, needs=needs, caution=_CAUTION))
