"""JSON of strangers."""

from __future__ import annotations

import json
import re
from typing import Any

from hasten.core.errors import ModelRefused

_MOST = 256 * 2**20
_DEEPEST = 200
_DIGITS = 25
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def read_json(data: bytes, what: str) -> Any:
    """The value, after its size, depth, keys and numbers were checked.

    Raises:
        ModelRefused: more than 256 MiB, more than 200 levels, a key twice in one object, an integer of more than 25 digits, no JSON.

    >>> read_json(b'{"a": [1]}', "config.json")
    {'a': [1]}
    """
    if len(data) > _MOST:
        raise ModelRefused(f"expected at most {_MOST} bytes of JSON in {what}, got {len(data)}")
    if _depth(data) > _DEEPEST:
        raise ModelRefused(f"expected JSON of at most {_DEEPEST} levels in {what}, got more")
    try:
        return json.loads(data, object_pairs_hook=lambda pairs: _object(pairs, what), parse_int=lambda digits: _integer(digits, what))
    except (ValueError, RecursionError) as why:
        raise ModelRefused(f"expected JSON in {what}, got text that is none ({type(why).__name__})") from why


def _depth(data: bytes) -> int:
    """How deep brackets are nested, without parsing."""
    depth = deepest = 0
    for bracket in re.findall(rb"[\[\]{}]", _TEXT.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _object(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ModelRefused(f"expected each key once in {what}, got {twice[:100]!r} twice: not opened")
    return made


def _integer(digits: str, what: str) -> int:
    if len(digits) > _DIGITS:
        raise ModelRefused(f"expected integers of at most {_DIGITS} digits in {what}, got one of {len(digits)}")
    return int(digits)
