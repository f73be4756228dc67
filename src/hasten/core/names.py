"""Names of layers as people write them: patterns, and what was probably meant where one meets nothing."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from hasten.core.errors import UsageError


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that name the closest of the known names.

    >>> nearest("fc1", ["fc", "conv1"])
    'the nearest are fc, conv1'
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    return f"the nearest are {', '.join(close)}" if close else "the network has no named layers"


def patterns(field: str, value: object) -> None:
    """Checks a setting that holds patterns of layer names. Raises TypeError on a plain text."""
    if isinstance(value, str) or not all(isinstance(v, str) for v in value):  # type: ignore[attr-defined]
        raise TypeError(f"{field} must be a tuple of layer names or patterns, got {value!r}")


def meets(name: str, wanted: Sequence[str]) -> bool:
    """Whether the name meets one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)


def check_met(wanted: Iterable[str], known: Iterable[str]) -> None:
    """Raises UsageError, with the nearest names, where a pattern meets none of the known layers."""
    names = list(known)
    for pattern in wanted:
        if not fnmatch.filter(names, pattern):
            raise UsageError(f"no layer is named {pattern!r}; {nearest(pattern, names)}")
