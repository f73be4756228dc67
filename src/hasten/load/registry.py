"""torch's table of ONNX functions, read once: its exporter parses the source of all 500 for every network that it exports."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Exports inside get a copy of the table that the first one read; where torch keeps it elsewhere, they read it as ever."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        given = vars(ONNXRegistry)["from_torchlib"]
    except (ImportError, KeyError):
        yield
        return
    kind: Any = ONNXRegistry
    kind.from_torchlib = functools.partial(_copied, given.__func__, kind)
    try:
        yield
    finally:
        kind.from_torchlib = given


def _copied(read: Any, kind: Any, **settings: Any) -> Any:
    table = copy.copy(_read(read, kind, tuple(settings.items())))
    table.functions = {target: list(functions) for target, functions in table.functions.items()}
    return table


@functools.cache
def _read(read: Any, kind: Any, settings: tuple[tuple[str, Any], ...]) -> Any:
    return read(kind, **dict(settings))
