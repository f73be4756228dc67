"""Which nodes of a graph stay in floats: the field `keep` of the steps on graphs."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import onnx

from hasten.compress.layers import nearest
from hasten.compress.quantize.wiring import Wiring
from hasten.core.errors import UsageError


def check_keep(keep: object) -> None:
    """Raises TypeError on anything but a tuple of texts."""
    if isinstance(keep, str) or not all(isinstance(k, str) for k in keep):  # type: ignore[attr-defined]
        raise TypeError(f"keep must be a tuple of node names, got {keep!r}")


def kept(keep: Sequence[str], graph: onnx.ModelProto, wiring: Wiring) -> tuple[str, ...]:
    """Names of the nodes that a name or pattern of `keep` means, in the given graph and in its working copy.

    Raises:
        UsageError: where one means no node; it names the nearest.
    """
    known = list(dict.fromkeys(n.name for n in (*graph.graph.node, *wiring.nodes)))
    found: dict[str, None] = {}
    for pattern in keep:
        meant = [pattern] if pattern in known else fnmatch.filter(known, pattern)
        if not meant:
            raise UsageError(f"keep must name nodes of the graph, got {pattern!r}; {nearest(pattern, known)}")
        found.update(dict.fromkeys(meant))
    return tuple(found)
