"""Static int8 for most layers; those that would lose most stay in floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx

from hasten.compress.quantize.adaptive import Calibration
from hasten.compress.quantize.choose import check_keep, kept
from hasten.compress.quantize.insert import Numbers, insert, points_of
from hasten.compress.quantize.normalise import normalise
from hasten.compress.quantize.observe import observe, watch
from hasten.compress.quantize.place import place
from hasten.compress.quantize.static import Observer, QuantizeStatic, calibration, check_observer, why_nothing
from hasten.compress.quantize.wiring import Wiring
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Profile, Space, Stage, Step
from hasten.measure.counts import layer_macs

_BATCHES = 8  # of the calibration data that errors are measured on


@dataclass(frozen=True, kw_only=True)
class QuantizeMixed:
    """`QuantizeStatic`, with the layers that lose most left in floats.

    Each layer is quantized alone, and its error is the mean squared difference of the network's outputs, relative to their mean
    square, on the calibrate view: the mean over the outputs of Σ (y − ỹ)² / Σ y². Layers then go back to floats in the order of error per
    multiplication, as long as they all fit in the share that may stay in floats, and only until the errors of the others add up to
    `tolerance`. What a layer in floats costs in time is not asked here: only measuring tells.

    Args:
        floats: share of the network's multiplications that may stay in floats, in (0, 1).
        tolerance: sum of the other layers' errors at which no further layer goes back, >= 0.
        observer: see `QuantizeStatic`.
        bias_correction: see `QuantizeStatic`.
        keep: names of nodes, or patterns of names, that stay in floats whatever they lose; they do not count in `floats`.

    Raises:
        ValueError: on a setting outside its range.

    Reference:
        Zhen Dong et al., "HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision", 2019, arXiv 1905.03696, asks the
        same question with second derivatives; here the loss is measured.
    """

    takes: ClassVar[Kind] = "graph"
    stage: ClassVar[Stage] = Stage.NUMBERS
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = True
    instead_of: ClassVar[type[Step]] = QuantizeStatic

    floats: float = 0.1
    tolerance: float = 0.0
    observer: Observer = "minmax"
    bias_correction: bool = False
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.floats < 1:
            raise ValueError(f"floats must be in (0, 1), got {self.floats}")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be >= 0, got {self.tolerance}")
        check_observer(self.observer)
        check_keep(self.keep)

    def apply(self, network: Network, context: Context) -> Network:
        """The graph with pairs around most layers; the given one stays as it is.

        Raises:
            Unsupported: as `QuantizeStatic`, where the multiplications cannot be counted, where no layer fits in `floats`: then
                `QuantizeStatic` does the same, and where all of them do: then nothing would be rounded.
        """
        seen = calibration(network, context.calibrate, context.progress)
        wiring = normalise(network.graph)
        always = kept(self.keep, network.graph, wiring)
        errors = sensitivity(wiring, context.profile, seen.during(0.0, 0.8), observer=self.observer, keep=always)
        costs = layer_macs(network.with_body(wiring.model()))
        if costs is None:
            raise Unsupported("QuantizeMixed needs to count the multiplications of each layer, and cannot in this graph")
        stay = chosen(errors, costs, floats=self.floats, tolerance=self.tolerance)
        if not stay and sum(errors.values()) > self.tolerance:
            raise Unsupported(f"QuantizeMixed found no layer with less than {self.floats:.0%} of the multiplications; use QuantizeStatic")
        if len(stay) == len(errors):
            raise Unsupported(
                f"all layers that could be rounded have less than {self.floats:.0%} of the multiplications and stay in floats"
            )
        static = QuantizeStatic(observer=self.observer, bias_correction=self.bias_correction, keep=(*always, *stay))
        return static.apply(network.with_body(wiring.model()), context)

    @classmethod
    def space(cls, network: Network) -> Space:
        """The share in floats."""
        del network
        return {"floats": (0.1, 0.3, 0.03)}


def sensitivity(wiring: Wiring, profile: Profile, seen: Calibration, *, observer: Observer, keep: tuple[str, ...] = ()) -> dict[str, float]:
    """The error of quantizing each layer alone, by name in the order of the graph.

    Raises:
        Unsupported: where nothing runs on integers in this engine.
    """
    layers = place(wiring, profile, keep=keep).layers
    if not layers:
        raise Unsupported(why_nothing("QuantizeMixed", wiring.model(), profile.integer_ops))
    model = wiring.model()
    alone = {name: place(wiring, profile, keep=(*keep, *(other for other in layers if other != name))) for name in layers}
    groups = {f"{name}\n{key}": tensors for name, placement in alone.items() for key, tensors in placement.groups().items()}
    ranges = observe(model, groups, seen.view, observer=observer, batch=seen.batch)
    numbers = Numbers(weight_bits=profile.weight_bits, per_channel=True, symmetric=profile.symmetric_activations)
    wanted = _outputs(model, seen)
    errors = {}
    for done, (name, placement) in enumerate(alone.items()):
        part = Wiring(model)
        mine = {key: ranges[f"{name}\n{key}"] for key in placement.groups()}
        insert(part, placement, points_of(placement, mine, numbers), numbers)
        errors[name] = _error(wanted, _outputs(part.model(), seen))
        seen.progress((done + 1) / len(layers), f"losing by {name}")
    return errors


def chosen(errors: Mapping[str, float], costs: Mapping[str, int], *, floats: float, tolerance: float) -> tuple[str, ...]:
    """The layers that stay in floats.

    >>> chosen({"a": 0.3, "b": 0.1, "c": 0.4}, {"a": 10, "b": 1, "c": 89}, floats=0.2, tolerance=0.0)
    ('b', 'a')
    """
    total, spent, left = sum(costs.values()), 0, sum(errors.values())
    stay = []
    for name in sorted(errors, key=lambda n: (-errors[n] / max(costs[n], 1), n)):
        if left <= tolerance:
            break
        if errors[name] > 0 and spent + costs[name] <= floats * total:
            stay.append(name)
            spent, left = spent + costs[name], left - errors[name]
    return tuple(stay)


def _outputs(model: onnx.ModelProto, seen: Calibration) -> list[list[np.ndarray]]:
    """What the graph gives on the first batches, output by output."""
    names = [o.name for o in model.graph.output]
    view = seen.view.take(slice(0, _BATCHES * seen.batch))
    return [[values[name] for name in names] for values in watch(model, names, view, batch=seen.batch)]


def _error(wanted: list[list[np.ndarray]], got: list[list[np.ndarray]]) -> float:
    found = []
    for old, new in zip(zip(*wanted, strict=True), zip(*got, strict=True), strict=True):
        a, b = (np.concatenate([v.reshape(-1) for v in values]).astype(np.float64) for values in (old, new))
        found.append(float(((a - b) ** 2).sum() / max((a**2).sum(), 1e-30)))
    return float(np.mean(found))
