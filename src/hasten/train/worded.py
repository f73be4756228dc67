"""Settings in words: `accumulate=4`, `stop.steps=100`, `augmentation.mixup=0.2` set a field of `Fit`, typed as the field is."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hasten.core.errors import UsageError
from hasten.core.names import nearest
from hasten.train.settings import Fit

# What stands in a field by a short name, as the settings that it is short for.
_WRITTEN_OUT: dict[str, Callable[[Fit], Any]] = {"augmentation": Fit.augment, "clip": Fit.clipping, "schedule": Fit.scheduled}
_PLAIN = {str: "a text", float: "a number", int: "a whole number", bool: "true or false", type(None): "none"}
_ORDER = [bool, int, float, str]  # the narrower first


def worded(settings: Fit, words: Sequence[str]) -> Fit:
    """`settings` with fields set by words such as `NAME=VALUE`, of nested settings by `NAME.FIELD=VALUE`; the last word counts.

    Values of several parts have commas between, pairs a colon: `freeze=conv*,fc`, `rates=head:10,body.*:0.1`.

    Raises:
        UsageError: a name that is no field, with the nearest that are; a value that is not of its kind, or out of its range.

    >>> worded(Fit(), ["accumulate=4", "stop.steps=100"]).stop.steps
    100
    """
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, str]] = {}
    for word in words:
        path, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--set must look like NAME=VALUE, got {word!r}")
        name, dot, field = path.partition(".")
        if path not in _known(settings):
            inside = [one.rpartition(".")[2] for one in _fields_of(settings, name)] if name in get_type_hints(Fit) else []
            way = f"{name} has {', '.join(inside)}" if inside else nearest(path, _known(settings))
            raise UsageError(f"no field of Fit is named {path!r}; {way}")
        if dot:
            nested.setdefault(name, {})[field] = value
        else:
            own[name] = _of_kind(get_type_hints(Fit)[name], path, value)
    settings = replace(settings, **own)
    return replace(settings, **{name: _inside(settings, name, changes) for name, changes in nested.items()})


def _inside(settings: Fit, name: str, changes: dict[str, str]) -> Any:
    found = _nested(settings, name)
    hints = get_type_hints(type(found))
    for field in changes:  # a schedule that was named by another word has other fields
        if field not in hints:
            raise UsageError(f"no field of {name} is named {field!r}; {nearest(field, hints)}")
    return replace(found, **{field: _of_kind(hints[field], f"{name}.{field}", value) for field, value in changes.items()})


def _nested(settings: Fit, name: str) -> Any:
    """The settings behind a field, with their defaults where there are none yet; None where the field has none."""
    value = _WRITTEN_OUT[name](settings) if name in _WRITTEN_OUT else getattr(settings, name)
    if is_dataclass(value):
        return value
    kinds = [kind for kind in _members(get_type_hints(Fit)[name]) if is_dataclass(kind)]
    return kinds[0]() if kinds else None  # type: ignore[operator]


def _known(settings: Fit) -> list[str]:
    return [name for field in fields(Fit) for name in (field.name, *_fields_of(settings, field.name))]


def _fields_of(settings: Fit, name: str) -> Iterator[str]:
    if name == "schedule":  # one word may choose it and the next set its fields
        from hasten.train.schedules import NAMED

        yield from dict.fromkeys(f"{name}.{field.name}" for one in (*NAMED.values(), settings.scheduled()) for field in fields(one))  # type: ignore[arg-type]
    elif (found := _nested(settings, name)) is not None:
        yield from (f"{name}.{field.name}" for field in fields(found))


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _of_kind(kind: Any, name: str, value: str) -> Any:
    """The value as its field's type has it."""
    members = _members(kind)
    literal = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    if value in literal:
        return value
    if value == "none" and type(None) in members:
        return None
    plain = [member for member in _ORDER if member in members]
    several = [member for member in members if get_origin(member) is tuple]
    for read in (*(_READ[member] for member in plain if member is not str), *(_several(member) for member in several)):
        try:
            return read(value)
        except ValueError:
            continue
    if str in plain:
        return value
    told = [f"one of {', '.join(literal)}"] if literal else []
    told += [_PLAIN[member] for member in members if member in _PLAIN] + [_told(member) for member in several]
    if inside := [f"{name}.{field.name}" for member in members if is_dataclass(member) for field in fields(member)]:
        told.append(f"set field by field: {', '.join(inside)}")
    raise UsageError(f"{name} must be {' or '.join(told)}, got {value!r}")


def _truth(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError(value)
    return value == "true"


_READ: dict[type, Callable[[str], Any]] = {bool: _truth, int: int, float: float, str: str}


def _several(kind: Any) -> Callable[[str], tuple[Any, ...]]:
    """Reads a tuple: of parts of one kind, of as many as the type has, or of pairs."""
    parts = get_args(kind)

    def read(value: str) -> tuple[Any, ...]:
        found = [word.strip() for word in value.split(",")] if value else []
        if get_origin(parts[0]) is tuple:
            pairs = [word.rpartition(":") for word in found]
            if not all(colon for _, colon, _ in pairs):
                raise ValueError(value)
            return tuple((pattern, float(factor)) for pattern, _, factor in pairs)
        if parts[-1] is not Ellipsis and len(found) != len(parts):
            raise ValueError(value)
        return tuple(_READ[parts[0]](word) for word in found)

    return read


def _told(kind: Any) -> str:
    parts = get_args(kind)
    if get_origin(parts[0]) is tuple:
        return "pairs of a text and a number, as in a:b,c:d"
    count = "" if parts[-1] is Ellipsis else f"{len(parts)} "
    return f"{count}{'texts' if parts[0] is str else 'numbers'} with commas between"
