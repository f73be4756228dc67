"""Cuts the user's data into train, calibrate, select and the sealed prove.

How many examples each part gets, of n without a given *prove* set (`shares`):
    prove   enough first: two fifths at most (half, where that reaches the fewest that can show anything), else a seventh,
            but no less than `enough` and no more than six times that;
    select  next: a tenth, at most 2,000, at least a fifth or 50 of a small set;
    train   the rest; calibrate is its first 300.
    n             10   100   600  1,000  5,000  70,000      (limit: 1 point at 95 %)
    train          3    30   272    500  2,639  58,000
    select         2    20    60    100    500   2,000
    prove          5    50   268    400  1,861  10,000
Of a given *prove* set of 1,200 units or more a quarter, at most 2,000, selects, and all other data trains: on examples that the
original was trained on, a network that was trained again on others looks worse than it is. Which quarter depends on the content alone,
so that another seed does not prove on what the first one chose by.

Examples with equal inputs, and examples of one group, are one *unit* and stay together. Within each class the units are put
into an order that depends on the seed and the content of the examples alone, not on their place in the file, the machine or a
library's random numbers; the classes are then interleaved in proportion, so that every stretch of the order has each class's
share to within about one example. The parts are stretches of that order and keep it: the first examples of a part are a
stratified sample of it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from hasten.core.data import Array, Provenance, Sealed, View, Views
from hasten.core.errors import DataRefused, StorageError
from hasten.core.folder import new_folder, storage
from hasten.load.data import Loaded, read
from hasten.load.examples import listed
from hasten.load.units import Units, content_digests

_CALIBRATE = 300
_SELECT = 2_000
_SPARE = 1_200
_PARTS = ("train", "calibrate", "select", "prove")


@dataclass(frozen=True, kw_only=True, eq=False)
class Cut:
    """The data in parts, *prove* not yet sealed.

    Args:
        train, calibrate, select, prove: see `core.data.Views`.
        provenance: "held out" where the user gave *prove*, else "unknown".
        notes: plain sentences for the report.
    """

    train: View
    calibrate: View
    select: View
    prove: View
    provenance: Provenance
    notes: tuple[str, ...] = ()


def split(
    data: View | Loaded,
    prove: View | Loaded | None = None,
    *,
    seed: int,
    max_drop: float,
    confidence: float = 0.95,
) -> Cut:
    """Cuts `data` in three, or in two where a *prove* set is given; a large one gives a quarter to *select*.

    Of a given *prove* set every example is used; examples of `data` with the same inputs, or of the same group, are left out.

    Args:
        data: what the network may be changed with.
        prove: what the original network was not trained on, or None.
        seed: equal seeds give equal cuts, whatever the order of the examples.
        max_drop: the limit that *prove* shall show, in the score's unit.
        confidence: of that statement, in (0.5, 1).

    Raises:
        DataRefused: too few independent examples, or two sets that do not belong together.

    >>> view = View(inputs=(np.arange(10.0)[:, None],), labels=np.arange(10) % 2)
    >>> cut = split(view, seed=0, max_drop=0.01)
    >>> len(cut.train), len(cut.select), len(cut.prove)
    (3, 2, 5)
    """
    data = read(data)
    given = None if prove is None else read(prove)
    notes = [*data.notes, *(() if given is None else given.notes)]
    digests = content_digests(data.view.inputs)
    if given is not None:
        _check_same_kind(data, given)
        kept = _apart(data, digests, given)
        if len(kept) < len(data):
            notes.append(_left_out(len(data) - len(kept), data))
            data, digests = _take(data, kept), [digests[i] for i in kept]
    units = Units.of(digests, labels=data.view.labels, groups=data.groups, seed=seed)
    spared = None if given is None else _spared(given)
    _check_parts(units, 3 if given is None else 2 if spared is None else 1)
    _, wanted_select, wanted_prove = shares(len(data), max_drop=_drop(data, max_drop), confidence=confidence)
    proving, rest = units.fill(units.order, wanted_prove, leave=2) if given is None else ([], units.order)
    selecting, training = units.fill(rest, wanted_select, leave=1) if spared is None else ([], rest)
    train = data.view.take(units.members(training))
    select, prove = spared or (data.view.take(units.members(selecting)), data.view.take(units.members(proving)))
    cut = Cut(
        train=train,
        calibrate=train.take(slice(_CALIBRATE)),
        select=select,
        prove=prove if given is None or spared else given.view,
        provenance="unknown" if given is None else "held out",
    )
    if spared:
        notes.append(f"{len(select):,} of the {len(given.view):,} examples of the prove set chose, the others proved")  # type: ignore[union-attr]
    notes += _notes(cut, data, _drop(data, max_drop), confidence)
    return replace(cut, notes=tuple(notes))


def shares(n: int, *, max_drop: float = 0.01, confidence: float = 0.95) -> tuple[int, int, int]:
    """How many of n examples go to train, select and prove; the rule is at the head of this file.

    >>> shares(5_000)
    (2639, 500, 1861)
    """
    usual = fewest(0.01, confidence)
    least = fewest(max_drop, confidence) or usual or 1
    good = enough(max_drop, confidence) or enough(0.01, confidence) or 1
    prove = min(2 * n // 5, max(good, min(n // 7, 6 * good)))
    prove = max(1, prove, min(least, n // 2))
    select = max(1, min(_SELECT, max(n // 10, min(50, n // 5))))
    return n - select - prove, select, prove


def fewest(max_drop: float, confidence: float) -> int | None:
    """The fewest examples that can show a drop of at most `max_drop`: with them, not one prediction may change.

    Tango's upper bound is then z²/(n + z²), so n ≥ z²·(1 − d)/d. None where no number can, or where d is no share in (0, 1).

    >>> fewest(0.01, 0.95)
    268
    """
    if not 0 < max_drop < 1:
        return None
    return math.ceil(NormalDist().inv_cdf(confidence) ** 2 * (1 - max_drop) / max_drop)


def enough(max_drop: float, confidence: float) -> int | None:
    """Examples that show it nine times in ten where nothing is lost and a share of 2·`max_drop` of the predictions changes.

    The paired difference has variance 2d/n, so n = 2·(z + z_β)²/d, with β for 92 %: the normal approximation flatters by two.

    >>> enough(0.01, 0.95)
    1861
    """
    if not 0 < max_drop < 1:
        return None
    return math.ceil(2 * (NormalDist().inv_cdf(confidence) + NormalDist().inv_cdf(0.92)) ** 2 / max_drop)


def seal(cut: Cut, run: Path) -> Views:
    """Writes the cut as `run`/views, whole or not at all, and gives it back with *prove* sealed, the arrays on disk.

    Views that an interrupted run left there are replaced.

    Raises:
        StorageError: the disk refused.
    """
    prove = {"size": len(cut.prove), "fingerprint": cut.prove.fingerprint()}
    facts = {"provenance": cut.provenance, "notes": list(cut.notes), "prove": prove}
    with storage(run), new_folder(run / "views") as fresh:
        for part in _PARTS:
            getattr(cut, part).save(fresh / part)
        (fresh / "cut.json").write_text(json.dumps(facts))
    return reopen(run)


def reopen(run: Path) -> Views:
    """The views that `seal` wrote. Raises StorageError where they are missing or damaged."""
    home, facts = run / "views", _facts(run)
    size, fingerprint = facts["prove"]["size"], facts["prove"]["fingerprint"]

    def read_prove() -> View:
        view = View.load(home / "prove")
        if view.fingerprint() != fingerprint:
            raise StorageError(f"{home / 'prove'} is not what was sealed: its content changed; start again in a new run folder")
        return view

    train, calibrate, select = (View.load(home / part) for part in _PARTS[:3])
    prove = Sealed(read_prove, size=size, fingerprint=fingerprint)
    return Views(train=train, calibrate=calibrate, select=select, prove=prove, provenance=facts["provenance"])


def notes(run: Path) -> tuple[str, ...]:
    """The notes of the cut that `seal` wrote."""
    return tuple(_facts(run)["notes"])


def _spared(given: Loaded) -> tuple[View, View] | None:
    """What selects and what proves of a given *prove* set; None where it is too small to give any away."""
    units = Units.of(content_digests(given.view.inputs), labels=given.view.labels, groups=given.groups, seed=0)
    if len(units) < _SPARE:
        return None
    selecting, proving = units.fill(units.order, min(_SELECT, len(given) // 4), leave=2)
    return given.view.take(units.members(selecting)), given.view.take(units.members(proving))


def _check_parts(units: Units, wanted: int) -> None:
    if len(units) < wanted:
        raise DataRefused(
            f"the data must fall into at least {wanted} independent parts, got {len(units)} from {len(units.unit)} examples: "
            f"the others repeat one another or share a group; a repeat that lies in two groups joins them"
        )


def _check_same_kind(data: Loaded, prove: Loaded) -> None:
    ours, theirs = _kind(data.view), _kind(prove.view)
    if ours != theirs:
        raise DataRefused(f"the prove set must have the inputs and labels of the data, {ours}, got {theirs}")
    if data.classes is not None and prove.classes is not None and data.classes != prove.classes:
        raise DataRefused(
            f"the prove set must have the classes of the data, {listed(data.classes)}, got {listed(prove.classes)}; "
            f"read it with the `classes` of the data"
        )


def _kind(view: View) -> str:
    inputs = ", ".join(f"{array.dtype} {array.shape[1:]}" for array in view.inputs)
    labels = "none" if view.labels is None else f"{view.labels.dtype} {view.labels.shape[1:]}"
    return f"inputs {inputs}; labels {labels}"


def _apart(data: Loaded, digests: list[bytes], prove: Loaded) -> Array:
    """The examples of `data` that have neither their inputs nor their group in the prove set."""
    known = set(content_digests(prove.view.inputs))
    touched = np.array([digest in known for digest in digests])
    if data.groups is not None and prove.groups is not None:
        touched |= np.isin(data.groups.astype(str), prove.groups.astype(str))
    kept = np.flatnonzero(~touched)
    if len(kept) == 0:
        raise DataRefused("the data must hold examples that the prove set does not, got none of its own")
    return kept


def _left_out(count: int, data: Loaded) -> str:
    beside = ", or share a group with it," if data.groups is not None else ""
    return f"{count:,} of {len(data):,} examples of the data occur in the prove set{beside} and were left out"


def _take(data: Loaded, index: Array) -> Loaded:
    return replace(data, view=data.view.take(index), groups=None if data.groups is None else data.groups[index])


def _drop(data: Loaded, max_drop: float) -> float:
    """The limit as a share; 0 where the labels are values, whose score has a unit of its own."""
    labels = data.view.labels
    return max_drop if labels is None or labels.dtype.kind == "i" else 0.0


def _notes(cut: Cut, data: Loaded, max_drop: float, confidence: float) -> list[str]:
    n, least, good = len(cut.prove), fewest(max_drop, confidence), enough(max_drop, confidence)
    said = []
    if least is not None and good is not None and n < good:
        aim = f"to show a drop of at most {_points(max_drop)} at {100 * confidence:.4g} %"
        chance = f"about {good:,} for a good chance if {200 * max_drop:.4g} % of the predictions change"
        said.append(f"prove has {n:,} examples; at least {least:,} are needed {aim}, {chance}")
    if data.groups is not None and cut.provenance == "unknown":
        said.append("the bound counts the examples of prove one by one; it is too narrow if those of one group are alike")
    if cut.train.labels is not None and cut.prove.labels is not None and cut.train.labels.dtype.kind == "i":
        absent = sorted(set(np.unique(cut.prove.labels).tolist()) - set(np.unique(cut.train.labels).tolist()))
        said += [f"train has no example of {len(absent)} classes that prove has: {listed(absent)}"] if absent else []
    return said


def _points(share: float) -> str:
    return "1 point" if share == 0.01 else f"{100 * share:.4g} points"


def _facts(run: Path) -> dict[str, Any]:
    path = run / "views" / "cut.json"
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
        if not (isinstance(facts["prove"]["size"], int) and facts["provenance"] in ("held out", "unknown") and "notes" in facts):
            raise ValueError("not what was written")
    except (OSError, ValueError, KeyError, TypeError) as why:
        raise StorageError(f"cannot read {path}: {why}; start again in a new run folder") from why
    return facts
