"""Filling a new run folder: the data cut and sealed, the network opened and checked.

The functions with JSON arguments run in a guarded child, since files from outside are opened there and nowhere else.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from hasten.core import folder
from hasten.core.child import Child, Reply
from hasten.core.data import View
from hasten.core.errors import ChildFailed, DataRefused, HastenError, ModelRefused
from hasten.core.network import Arrays, Network
from hasten.core.recipe import fingerprint
from hasten.core.runner import batch_of, piecewise
from hasten.core.score import Score
from hasten.load.guards.places import room_for
from hasten.search.workshop import ORIGINAL

_EXAMPLE = 4
_FEWEST = 2
_DROP = 0.01  # the cut's own default aim
_LOOK = 256  # labels that the score is chosen by


def call(child: Child, function: str, file: str | Path, /, *, refusal: type[HastenError] = ModelRefused, **values: Any) -> Reply:
    """Calls a function of a guarded child that opens `file`. Whatever the file does to the child, it is refused in one line.

    Raises:
        HastenError: what the function raised; `refusal` where it raised what no reader should, or the child died.
    """
    try:
        return child.call(function, **values)
    except ChildFailed as why:
        raise refusal(f"{Path(file).name} cannot be opened: {why}") from why


def read_and_cut(
    *, run: str, data: str, prove: str | None, target: str | None, group: str | None, seed: int, max_drop: float
) -> dict[str, Any]:
    """Reads data files, cuts them into views under `run/views`, *prove* sealed."""
    from hasten.load.data import read

    with room_for(*filter(None, (data, prove))):
        loaded = read(data, target=target, group=group)
        held_out = read(prove, target=target, group=group, classes=loaded.classes) if prove else None
    return cut(Path(run), loaded, held_out, seed=seed, max_drop=max_drop)


def cut(run: Path, data: Any, prove: Any, *, seed: int, max_drop: float) -> dict[str, Any]:
    """Cuts what was read into views under `run/views`."""
    from hasten.load import split
    from hasten.load.examples import Loaded
    from hasten.load.naming import arranged

    if isinstance(data, Loaded) and isinstance(prove, Loaded):
        prove = arranged(prove, data.names)
    parts = split.split(data, prove, seed=seed, max_drop=max_drop)
    for name in ("select", "prove"):
        if len(getattr(parts, name)) < _FEWEST:
            raise DataRefused(f"{len(data.view)} examples are too few: {name} gets {len(getattr(parts, name))} of them and needs {_FEWEST}")
    split.seal(parts, run)
    sizes = {name: len(getattr(parts, name)) for name in ("train", "calibrate", "select", "prove")}
    return {
        "examples": sizes,
        "provenance": parts.provenance,
        "notes": list(parts.notes),
        "classes": list(data.classes or ()),
        "inputs": list(data.names),
        **_learning(parts.train, parts.select, parts.prove),
    }


def read_and_keep_back(*, run: str, data: str, target: str | None, group: str | None, seed: int) -> dict[str, Any]:
    """Reads data files and cuts them for `apply`."""
    from hasten.load.data import read

    with room_for(data):
        loaded = read(data, target=target, group=group)
    return keep_back(Path(run), loaded, seed=seed)


def keep_back(run: Path, data: Any, *, seed: int) -> dict[str, Any]:
    """Cuts what was read in two under `run/views`: select, a tenth or so, for the score; the rest for the steps."""
    from hasten.load import split

    parts = split.split(data, seed=seed, max_drop=_DROP)
    if len(parts.select) < _FEWEST:
        raise DataRefused(f"{len(data.view)} examples are too few: {len(parts.select)} are left to score, {_FEWEST} are needed")
    train = _joined(parts.train, parts.prove)
    with folder.new_folder(run / "views") as fresh:
        for name, view in (("train", train), ("calibrate", parts.calibrate), ("select", parts.select)):
            view.save(fresh / name)
    examples = {"train": len(train), "score": len(parts.select)}
    return {"examples": examples, "notes": list(data.notes), "inputs": list(data.names), **_learning(train, parts.select)}


def read_file(*, run: str, data: str, target: str | None, group: str | None, classes: list[str], inputs: list[str]) -> dict[str, Any]:
    """Reads data files for `evaluate`."""
    with room_for(data):
        return read_whole(run=run, data=data, target=target, group=group, classes=classes, inputs=inputs)


def read_whole(*, run: str, data: Any, target: str | None, group: str | None, classes: list[str], inputs: list[str]) -> dict[str, Any]:
    """Reads data into the one view under `run/views` that networks are opened on, and a few rows for what calibrates nothing.

    Labels that are names get their places in `classes`, inputs theirs in `inputs`, where there are some.
    """
    from hasten.load.data import read
    from hasten.load.naming import arranged

    loaded = read(data, target=target, group=group)
    if loaded.classes and classes and not isinstance(data, View):
        loaded = read(data, target=target, group=group, classes=tuple(classes))
    loaded = arranged(loaded, inputs)
    with folder.new_folder(Path(run) / "views") as fresh:
        loaded.view.save(fresh / "train")
        loaded.view.take(slice(0, _EXAMPLE)).save(fresh / "calibrate")
    described = {"notes": list(loaded.notes), "classes": list(loaded.classes or ()), "inputs": list(loaded.names)}
    return {**described, **_learning(loaded.view)}


def _joined(one: View, other: View) -> View:
    labels = None if one.labels is None or other.labels is None else np.concatenate([one.labels, other.labels])
    return View(inputs=tuple(np.concatenate(pair) for pair in zip(one.inputs, other.inputs, strict=True)), labels=labels)


def _learning(train: View, *others: View) -> dict[str, Any]:
    """What steps learn with, and the highest class label there is."""
    labels = train.labels
    loss = "original" if labels is None else "classes" if labels.dtype.kind in "iu" else "values"
    known = [view.labels for view in (train, *others) if len(view) and view.labels is not None]
    return {"loss": loss, "highest_label": max(int(one.max()) for one in known) if loss == "classes" else None}


def example(run: Path) -> Arrays:
    """A few rows of the train view."""
    train = View.load(run / "views" / "train")
    if not len(train):
        raise DataRefused("the train view is empty; give more data")
    rows = [a[np.arange(_EXAMPLE) % len(train)] for a in train.inputs]
    return tuple(np.ascontiguousarray(r) for r in rows)


def open_file(*, run: str, model: dict[str, Any], inputs: list[str], score: str | None, highest_label: int | None) -> dict[str, Any]:
    """Opens a model file, checks it on real rows and saves it as `run/networks/original`."""
    from hasten.load import files
    from hasten.load.source import Source

    network = files.open_in_room(Source(**model), example(Path(run)), inputs)
    return admit(Path(run), network, score, highest_label)


def check_saved(*, run: str, score: str | None, highest_label: int | None) -> dict[str, Any]:
    """The same for a module that the parent saved there."""
    from hasten.load import saved

    return admit(Path(run), saved.load(Path(run) / "networks" / "given" / "network"), score, highest_label)


def admit(run: Path, network: Network, score: str | None, highest_label: int | None) -> dict[str, Any]:
    """Runs the network on its example, checks labels against its outputs, chooses the score, saves it as the original."""
    from hasten.load import files, saved
    from hasten.load.lower import forward, reason
    from hasten.measure import scores

    network = files.check_forward(network)
    train = View.load(run / "views" / "train")
    size = network.fixed_batch or batch_of(train.inputs)
    rows, labels = tuple(np.array(a[:size]) for a in train.inputs), None if train.labels is None else train.labels[:_LOOK]
    try:
        outputs = piecewise(lambda *full: forward(network, full), rows, size) if network.fixed_batch else forward(network, rows)
    except HastenError:
        raise
    except Exception as why:  # a network can raise anything; it ran on the example
        raise DataRefused(
            f"the network runs on the first examples and fails on the first {len(rows[0])}: {reason(why)}; "
            "is every value one that it takes, such as a token id below the size of the embedding?"
        ) from why
    if highest_label is not None and outputs[0].ndim == 2 and 1 < outputs[0].shape[1] <= highest_label:
        hint = "; do the labels start at 1?" if highest_label == outputs[0].shape[1] else ""
        raise DataRefused(
            f"the network has {outputs[0].shape[1]} outputs, so labels must be in [0, {outputs[0].shape[1]}), got {highest_label}{hint}"
        )
    chosen = scores.choose(labels, outputs, name=score)
    notes = [*network.notes, *([f"scored is the first of {len(outputs)} outputs"] if len(outputs) > 1 else [])]
    with folder.new_folder(run / ORIGINAL) as fresh:
        saved.save(network, fresh / "network")
    return {
        "kind": network.kind,
        "architecture": architecture(network),
        "imported": network.source is not None,
        "network_notes": notes,
        "fixed_batch": network.fixed_batch,
        "score": {"name": type(chosen).__name__, **dataclasses.asdict(chosen)},  # type: ignore[call-overload]
        "score_name": chosen.name,
        "summary": files.summarize(network),
    }


def architecture(network: Network) -> str:
    """A digest of the layers and the shapes of the weights: equal for two trainings of one network."""
    if network.kind == "module":
        layers: list[Any] = [[name, type(layer).__name__, layer.extra_repr()] for name, layer in network.module.named_modules()]
        return fingerprint([layers, [[name, list(value.shape)] for name, value in network.module.state_dict().items()]])
    graph = network.graph.graph
    return fingerprint([[node.op_type for node in graph.node], [[t.name, list(t.dims)] for t in graph.initializer]])


def read_score(record: dict[str, Any]) -> Score:
    """The score that `admit` chose."""
    from hasten.measure import scores

    settings = {k: v for k, v in record.items() if k != "name"}
    chosen: Score = getattr(scores, record["name"])(**settings)
    return chosen
