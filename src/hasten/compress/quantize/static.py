"""Static int8: weights and activations become integers, with ranges seen on calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx

from hasten.compress.quantize.adaptive import Calibration, adapt
from hasten.compress.quantize.choose import check_keep, kept
from hasten.compress.quantize.correct import correct, give_biases, means
from hasten.compress.quantize.insert import Numbers, insert, points_of
from hasten.compress.quantize.normalise import normalise
from hasten.compress.quantize.observe import BATCH, OBSERVERS, observe
from hasten.compress.quantize.place import place
from hasten.compress.settings import whole_numbers
from hasten.core.data import View
from hasten.core.errors import DataRefused, Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Profile, Progress, Space, Stage

Observer = Literal["minmax", "percentile", "mse", "entropy"]


@dataclass(frozen=True, kw_only=True)
class QuantizeStatic:
    """Rounds weights and activations to 8-bit integers: real = scale · (integer − zero point).

    Weights: symmetric, one scale for each output channel. Activations: one scale and zero point for each tensor, from the
    range that it has on the calibrate view. The graph gets pairs of QuantizeLinear and DequantizeLinear, as the profile of the
    engine wants them; weights are stored as int8, biases as int32. Batch norms behind a convolution fold into it first, and a
    Clip whose ends are those of the integers behind it goes.

    Args:
        observer: how a range is chosen: "minmax" takes the extremes; "percentile" cuts off 0.01 % of the values; "mse" takes
            the range with the least squared error; "entropy" the one with the least Kullback-Leibler divergence between the
            values before and after, which may cut deep into long tails.
        per_channel: one scale for each output channel of the weights instead of one for all.
        weight_bits: width of the weights, in [2, 8]; None takes the profile's. They are stored in 8 bits all the same.
        symmetric: activations with zero point 0 (int8 where values go negative, uint8 where not) or uint8 with any zero point;
            None takes the profile's.
        rounding: "nearest" rounds each weight for itself; "adaptive" rounds it up or down so that the outputs of its layer on
            the calibrate view change least in the mean square. Takes seconds to minutes; see `adaptive`.
        bias_correction: shifts the bias of each layer so that its outputs keep their mean on the calibrate view, channel by
            channel. A MatMul without an addition behind it has no bias to shift.
        keep: names of nodes, or patterns of names, that stay in floats (`quantizable` lists the others).

    Raises:
        ValueError: on a setting outside its range.

    References:
        Benoit Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        2018, arXiv 1712.05877. Szymon Migacz, "8-bit Inference with TensorRT", 2017 (entropy). Markus Nagel et al.,
        "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, arXiv 1906.04721. Markus Nagel et al.,
        "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020, arXiv 2004.10568: its objective, solved by error
        feedback (Elias Frantar et al., "GPTQ", 2022, arXiv 2210.17323) and descent instead of gradients.
    """

    takes: ClassVar[Kind] = "graph"
    stage: ClassVar[Stage] = Stage.NUMBERS
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = True

    observer: Observer = "minmax"
    per_channel: bool = True
    weight_bits: int | None = None
    symmetric: bool | None = None
    rounding: Literal["nearest", "adaptive"] = "nearest"
    bias_correction: bool = False
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole_numbers(self)
        check_observer(self.observer)
        if self.weight_bits is not None and not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits must be in [2, 8] or None, got {self.weight_bits}")
        if self.rounding not in ("nearest", "adaptive"):
            raise ValueError(f"rounding must be 'nearest' or 'adaptive', got {self.rounding!r}")
        check_keep(self.keep)

    def apply(self, network: Network, context: Context) -> Network:
        """The graph with its pairs; the given one stays as it is.

        Raises:
            Unsupported: where no operator of the graph runs on integers in this engine, where the graph is quantized already
                or holds control flow, where activations are not finite, and where `symmetric` is False for an engine that
                wants zero points of 0.
            UsageError: where `keep` names a node that the graph does not have.
            DataRefused: on too few calibration examples for one batch.
        """
        view, profile = context.calibrate, context.profile
        if self.symmetric is False and profile.symmetric_activations:
            raise Unsupported("this engine wants activations with zero point 0, but symmetric is False")
        seen = calibration(network, view, context.progress)
        wiring = normalise(network.graph)
        placement = place(wiring, profile, keep=kept(self.keep, network.graph, wiring))
        if not placement.layers:
            raise Unsupported(why_nothing("QuantizeStatic", wiring.model(), profile.integer_ops))
        context.progress(0.0, "calibrating")
        ranges = observe(wiring.model(), placement.groups(), view, observer=self.observer, batch=seen.batch)
        numbers = Numbers(
            weight_bits=profile.weight_bits if self.weight_bits is None else self.weight_bits,
            per_channel=self.per_channel,
            symmetric=profile.symmetric_activations if self.symmetric is None else self.symmetric,
        )
        points = points_of(placement, ranges, numbers)
        wanted = {}
        if self.bias_correction:
            give_biases(wiring, placement)
            wanted = means(wiring, placement, seen)
        rounded = {}
        if self.rounding == "adaptive":
            rounded = adapt(wiring, placement, points, numbers, seen.during(0.1, 0.8), centred=self.bias_correction)
        insert(wiring, placement, points, numbers, rounded)
        if self.bias_correction:
            correct(wiring, wanted, seen.during(0.8, 1.0))
        return network.with_body(wiring.model())

    @classmethod
    def space(cls, network: Network) -> Space:
        """The observers, the roundings, and whether biases are corrected."""
        del network
        return {"observer": ("minmax", "percentile", "mse"), "bias_correction": (False, True), "rounding": ("nearest", "adaptive")}


def quantizable(graph: onnx.ModelProto, profile: Profile) -> tuple[str, ...]:
    """Names of the nodes whose weights `QuantizeStatic` turns into integers for an engine with this profile, in order."""
    return place(normalise(graph), profile).layers


def check_observer(observer: str) -> None:
    """Raises ValueError on an unknown observer."""
    if observer not in OBSERVERS:
        raise ValueError(f"observer must be one of {', '.join(OBSERVERS)}, got {observer!r}")


def calibration(network: Network, view: View, progress: Progress) -> Calibration:
    """The calibrate view in batches that the network takes. Raises DataRefused where it is too short for one."""
    if len(view) < (network.fixed_batch or 1):
        raise DataRefused(f"calibration needs at least {network.fixed_batch or 1} examples, got {len(view)}")
    return Calibration(view=view, batch=network.fixed_batch or min(BATCH, len(view)), progress=progress)


def why_nothing(step: str, graph: onnx.ModelProto, wanted: Iterable[str]) -> str:
    """Words for a graph in which `step` finds no layer of the types wanted."""
    found, types = sorted({n.op_type for n in graph.graph.node}), sorted(wanted)
    if not types:
        return f"{step} needs an engine that runs operators on integers; this one has none"
    return (
        f"{step} needs a layer with constant float32 weights among {', '.join(types)}; "
        f"the graph has {', '.join(found)[:200] or 'no operator'}"
    )
