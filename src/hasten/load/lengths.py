"""Token ids of a user's module: data has them in one length, and the module may take any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hasten.core.errors import Unsupported
from hasten.core.network import Arrays, Network
from hasten.load.lower import forward
from hasten.load.program import agrees, export_program

__all__ = ["with_open_lengths"]

_LEAST = 3  # tokens; of one or two, nothing can be told


def with_open_lengths(network: Network) -> Network:
    """The network with the length of its token ids left open, where it takes other lengths and its program does.

    Token ids are integers (batch, length), and their masks are of the same shape. The module is tried on one token less, on half of them
    and on one more. Where it runs on one less and its export does not follow it on all that it takes, as behind a branch on the length,
    the length of the data stays, with a note.
    """
    axes = _axes(network.example)
    if not any(axes) or network.fixed_batch is not None:
        return network
    opened = replace(network, open_axes=axes)
    length = max(a.shape[1] for a, open_ in zip(network.example, axes, strict=True) if open_)
    others = [_cut(opened, by) for by in (lambda n: n - 1, lambda n: n // 2, lambda n: n + 1)]
    taken = [example for example in others if _takes(network, example)]
    if not taken or taken[0] is not others[0]:
        return network
    try:
        if agrees(export_program(opened), opened, taken):
            return opened
        why = "its program does not give there what it gives"
    except Unsupported as unsupported:
        why = str(unsupported)
    said = f"it is prepared for {length} tokens, as in the data, and runs on others in Python alone: {why}"
    return replace(network, notes=(*network.notes, said))


def _axes(example: Arrays) -> tuple[tuple[int, ...], ...]:
    """(1,) for token ids and for what has their shape."""
    shapes = {a.shape for a in example if a.ndim == 2 and a.dtype.kind in "iu" and a.shape[1] >= _LEAST}
    return tuple((1,) if a.shape in shapes else () for a in example)


def _cut(network: Network, size: Callable[[int], int]) -> Arrays:
    """The example in another length; beyond its own with its last column again."""
    found = []
    for array, axes in zip(network.example, network.open_axes, strict=True):
        columns = np.minimum(np.arange(size(array.shape[1])), array.shape[1] - 1) if axes else None
        found.append(array if columns is None else array[:, columns])
    return tuple(found)


def _takes(network: Network, example: Arrays) -> bool:
    """Whether it runs, and gives as many outputs as on its own example, with one row for each example."""
    try:
        given = forward(network, example)
        return len(given) == len(forward(network, network.example)) and all(len(a) == len(example[0]) for a in given)
    except Exception:  # a user's class can raise anything
        return False
