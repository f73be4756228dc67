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
    split.seal(parts, run)
    sizes = {name: len(getattr(parts, name)) for name in ("train", "calibrate", "select", "prove")}
    labels = parts.train.labels
    loss = "original" if labels is None else "classes" if labels.dtype.kind in "iu" else "values"
    return {
        "examples": sizes,
        "provenance": parts.provenance,
        "notes": [*data.notes, *parts.notes],
        "classes": list(data.classes or ()),
        "loss": loss,
    }


def example(run: Path) -> Arrays:
    """A few rows of the train view."""
    train = View.load(run / "views" / "train")
    if not len(train):
        raise DataRefused("the train view is empty; give more data")
    rows = [a[np.arange(_EXAMPLE) % len(train)] for a in train.inputs]
    return tuple(np.ascontiguousarray(r) for r in rows)


def open_file(*, run: str, model: str, score: str | None) -> dict[str, Any]:
    """Opens a model file, checks it on real rows and saves it as `run/networks/original`."""
    from hasten.load import files

    network = files.open_network(Path(model), example(Path(run)))
    return admit(Path(run), network, score)


def check_saved(*, run: str, score: str | None) -> dict[str, Any]:
    """The same for a module that the parent saved there."""
    from hasten.load import saved

    return admit(Path(run), saved.load(Path(run) / "networks" / "given" / "network"), score)


def admit(run: Path, network: Network, score: str | None) -> dict[str, Any]:
    """Runs the network on its example, checks labels against its outputs, chooses the score, saves it as the original."""
    from hasten.load import files, saved
    from hasten.load.data import check_labels
    from hasten.measure import scores

    network, outputs = files.check_forward(network)
    labels = View.load(run / "views" / "train").labels
    if labels is not None and labels.dtype.kind in "iu" and outputs[0].ndim == 2:
        check_labels(np.asarray(labels), outputs[0].shape[1])
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
