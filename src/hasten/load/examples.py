"""Examples as they came in, made uniform and checked once, whatever file or object they came from.

Inputs, each (n, …): floats become float32; uint8, int32, int64 and bool stay what they are (pixels, tokens, masks: only
the network's owner knows how to scale them); other integers become int64.
Labels: integers, booleans and text name classes and become int64, (n,); floats are values to predict, float32, (n, …),
even where all of them are whole numbers. A trailing axis of length 1 is taken off: (n, 1) becomes (n,).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hasten.core.data import Array, View
from hasten.core.errors import DataRefused, OutOfResources, UsageError
from hasten.load.guards.places import most_bytes

FEWEST = 3
_LABEL_NAMES = ("y", "label", "labels", "target")
_KEPT = (np.uint8, np.int32, np.int64, np.bool_, np.float32)
_CHECKED_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """A data set in memory, checked.

    Args:
        view: inputs and labels.
        classes: the names behind the labels 0, 1, …; None where the labels came as numbers.
        groups: (n,) names or numbers; examples of one group belong together. None without groups.
        notes: plain sentences for the report.
        names: of the inputs, where the data had some.
    """

    view: View
    classes: tuple[str, ...] | None = None
    groups: Array | None = None
    notes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.view)


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What the user says about names: the part that holds the labels, the part that holds the groups, the classes in order."""

    target: str | None = None
    group: str | None = None
    classes: tuple[str, ...] | None = None


def assemble(parts: Mapping[str, Any], naming: Naming, *, where: str, notes: tuple[str, ...] = ()) -> Loaded:
    """The named arrays as a data set: one of them the labels, perhaps one the groups, the others the inputs in their order.

    Inputs that are all called x0, x1, … come in the order of their numbers.
    """
    inputs, target = roles(list(parts), naming, where=where)
    if all(re.fullmatch(r"x\d+", name) for name in inputs):
        inputs = sorted(inputs, key=lambda name: int(name[1:]))
    found = checked(
        [parts[name] for name in inputs],
        None if target is None else parts[target],
        groups=None if naming.group is None else parts[naming.group],
        classes=naming.classes,
        notes=notes,
    )
    return replace(found, names=tuple(inputs))


def roles(names: Sequence[str], naming: Naming, *, where: str) -> tuple[list[str], str | None]:
    """The names of the inputs, and of the labels where there are any.

    Without a word from the user the labels are the one part named y, label, labels or target.
    """
    for asked in (naming.target, naming.group):
        if asked is not None and asked not in names:
            raise UsageError(f"{where} has no {asked!r}; it has {listed(names)}")
    target = naming.target
    if target is None:
        likely = [name for name in names if name.lower() in _LABEL_NAMES and name != naming.group]
        if len(likely) > 1:
            raise UsageError(f"{where} has {listed(likely)}, each of which could be the labels; say which with --target")
        target = likely[0] if likely else None
    inputs = [name for name in names if name not in (target, naming.group)]
    if not inputs:
        raise DataRefused(f"{where} must hold inputs beside labels and groups, got only {listed(names)}")
    return inputs, target


def checked(
    inputs: Sequence[Any],
    labels: Any = None,
    *,
    groups: Any = None,
    classes: tuple[str, ...] | None = None,
    notes: tuple[str, ...] = (),
) -> Loaded:
    """Converts as the head of this file says, and refuses what no run could use.

    Args:
        inputs: one array-like per network input.
        labels: array-like, or None.
        groups: (n,) array-like, or None.
        classes: the names that text labels may have, in the order of their numbers; None takes those present, sorted.
        notes: are handed on.

    Raises:
        DataRefused: fewer than 3 examples, lengths that differ, NaN or infinite values, labels that are negative or all
            alike, several integers per label, objects.
    """
    arrays = [as_array(value, f"input {i}") for i, value in enumerate(inputs)]
    target = None if labels is None else as_array(labels, "the labels")
    members = None if groups is None else as_array(groups, "the groups")
    _check_lengths(arrays, target, members)
    converted = tuple(_input(array, f"input {i}") for i, array in enumerate(arrays))
    if target is not None:
        target, classes, more = _labels(target, classes)
        notes = (*notes, *more)
    if members is not None:
        _check_groups(members)
    return Loaded(view=View(inputs=converted, labels=target), classes=classes, groups=members, notes=notes)


