"""Ranges of activations: the float graph runs over the calibration batches, one observer chooses a range for each tensor.

Memory stays bounded: a batch at a time, of which only extremes and histograms are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from hasten.core.data import View
from hasten.core.errors import Unsupported

Array = np.ndarray[Any, Any]
Range = tuple[float, float]
BATCH = 8
BATCHES = 40
_BINS = 2048
_TAIL = 1e-4  # share of the values that "percentile" cuts off, both ends together


def observe(model: onnx.ModelProto, tensors: Mapping[str, tuple[str, ...]], view: View, *, observer: str, batch: int) -> dict[str, Range]:
    """The range of each key of `tensors`, seen over all tensors in its value.

    Args:
        model: the graph in floats.
        view: examples, at least `batch`; the first `BATCHES * batch` of them are used.
        observer: a key of `OBSERVERS`.
        batch: examples in one run; a last incomplete batch is left out.

    Raises:
        Unsupported: where an activation is infinite or not a number.
    """

    def batches() -> Iterator[dict[str, Array]]:
        return watch(model, [t for group in tensors.values() for t in group], view, batch=batch)

    extremes = _extremes(tensors, batches())
    if observer == "minmax":
        return extremes
    histograms = _histograms(tensors, extremes, batches())
    return {key: OBSERVERS[observer](histograms[key], *extremes[key]) for key in tensors}


def watch(model: onnx.ModelProto, names: Iterable[str], view: View, *, batch: int) -> Iterator[dict[str, Array]]:
    """Runs the graph in ONNX Runtime and gives the named tensors, batch by batch."""
    import onnxruntime

    inputs = [i.name for i in model.graph.input]
    wanted = [name for name in dict.fromkeys(names) if name not in inputs]
    open_model = onnx.ModelProto()
    open_model.CopyFrom(model)
    shown = {o.name for o in model.graph.output}
    extra = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted if name not in shown]
    open_model.graph.output.extend(extra)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # one order of summation, so the same file every time
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(open_model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for piece in view.take(slice(0, min(BATCHES, len(view) // batch) * batch)).batches(batch):
        feed = dict(zip(inputs, piece.inputs, strict=True))
        yield feed | dict(zip(wanted, session.run(wanted, feed), strict=True)) if wanted else feed


def _extremes(tensors: Mapping[str, tuple[str, ...]], batches: Iterable[Mapping[str, Array]]) -> dict[str, Range]:
    seen = dict.fromkeys(tensors, (np.inf, -np.inf))
    for values in batches:
        for key, group in tensors.items():
            low = min(float(values[t].min()) for t in group)
            high = max(float(values[t].max()) for t in group)
            if not (np.isfinite(low) and np.isfinite(high)):
                raise Unsupported(f"expected finite activations, but {key!r} reaches [{low}, {high}] on the calibration data")
            seen[key] = min(seen[key][0], low), max(seen[key][1], high)
    return seen


def _histograms(
    tensors: Mapping[str, tuple[str, ...]], extremes: Mapping[str, Range], batches: Iterable[Mapping[str, Array]]
) -> dict[str, Array]:
    counts = {key: np.zeros(_BINS, dtype=np.int64) for key in tensors}
    for values in batches:
        for key, group in tensors.items():
            for tensor in group:
                counts[key] += np.histogram(values[tensor], bins=_BINS, range=_opened(*extremes[key]))[0]
    return counts


def _opened(low: float, high: float) -> Range:
    return (low, high) if high > low else (low, low + 1.0)


def _percentile(counts: Array, low: float, high: float) -> Range:
    """The range without the outer values, half of the tail at each end."""
    edges = np.linspace(*_opened(low, high), _BINS + 1)
    share = np.cumsum(counts) / counts.sum()
    first, last = int(np.searchsorted(share, _TAIL / 2, side="right")), int(np.searchsorted(share, 1 - _TAIL / 2))
    return float(edges[first]), float(edges[min(last + 1, _BINS)])


def _mse(counts: Array, low: float, high: float) -> Range:
    """The range [a·low, a·high] with the least squared error of rounding and clipping."""
    edges = np.linspace(*_opened(low, high), _BINS + 1)
    centre, share = (edges[:-1] + edges[1:]) / 2, counts / counts.sum()
    best, least = (low, high), np.inf
    for factor in np.linspace(1.0, 0.2, 81):
        bottom, top = factor * min(low, 0.0), factor * max(high, 0.0)
        scale = max((top - bottom) / 255, np.finfo(np.float32).tiny)
        rounded = np.clip(np.round((centre - bottom) / scale), 0, 255) * scale + bottom
        error = float(((centre - rounded) ** 2 * share).sum())
        if error < least:
            best, least = (bottom, top), error
    return best


def _entropy(counts: Array, low: float, high: float) -> Range:
    """The range [a·low, a·high] whose 256 steps tell least of the distribution wrong: Σ p log(p / q) is smallest.

    p: the values inside, those outside moved to the ends; q: the values inside, spread evenly within each step. Zero is met
    exactly in any range, so a heap of zeros (behind a ReLU) counts no more than the bins beside it: else it alone would decide.
    What lies within one step of the whole range is not told apart either: spiky counts would make the narrowest range look best.
    """
    edges = np.linspace(*_opened(low, high), _BINS + 1)
    centre = (edges[:-1] + edges[1:]) / 2
    zero = int(np.clip(np.searchsorted(edges, 0.0, side="right") - 1, 0, _BINS - 1))
    counts = counts.copy()
    counts[zero] = min(counts[zero], max(counts[i] for i in (zero - 1, zero + 1) if 0 <= i < _BINS))
    counts = np.convolve(counts, np.full(_BINS // 256, 256 / _BINS), "same")
    best, least = (low, high), np.inf
    for factor in np.linspace(1.0, 0.125, 113):
        bottom, top = factor * min(low, 0.0), factor * max(high, 0.0)
        inside = np.flatnonzero((centre >= bottom) & (centre <= top))
        if top <= bottom or not counts[inside].any():
            continue
        first, last = inside[0], inside[-1] + 1
        seen = counts[first:last].astype(np.float64)
        step = np.minimum((centre[first:last] - bottom) / (top - bottom) * 256, 255).astype(np.int64)
        filled = np.maximum(np.bincount(step, seen > 0, 256), 1)
        spread = np.where(seen > 0, (np.bincount(step, seen, 256) / filled)[step], 0.0)
        seen[0] += counts[:first].sum()
        seen[-1] += counts[last:].sum()
        divergence = _divergence(seen, spread)
        if divergence < least:
            best, least = (bottom, top), divergence
    return best


def _divergence(p: Array, q: Array) -> float:
    """Kullback-Leibler, with a ten-thousandth of an even distribution mixed into both so that no bin is empty."""
    p, q = ((1 - 1e-4) * a / a.sum() + 1e-4 / a.size for a in (p, q))
    return float((p * np.log(p / q)).sum())


OBSERVERS: Mapping[str, Callable[[Array, float, float], Range]] = {
    "minmax": lambda _, low, high: (low, high),
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
