"""What is likely to pay on a network and what not: arithmetic on the measured layers, said with its reason.

Every figure is an upper bound: what would be saved if a layer came as near to the new ceiling as it comes to the old one today.
What it really brings, and costs in accuracy, only `hasten optimize` tells.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from hasten.measure import machine
from hasten.measure.layers import Layer, LayerTimes

Pays = Literal["likely", "perhaps", "hardly"]
_LIKELY, _PERHAPS = 0.2, 0.05  # of the call
_IDLE = 0.05  # below this share of the roofline a layer's time is not spent on its arithmetic
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_SIZES = frozenset(
    {"Shape", "Gather", "Concat", "Slice", "Mul", "Add", "Cast", "Expand", "Reshape", "Unsqueeze", "Squeeze", "Range", "Where"}
)
_FEW = 8  # numbers: what holds no more and multiplies nothing computes a shape


@dataclass(frozen=True, kw_only=True)
class Hint:
    """One opinion.

    Args:
        method: what to do, with hasten's names for it.
        pays: in words.
        saves: share of the call's time that it takes away at most, None where it is no matter of time.
        why: with the figures behind it.
    """

    method: str
    pays: Pays
    saves: float | None
    why: str

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return dataclasses.asdict(self)


def advice(times: LayerTimes) -> tuple[Hint, ...]:
    """What is likely to pay, the most promising first."""
    hints = [_integers(times), _narrower(times), _small_weights(times), _sizes(times), _overhead(times), _bfloat16(times), _zeros()]
    order: dict[Pays, int] = {"likely": 0, "perhaps": 1, "hardly": 2}
    return tuple(sorted(hints, key=lambda h: (order[h.pays], -(h.saves or 0.0))))


def _hint(method: str, saves: float, why: str) -> Hint:
    pays: Pays = "likely" if saves >= _LIKELY else "perhaps" if saves >= _PERHAPS else "hardly"
    return Hint(method=method, pays=pays, saves=saves, why=why)


def _busy(layers: Iterable[Layer]) -> list[Layer]:
    """The layers whose time goes into their arithmetic or their bytes."""
    return [x for x in layers if (x.roofline or 0.0) >= _IDLE]


def _share(layers: Iterable[Layer]) -> float:
    return math.fsum(x.share for x in layers)


def _cheaper(times: LayerTimes, layer: Layer, bytes_left: float) -> float:
    """The share of the call that a layer saves on integers and fewer bytes, as near to the ceiling as now."""
    floor, _ = times.ceiling.floor_ms(layer.macs or 0, round(layer.moved_bytes * bytes_left), integers=True)
    return layer.share * max(0.0, 1 - floor / layer.floor_ms) if layer.floor_ms else 0.0


def _integers(times: LayerTimes) -> Hint:
    method = "int8 (QuantizeStatic)"
    products = [x for x in times.layers if x.kind in _PRODUCTS]
    if any(x.integers for x in products):
        left = _share(x for x in products if not x.integers)
        return Hint(method=method, pays="hardly", saves=left, why=f"it computes on integers already; products in float take {left:.0%}")
    busy = _busy(products)
    ratio = times.ceiling.integer_macs_per_s / times.ceiling.float_macs_per_s
    why = f"matrix products and convolutions near the roofline take {_share(busy):.0%}; 8-bit products run {ratio:.1f}× as fast here"
    if not machine.has_int8_dot():
        why += " (no VNNI: 7-bit weights, so that sums do not saturate)"
    return _hint(method, math.fsum(_cheaper(times, x, 0.25) for x in busy), why)


def _narrower(times: LayerTimes) -> Hint:
    heavy = _busy(x for x in times.layers if x.kind in _PRODUCTS | _RECURRENT)
    largest = max(heavy, key=lambda x: x.share, default=None)
    first = f", {largest.module or largest.name} alone {largest.share:.0%}" if largest else ""
    why = f"layers with weights and near the roofline take {_share(heavy):.0%}{first}; half the width leaves a quarter of it"
    return _hint("fewer channels or units (PruneStructure, FactorizeConv, a student and Distil)", 0.75 * _share(heavy), why)


def _small_weights(times: LayerTimes) -> Hint:
    method = "weights in 8 or 4 bits (QuantizeWeights, QuantizeDynamic), or larger batches"
    waiting = [x for x in times.layers if x.bound == "memory" and x.macs and 4 * x.parameters > x.moved_bytes / 2 and not x.integers]
    where = f"layers that wait for their weights take {_share(waiting):.0%} at batch {times.batch}"
    return _hint(method, 0.75 * _share(_busy(waiting)), where)


def _sizes(times: LayerTimes) -> Hint:
    sizes = [x for x in times.layers if not x.macs and x.kind in _SIZES and math.prod(x.shape) <= _FEW]
    why = f"{len(sizes)} nodes only compute shapes and take {_share(sizes):.0%}; with fixed sizes they are constants"
    return _hint("fixed sizes (FoldIdle, OpenVINO(shapes='static'))", _share(sizes), why)


def _overhead(times: LayerTimes) -> Hint:
    idle = [x for x in times.layers if (x.roofline or 0.0) < _IDLE]
    rest = times.rest_ms / times.call_ms
    why = f"{len(idle)} layers that neither multiply nor move much take {_share(idle):.0%}, and {rest:.0%} lies between the layers"
    if times.threads > 1:
        why += "; one thread wakes no others"
    return _hint("fewer and fused nodes (the folds), another engine (hasten benchmark), threads=1", _share(idle) + rest, why)


def _bfloat16(times: LayerTimes) -> Hint:
    busy = _share(_busy(x for x in times.layers if x.kind in _PRODUCTS | _RECURRENT and not x.integers))
    if not machine.has_bf16():
        return Hint(method="bfloat16", pays="hardly", saves=0.0, why="this processor has no bfloat16 instructions")
    return _hint("bfloat16 (OpenVINO(precision='bf16'))", busy / 2, f"products in float32 take {busy:.0%}, and this processor has bfloat16")


def _zeros() -> Hint:
    why = "no engine here runs a layer with 90 % zeros faster; they make the file smaller (packed engines)"
    return Hint(method="single zeros (PruneWeights)", pays="hardly", saves=None, why=why)