def check_labels(labels: Array | None, outputs: int) -> None:
    """Refuses class labels that the network cannot give.

    Args:
        labels: of the data; values (floats) and None always pass.
        outputs: how many outputs the network has for one example. A single one is read as two classes.

    Raises:
        DataRefused: naming the largest label.
    """
    if labels is None or labels.dtype.kind != "i":
        return
    wrong = np.flatnonzero(np.asarray(labels) >= max(outputs, 2))
    if len(wrong):
        raise DataRefused(
            f"class labels must be in [0, {max(outputs, 2)}), one for each class, got {int(np.max(labels))} "
            f"({_count(len(wrong), len(labels))}, the first is example {wrong[0]}); do the labels start at 1?"
        )


def encode(names: Array, classes: tuple[str, ...] | None) -> tuple[Array, tuple[str, ...]]:
    """Text labels as numbers: their place in `classes`, or among the sorted names where that is None."""
    present, codes = np.unique(names.astype(str), return_inverse=True)
    if classes is None:
        return codes.reshape(-1).astype(np.int64), tuple(str(name) for name in present)
    place = {name: i for i, name in enumerate(classes)}
    unknown = [str(name) for name in present if str(name) not in place]
    if unknown:
        raise DataRefused(f"labels must be among the classes {listed(classes)}, got {listed(unknown)}")
    return np.array([place[str(name)] for name in present], dtype=np.int64)[codes.reshape(-1)], classes


def as_array(value: Any, what: str, *, single: bool = False) -> Array:
    """`value` as a NumPy array of numbers or text; tensors are taken off their device and graph.

    Only where it is a `single` example may it have no axis.
    """
    torch = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as why:
        raise DataRefused(f"{what} must be one array with a row for each example, got {type(value).__name__}: {why}") from why
    if array.dtype.kind not in "biufU":
        raise DataRefused(f"{what} must be an array of numbers, got dtype {array.dtype} from {type(value).__name__}")
    if array.ndim == 0 and not single:
        raise DataRefused(f"{what} must have a row for each example, got the single value {array}")
    return array


def room_bytes() -> int:
    """What one data set may take: a third of the free memory, for reading and cutting hold it up to three times."""
    return free_bytes() // 3


