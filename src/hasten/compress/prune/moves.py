"""Operators that put positions along an axis elsewhere: turned, shuffled, repeated, as squares of pixels, against a gate."""

from __future__ import annotations

import numpy as np
from torch import fx

from hasten.compress.prune.trace import Trace
from hasten.compress.prune.units import Axes, tie_rows
from hasten.load.layers import arguments


def turned(trace: Trace, node: fx.Node) -> Axes:
    """roll, flip: the axes that are named must stay."""
    given = arguments(node)
    x = trace.whole(node.args[0])
    dims = given["dims"] or range(len(x.shape))
    trace.hold(x, f"{trace.name(node)} turns it", only=tuple(d % len(x.shape) for d in dims))
    return x


def picked(trace: Trace, node: fx.Node) -> Axes:
    """index_select: the axis that is picked from must stay."""
    given = arguments(node)
    x = trace.whole(node.args[0])
    dim = given["dim"] % len(x.shape)
    trace.hold(x, f"{trace.name(node)} picks from it", only=(dim,))
    return Axes.of(trace.shape(node), [None if a == dim else u for a, u in enumerate(x.plain)])


def gated(trace: Trace, node: fx.Node) -> Axes:
    """glu: the first half times a gate from the second."""
    given = arguments(node)
    x = trace.whole(node.args[0])
    dim = given["dim"] % len(x.shape)
    plain, ids = list(x.plain), x.plain[dim]
    if ids is not None:
        plain[dim], gate = np.split(ids, 2)
        trace.units.tie(plain[dim], gate, "")
    return Axes.of(trace.shape(node), plain)


def pixels(trace: Trace, node: fx.Node) -> Axes:
    """pixel_shuffle and back: channels become squares of pixels, so that those of one square go together."""
    x, shape = trace.whole(node.args[0]), trace.shape(node)
    before, after = x.shape[-3], shape[-3]
    ids = x.plain[-3]
    trace.hold(x, f"{trace.name(node)} moves it", only=(-2, -1))
    if ids is not None and after < before:
        tie_rows(trace.units, ids.reshape(after, -1))
        ids = ids.reshape(after, -1)[:, 0]
    elif ids is not None:
        ids = np.repeat(ids, after // before)
    return Axes.of(shape, [*x.plain[:-3], ids, None, None])


def shuffled(trace: Trace, node: fx.Node) -> Axes:
    """channel_shuffle: every group loses the channels at the same places, so that the groups stay equally wide."""
    x, groups = trace.whole(node.args[0]), arguments(node)["groups"]
    ids = x.plain[1]
    if ids is None:
        return x
    tie_rows(trace.units, ids.reshape(groups, -1).T)
    return Axes.of(x.shape, [x.plain[0], ids.reshape(groups, -1).T.ravel(), *x.plain[2:]])


def repeated(trace: Trace, node: fx.Node) -> Axes | None:
    """repeat_interleave by a number along one axis: keys and values that several heads share."""
    given = arguments(node)
    if not isinstance(given.get("repeats"), int) or given.get("dim") is None or given.get("output_size") is not None:
        return None
    x = trace.whole(node.args[0])
    dim = given["dim"] % len(x.shape)
    repeated = [u if u is None or a != dim else np.repeat(u, given["repeats"]) for a, u in enumerate(x.plain)]
    return Axes.of(trace.shape(node), repeated)
