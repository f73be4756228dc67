"""Recurrent layers, as one call for all steps or as one for each: hidden units leave every gate, every state and every direction.

Shapes: weights (gates · hidden, in) and (gates · hidden, hidden), biases (gates · hidden).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx, nn

from hasten.compress.prune.trace import Result, Trace
from hasten.compress.prune.units import Axes, Ids, tie_rows
from hasten.load.layers import arguments

KINDS = (nn.LSTM, nn.GRU, nn.RNN)


def layers(trace: Trace, node: fx.Node) -> Result | None:
    """The same hidden units leave every gate, both directions and all layers of one module."""
    layer: Any = trace.module.get_submodule(str(node.target))
    x, units = trace.whole(node.args[0]), trace.units
    gates = len(layer.weight_hh_l0) // layer.hidden_size
    ways = 2 if layer.bidirectional else 1
    hidden: Ids | None = None
    for name, tensor in layer.named_parameters(recurse=False):
        axes = trace.parameter(tensor, writes=0 if name.startswith("weight_ih") else None)
        if layer.proj_size:
            trace.hold(axes, f"{node.target} projects its states")
            continue
        rows = _gates(axes.plain[0], gates)
        tie_rows(units, rows.T)
        hidden = rows[0] if hidden is None else hidden
        units.tie(hidden, rows[0], "")
        if name.startswith("weight_hh"):
            units.tie(hidden, axes.plain[1], "")
        if name.startswith("weight_ih"):
            below = x.plain[-1] if "_l0" in name else np.tile(hidden, ways)
            units.tie(below, axes.plain[1], f"{node.target} reads it, and it cannot shrink")
    for given in node.all_input_nodes[1:]:
        units.tie(trace.of(given).plain[-1], hidden, f"{node.target} is given its first states")
    outputs, states = trace.shape(node)
    both = None if hidden is None else np.tile(hidden, ways)
    last = [Axes.of(s, (*[None] * (len(s) - 1), hidden)) for s in (states if isinstance(states, list) else [states])]
    result = Axes.of(outputs, (*x.plain[:-1], both))
    return [result, last if isinstance(states, list) else last[0]]


def cell(trace: Trace, node: fx.Node) -> Result | None:
    """One step of a recurrent layer: the same hidden units leave every gate and the state."""
    given, units = arguments(node), trace.units
    x, rows = trace.whole(given["input"]), None
    states = [trace.whole(s) for s in (given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]])]
    hidden = states[0].plain[-1]
    for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
        if not trace.is_tensor(given.get(name)):
            continue
        axes = trace.whole(given[name])
        if axes.plain[0] is None:
            return None
        rows = _gates(axes.plain[0], axes.shape[0] // states[0].shape[-1])
        tie_rows(units, rows.T)
        units.tie(rows[0], hidden, f"{trace.name(node)} starts from what cannot shrink")
        if name.startswith("w"):
            below = x.plain[-1] if name == "w_ih" else rows[0]
            units.tie(below, axes.plain[1], f"{trace.name(node)} reads it, and it cannot shrink")
    trace.writes(given["w_ih"], 0)
    for state in states[1:]:
        units.tie(state.plain[-1], hidden, f"{trace.name(node)} starts from what cannot shrink")
    shape, plain = trace.shape(node), (x.plain[0] if len(x.shape) > 1 else None, hidden)
    return [Axes.of(s, plain[-len(s) :]) for s in shape] if isinstance(shape, list) else Axes.of(shape, plain[-len(shape) :])


def _gates(ids: Ids | None, gates: int) -> Ids:
    """(gates, hidden)"""
    assert ids is not None
    return ids.reshape(gates, -1)