def free_bytes() -> int:
    """Memory that can be had without swapping; a container's limit counts."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return free


def check_room(size_bytes: int, what: str) -> None:
    """Refuses before anything is allocated. Raises OutOfResources."""
    room = room_bytes()
    if size_bytes > room:
        raise OutOfResources(
            f"{what} would take {size_bytes / 1e9:.1f} GB and there is room for {room / 1e9:.1f} GB "
            f"(a third of the free memory); give a smaller part of the data"
        )


def check_growth(size_bytes: int, file_bytes: int, what: str) -> None:
    """Refuses what unpacks to more than `most_bytes` of its file, before anything is allocated. Raises DataRefused."""
    if size_bytes > most_bytes(file_bytes):
        raise DataRefused(
            f"{what} would take {size_bytes:,} bytes and lies in {file_bytes:,}, as files do that are made to fill a memory; "
            f"at most {most_bytes(file_bytes):,} are taken: give it in parts, or stored without compression"
        )


def listed(names: Sequence[str]) -> str:
    """Up to ten names for a message, the last ones among them: labels often come last.

    >>> listed(["a", "b"])
    'a, b'
    >>> listed([f"f{i}" for i in range(20)] + ["species"])
    'f0, f1, f2, f3, f4, f5, f6, …, f19, species (21 in all)'
    """
    shown = [str(name) for name in names]
    if len(shown) > 10:
        return f"{', '.join([*shown[:7], '…', *shown[-2:]])} ({len(shown)} in all)"
    return ", ".join(shown) or "none"


def _check_lengths(inputs: Sequence[Array], labels: Array | None, groups: Array | None) -> None:
    parts = {f"input {i}": len(a) for i, a in enumerate(inputs)}
    parts |= {} if labels is None else {"labels": len(labels)}
    parts |= {} if groups is None else {"groups": len(groups)}
    if len(set(parts.values())) > 1:
        lengths = ", ".join(f"{name}: {length}" for name, length in parts.items())
        raise DataRefused(f"inputs and labels must have one row for each example, got {lengths}")
    n = len(inputs[0])
    if n == 0:
        raise DataRefused("the data must hold examples, got an empty set")
    if n < FEWEST:
        raise DataRefused(f"the data must hold at least {FEWEST} examples, got {n}")


def _input(array: Array, what: str) -> Array:
    if array.dtype.kind == "U":
        raise DataRefused(f"{what} must hold numbers, got text; turn it into tokens or features first")
    if array.size == 0:
        raise DataRefused(f"{what} must have at least one value for each example, got shape {array.shape}")
    if array.dtype.type not in _KEPT or not array.dtype.isnative:
        with np.errstate(over="ignore"):  # a value too large for float32 becomes infinite and is refused as such
            array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
    _check_finite(array, what)
    return array


def _labels(array: Array, classes: tuple[str, ...] | None) -> tuple[Array, tuple[str, ...] | None, tuple[str, ...]]:
    if array.ndim > 1 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(array, dtype=np.float32)
        _check_finite(values, "the labels")
        note = ""
        if values.ndim == 1 and (values == np.round(values)).all():
            note = "the labels are floats and were taken as values, though all are whole; store classes as integers"
        elif values.ndim == 2 and values.shape[1] > 1 and np.isin(values, (0, 1)).all() and (values.sum(1) == 1).all():
            note = "the labels are floats and were taken as values, though they look one-hot; for classes give labels.argmax(1)"
        return values, None, (note,) if note else ()
    if array.ndim > 1:
        raise DataRefused(
            f"class labels must be one number for each example, shape (n,), got shape {array.shape}; "
            f"for one-hot rows give labels.argmax(1), for values give floats"
        )
    if array.dtype.kind == "U":
        array, classes = encode(array, classes)
    codes = np.ascontiguousarray(array, dtype=np.int64)
    _check_classes(codes)
    if classes is not None:
        check_labels(codes, len(classes))
    return codes, classes, ()


def _check_classes(codes: Array) -> None:
    negative = np.flatnonzero(codes < 0)
    if len(negative):
        raise DataRefused(
            f"class labels must be 0 or above, got {int(codes[negative[0]])} "
            f"({_count(len(negative), len(codes))}, the first is example {negative[0]}); for values give floats"
        )
    if codes.min() == codes.max():
        raise DataRefused(f"the labels must name at least two classes, got {int(codes[0])} for every example")


def _check_groups(groups: Array) -> None:
    if groups.ndim != 1:
        raise DataRefused(f"groups must be one name or number for each example, shape (n,), got shape {groups.shape}")
    if groups.dtype.kind == "f":
        _check_finite(groups, "the groups")


def _check_finite(array: Array, what: str) -> None:
    if array.dtype.kind != "f":
        return
    wrong: list[int] = []
    step = max(1, _CHECKED_AT_ONCE // max(1, array[0].size))
    for start in range(0, len(array), step):
        piece = np.asarray(array[start : start + step])
        bad = ~np.isfinite(piece.reshape(len(piece), -1)).all(axis=1)
        wrong += (start + np.flatnonzero(bad)).tolist()
    if wrong:
        raise DataRefused(
            f"{what} must be finite float32 numbers, got NaN or infinity in {_count(len(wrong), len(array))}, "
            f"the first is example {wrong[0]}; remove or fill them"
        )


def _count(part: int, whole: int) -> str:
    return f"{part} of {whole} examples"
