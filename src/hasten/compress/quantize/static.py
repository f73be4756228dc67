"""Static int8: weights and activations become integers, with ranges seen on calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hasten.compress.quantize.insert import Numbers, insert
from hasten.compress.quantize.normalise import normalise
from hasten.compress.quantize.observe import BATCH, OBSERVERS, observe
from hasten.compress.quantize.place import Placement, place
from hasten.compress.quantize.wiring import Wiring
from hasten.core.errors import Unsupported, UsageError
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Profile, Space, Stage


@dataclass(frozen=True, kw_only=True)
class QuantizeStatic:
    """Rounds weights and activations to 8-bit integers, with pairs of QuantizeLinear and DequantizeLinear.

    The pairs go where the engine's profile says that they pay.
    """

    takes: ClassVar[Kind] = "graph"
    stage: ClassVar[Stage] = Stage.NUMBERS
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = True

    observer: str = "minmax"
    per_channel: bool = True
    weight_bits: int | None = None
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ValueError(f"observer must be one of {', '.join(OBSERVERS)}, got {self.observer!r}")
        if self.weight_bits is not None and not 2 <= self.weight_bits <= 8:
            raise ValueError(f"weight_bits must be in [2, 8] or None, got {self.weight_bits}")

    def apply(self, network: Network, context: Context) -> Network:
        profile = context.profile
        wiring = normalise(network.graph)
        placement = self._place(wiring, profile)
        sources = _sources(wiring, placement)
        ranges = observe(
            wiring.model(), sources, context.calibrate, observer=self.observer, batch=network.fixed_batch or BATCH
        )
        bits = profile.weight_bits if self.weight_bits is None else self.weight_bits
        insert(wiring, placement, ranges, Numbers(weight_bits=bits, per_channel=self.per_channel, symmetric=profile.symmetric_activations))
        return network.with_body(wiring.model())

    @classmethod
    def space(cls, network: Network) -> Space:
        return {"observer": ("minmax", "percentile", "mse"), "per_channel": (True,)}

    def _place(self, wiring: Wiring, profile: Profile) -> Placement:
        placement = place(wiring, profile, keep=self.keep)
        if not placement.layers:
            raise Unsupported("nothing")
        return placement


def _sources(wiring, placement):
    sources: dict[str, list[str]] = {}
    for tensor, leader in placement.scale_of.items():
        sources.setdefault(leader, []).append(tensor)
    return {k: tuple(v) for k, v in sources.items()}
