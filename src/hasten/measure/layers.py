"""Where the time of a call goes: one row per layer, beside the least time that this machine could take for it.

The value is filled by `hasten.engines.profiling.layer_times`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Bound = Literal["compute", "memory"]
_PATIENCE_S = 0.25
_FEWEST = 7
_STREAM = 1 << 24  # bytes that one reading passes over, so that the call itself costs nothing beside it


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """What this machine can do at most, measured with the threads of the run.

    Args:
        float_macs_per_s: multiply-accumulates in float32, of the fastest large matrix product.
        integer_macs_per_s: the same on 8-bit integers.
        bytes_per_s: of a stream over as many bytes as the network touches in one call: from a cache where they fit into one.
    """

    float_macs_per_s: float
    integer_macs_per_s: float
    bytes_per_s: float

    def floor_ms(self, macs: int, moved_bytes: int, *, integers: bool = False) -> tuple[float, Bound]:
        """The least time of a layer, max(macs / peak, bytes / bandwidth), and which of the two it is.

        Williams, Waterman, Patterson: "Roofline: an insightful visual performance model", CACM 2009.

        >>> Ceiling(float_macs_per_s=1e9, integer_macs_per_s=4e9, bytes_per_s=1e9).floor_ms(2_000_000, 1_000_000)
        (2.0, 'compute')
        """
        compute = macs / (self.integer_macs_per_s if integers else self.float_macs_per_s) * 1e3
        memory = moved_bytes / self.bytes_per_s * 1e3
        return (compute, "compute") if compute > memory else (memory, "memory")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer as the engine runs it, with all that the engine fused into it.

    Args:
        name: of the node in the lowered graph that multiplies most; `nodes`: all nodes whose work is in it.
        module: path of the torch module that the node came from ("features.0"), None where the graph does not say.
        kind: operator type of the node.
        shape: of its output, the batch first.
        parameters: numbers in its weights. A weight that several layers share counts in each.
        macs: multiply-accumulates of one call; 0 for a layer that multiplies no matrices, None where they cannot be told.
        moved_bytes: of one call: inputs, weights and outputs, each once.
        integers: it computes on 8-bit integers.
        ms: time of one call, in milliseconds; `share`: of the whole call, in [0, 1].
        floor_ms: the least that the ceilings of the machine allow, None without `macs`; `bound`: by which of them.
    """

    name: str
    module: str | None
    kind: str
    nodes: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int
    macs: int | None
    moved_bytes: int
    integers: bool
    ms: float
    share: float
    floor_ms: float | None
    bound: Bound | None

    @property
    def roofline(self) -> float | None:
        """The share of the possible speed that it reaches: floor ÷ time. Above 1 where a cache or an algorithm beats the count."""
        return None if self.floor_ms is None or self.ms <= 0 else self.floor_ms / self.ms


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """The time of one call of a network, layer by layer, in the order of its graph.

    Args:
        engine: the engine's words; `threads`, `batch`: what was measured.
        call_ms: median time of a call without a profiler.
        calls: that the median is taken over, and each layer's time as well.
        profiler_ms: what the profiler added to each layer and was taken off again.
        ceiling: of this machine.
        layers: their times and `rest_ms`, what lies between them, add up to `call_ms`.
    """

    engine: str
    threads: int
    batch: int
    call_ms: float
    rest_ms: float
    calls: int
    profiler_ms: float
    ceiling: Ceiling
    layers: tuple[Layer, ...]

    def by_module(self) -> dict[str, float]:
        """Milliseconds per torch module, the layers of one module added up."""
        found: dict[str, float] = {}
        for layer in self.layers:
            if layer.module is not None:
                found[layer.module] = found.get(layer.module, 0.0) + layer.ms
        return found

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields, each layer with its `roofline`."""
        return dataclasses.asdict(self) | {"layers": [dataclasses.asdict(x) | {"roofline": x.roofline} for x in self.layers]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> LayerTimes:
        """The value that `to_json` wrote."""
        rows: list[dict[str, Any]] = [
            {name: tuple(v) if isinstance(v, list) else v for name, v in row.items() if name != "roofline"} for row in record["layers"]
        ]
        layers = tuple(Layer(**row) for row in rows)
        return cls(**{**record, "ceiling": Ceiling(**record["ceiling"]), "layers": layers})


def without_profiler(profiled_ms: np.ndarray[Any, Any], call_ms: float) -> tuple[np.ndarray[Any, Any], float]:
    """The layers' times without what the profiler added, and that cost per layer.

    A profiler costs about the same for each layer, whatever the layer does. So where the layers add up to more than the call takes
    without it, the same cost c is taken off each, down to 0: Σ max(t − c, 0) = call.

    >>> without_profiler(np.array([5.0, 3.0, 0.5]), 5.0)
    (array([3.5, 1.5, 0. ]), 1.5)
    >>> without_profiler(np.array([2.0, 1.0]), 4.0)
    (array([2., 1.]), 0.0)
    """
    if profiled_ms.sum() <= call_ms:
        return profiled_ms, 0.0
    ordered = np.sort(profiled_ms)[::-1]
    costs = (np.cumsum(ordered) - call_ms) / np.arange(1, len(ordered) + 1)
    cost = float(costs.max())  # the cost with the k longest left above 0; too few or too many of them give a smaller one
    return np.maximum(profiled_ms - cost, 0.0), cost


def bytes_per_s(size_bytes: int) -> float:
    """Bandwidth of a stream that passes over the same `size_bytes` again and again, with torch's threads: reading, or scaling in place."""
    import torch

    block = torch.ones(max(size_bytes, 1 << 14) // 4)
    many = block.expand(max(1, _STREAM // (4 * len(block))), len(block))
    read = many.numel() * 4 / best_s(lambda: torch.sum(many))
    return max(read, 8 * len(block) / best_s(lambda: block.mul_(1.0)))


def best_s(work: Callable[[], object]) -> float:
    """The shortest of many runs, in seconds: a ceiling is what the machine can do, not what it does while others work."""
    work()
    times: list[int] = []
    end = time.perf_counter_ns() + int(_PATIENCE_S * 1e9)
    while len(times) < _FEWEST or time.perf_counter_ns() < end:
        start = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - start)
    return min(times) / 1e9
