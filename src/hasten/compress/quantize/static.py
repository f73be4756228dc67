"""Static int8: weights and activations become integers, with ranges seen on calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx

from hasten.compress.quantize.insert import Numbers, insert
from hasten.compress.quantize.normalise import normalise
from hasten.compress.quantize.observe import BATCH, OBSERVERS, observe
from hasten.compress.quantize.place import place
from hasten.core.errors import DataRefused, Unsupported, UsageError
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Profile, Space, Stage


@dataclass(frozen=True, kw_only=True)
class QuantizeStatic:
    """Rounds weights and activations to 8-bit integers: real = scale · (integer − zero point).

    Weights: symmetric, one scale for each output channel. Activations: one scale and zero point for each tensor, from the
    range that it has on the calibrate view. The graph gets pairs of QuantizeLinear and DequantizeLinear, as the profile of the
    engine wants them; weights are stored as int8, biases as int32. Batch norms behind a convolution fold into it first.

    Args:
        observer: how a range is chosen: "minmax" takes the extremes; "percentile" cuts off 0.01 % of the values; "mse" takes
            the range with the least squared error.
        per_channel: one scale for each output channel of the weights instead of one for all.
        weight_bits: width of the weights, in [2, 8]; None takes the profile's. They are stored in 8 bits all the same.
        keep: names of nodes that stay in floats (`quantizable` lists the others).

    Raises:
        ValueError: on a setting outside its range.

    Reference:
        Benoit Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        2018, arXiv 1712.05877.
    """

    takes: ClassVar[Kind] = "graph"
    stage: ClassVar[Stage] = Stage.NUMBERS
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = True

    observer: Literal["minmax", "percentile", "mse"] = "minmax"
    per_channel: bool = True
    weight_bits: int | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ValueError(f"observer must be one of {', '.join(OBSERVERS)}, got {self.observer!r}")
        if self.weight_bits is not None and not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits must be in [2, 8] or None, got {self.weight_bits}")
        if isinstance(self.keep, str):
            raise TypeError(f"keep must be a tuple of node names, got the text {self.keep!r}")

    def apply(self, network: Network, context: Context) -> Network:
        """The graph with its pairs; the given one stays as it is.

        Raises:
            Unsupported: where no operator of the graph runs on integers in this engine, where the graph is quantized already
                or holds control flow, and where activations are not finite.
            UsageError: where `keep` names a node that the graph does not have.
            DataRefused: on too few calibration examples for one batch.
        """
        view, profile, graph = context.calibrate, context.profile, network.graph
        if len(view) < (network.fixed_batch or 1):
            raise DataRefused(f"calibration needs at least {network.fixed_batch or 1} examples, got {len(view)}")
        wiring = normalise(graph)
        known = {n.name for n in (*graph.graph.node, *wiring.nodes)}
        if unknown := sorted(set(self.keep) - known):
            raise UsageError(f"keep must name nodes of the graph, got {unknown[0]!r}; it has {', '.join(sorted(known))[:200]}")
        placement = place(wiring, profile, keep=self.keep)
        if not placement.layers:
            raise Unsupported(_why_nothing(wiring.model(), profile))
        context.progress(0.1, "calibrating")
        ranges = observe(
            wiring.model(), placement.groups(), view, observer=self.observer, batch=network.fixed_batch or min(BATCH, len(view))
        )
        bits = profile.weight_bits if self.weight_bits is None else self.weight_bits
        numbers = Numbers(weight_bits=bits, per_channel=self.per_channel, symmetric=profile.symmetric_activations)
        insert(wiring, placement, ranges, numbers)
        return network.with_body(wiring.model())

    @classmethod
    def space(cls, network: Network) -> Space:
        """The observers."""
        del network
        return {"observer": ("minmax", "percentile", "mse")}


def quantizable(graph: onnx.ModelProto, profile: Profile) -> tuple[str, ...]:
    """Names of the nodes whose weights `QuantizeStatic` turns into integers for an engine with this profile, in order."""
    return place(normalise(graph), profile).layers


def _why_nothing(graph: onnx.ModelProto, profile: Profile) -> str:
    found, wanted = sorted({n.op_type for n in graph.graph.node}), sorted(profile.integer_ops)
    if not wanted:
        return "QuantizeStatic needs an engine that runs operators on integers; this one has none"
    return (
        f"QuantizeStatic needs a layer with constant float32 weights among {', '.join(wanted)}; "
        f"the graph has {', '.join(found)[:200] or 'no operator'}"
    )
