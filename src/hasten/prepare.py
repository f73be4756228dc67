"""Filling a new run folder: the data cut and sealed, the network opened and checked.

The functions with JSON arguments run in a guarded child, since files from outside are opened there and nowhere else.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from hasten.core import folder
from hasten.core.data import View
from hasten.core.errors import DataRefused
from hasten.core.network import Arrays, Network
from hasten.core.score import Score
from hasten.search.workshop import ORIGINAL

_EXAMPLE = 4
_FEWEST = 2
_LOOK = 256  # rows that the score is chosen by


def read_and_cut(
    *, run: str, data: str, prove: str | None, target: str | None, group: str | None, seed: int, max_drop: float
) -> dict[str, Any]:
    """Reads data files, cuts them into views under `run/views`, *prove* sealed."""
    from hasten.load.data import read

    loaded = read(data, target=target, group=group)
    held_out = read(prove, target=target, group=group, classes=loaded.classes) if prove else None
    return cut(Path(run), loaded, held_out, seed=seed, max_drop=max_drop)


def cut(run: Path, data: Any, prove: Any, *, seed: int, max_drop: float) -> dict[str, Any]:
    """Cuts what was read into views under `run/views`."""
    from hasten.load import split

    parts = split.split(data, prove, seed=seed, max_drop=max_drop)
    for name in ("select", "prove"):
        if len(getattr(parts, name)) < _FEWEST:
            raise DataRefused(f"{len(data.view)} examples are too few: {name} gets {len(getattr(parts, name))} of them and needs {_FEWEST}")
    split.seal(parts, run)
    sizes = {name: len(getattr(parts, name)) for name in ("train", "calibrate", "select", "prove")}
    labels = parts.train.labels
    loss = "original" if labels is None else "classes" if labels.dtype.kind in "iu" else "values"
    return {
        "examples": sizes,
        "provenance": parts.provenance,
        "notes": list(parts.notes),
        "classes": list(data.classes or ()),
        "loss": loss,
        "highest_label": None if loss != "classes" else max(int(p.labels.max()) for p in _labelled(parts)),
    }


def _labelled(parts: Any) -> list[Any]:
    return [part for name in ("train", "select", "prove") if len(part := getattr(parts, name)) and part.labels is not None]


def example(run: Path) -> Arrays:
    """A few rows of the train view."""
    train = View.load(run / "views" / "train")
    if not len(train):
        raise DataRefused("the train view is empty; give more data")
    rows = [a[np.arange(_EXAMPLE) % len(train)] for a in train.inputs]
    return tuple(np.ascontiguousarray(r) for r in rows)


def open_file(*, run: str, model: str, score: str | None, highest_label: int | None) -> dict[str, Any]:
    """Opens a model file, checks it on real rows and saves it as `run/networks/original`."""
    from hasten.load import files

    network = files.open_network(Path(model), example(Path(run)))
    return admit(Path(run), network, score, highest_label)


def check_saved(*, run: str, score: str | None, highest_label: int | None) -> dict[str, Any]:
    """The same for a module that the parent saved there."""
    from hasten.load import saved

    return admit(Path(run), saved.load(Path(run) / "networks" / "given" / "network"), score, highest_label)


def admit(run: Path, network: Network, score: str | None, highest_label: int | None) -> dict[str, Any]:
    """Runs the network on its example, checks labels against its outputs, chooses the score, saves it as the original."""
    from hasten.load import files, saved
    from hasten.load.lower import forward
    from hasten.measure import scores

    network = files.check_forward(network)
    train = View.load(run / "views" / "train").take(slice(0, network.fixed_batch or _LOOK))
    outputs, labels = forward(network, tuple(np.array(a) for a in train.inputs)), train.labels
    if highest_label is not None and outputs[0].ndim == 2 and 1 < outputs[0].shape[1] <= highest_label:
        raise DataRefused(
            f"the network has {outputs[0].shape[1]} outputs, so labels must be in [0, {outputs[0].shape[1]}), got {highest_label}; "
            "do the labels start at 1?"
        )
    chosen = scores.choose(labels, outputs, name=score)
    with folder.new_folder(run / ORIGINAL) as fresh:
        saved.save(network, fresh / "network")
    return {
        "kind": network.kind,
        "fixed_batch": network.fixed_batch,
        "score": {"name": type(chosen).__name__, **dataclasses.asdict(chosen)},  # type: ignore[call-overload]
        "score_name": chosen.name,
        "summary": files.summarize(network),
    }


def read_score(record: dict[str, Any]) -> Score:
    """The score that `admit` chose."""
    from hasten.measure import scores

    settings = {k: v for k, v in record.items() if k != "name"}
    chosen: Score = getattr(scores, record["name"])(**settings)
    return chosen
