"""Checks of settings that steps have in common."""

from __future__ import annotations

import dataclasses
import numbers
import re
from typing import Any

from hasten.core.errors import UsageError

_WHOLE = re.compile(r"(int|Literal\[[\d, ]+\])( \| None)?")
_PAIR = re.compile(r"tuple\[int, int\]( \| None)?")


def whole_numbers(step: Any) -> None:
    """Checks the fields of a step that are annotated as whole numbers, or as pairs of them.

    Raises:
        UsageError: naming the field that holds something else.
    """
    for field in dataclasses.fields(step):
        kind, value = str(field.type), getattr(step, field.name)
        if value is None and kind.endswith("| None"):
            continue
        if _WHOLE.fullmatch(kind) and not _whole(value):
            raise UsageError(f"{field.name} must be a whole number, got {value!r}")
        if _PAIR.fullmatch(kind) and not (isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_whole, value))):
            raise UsageError(f"{field.name} must be two whole numbers, got {value!r}")


def _whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
