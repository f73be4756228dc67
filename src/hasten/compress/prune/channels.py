"""Structured pruning: channels, heads, hidden units leave, and every tensor that held them becomes smaller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import fx

from hasten.compress import layers
from hasten.compress.prune import saliency as saliencies
from hasten.compress.prune import shares
from hasten.compress.prune.saliency import SALIENCIES, Saliency, Scores
from hasten.compress.prune.shares import SCOPES, Scope
from hasten.compress.prune.structure import SINGLE, Family, Structure, analyse, chosen
from hasten.compress.prune.units import Ids
from hasten.compress.settings import whole_numbers
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage
from hasten.train import Fit, train_further


@dataclass(frozen=True, kw_only=True)
class PruneStructure:
    """Takes out the units that matter least: channels of convolutions, features of linear layers, hidden units of recurrent
    layers and of MLPs, attention heads; the network really shrinks, and a denser engine runs it faster.

    Units that live and die together (the channels of a residual stream, the query, key, value and output of a head, the
    groups of a convolution) are found on the exported graph and go as one. What a layer norm averages over, what the network
    gives out, and what runs through an operator that is not known stays. Before anything is returned the smaller network is
    run against the whole one with the same units set to zero; they must agree to 1e-4.

    Args:
        ratio: share of the units that go, in (0, 1). Of the weights in reach for the scope "sensitivity".
        saliency: what makes a unit matter: "l1", "l2" (norm of its weights), "taylor" (gradient · weight on *train*; needs labels), "fpgm"
            (distance to the other units), "bn" (scale of its batch norm), "random" (the control).
        scope: "layer" takes the share of every family of units alike, "global" the least of all together, "sensitivity" where
            the outputs on the calibrate view change the least.
        multiple: families of single channels keep a multiple of this, where they have at least twice as many; >= 1.
        rounds: the share is reached in so many equal steps, with a training after each but the last; >= 1. A step in which no layer
            loses a whole multiple is left out, with its training.
        epochs: passes over *train* in each of these trainings, > 0.
        only: patterns of layer names; all where it is empty.
        keep: patterns of layer names whose units stay.

    Raises:
        ValueError, TypeError: on a setting outside its range.

    References:
        H. Li et al., "Pruning Filters for Efficient ConvNets", 2016, arXiv:1608.08710.
        P. Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019, arXiv:1906.10771 ("taylor").
        Y. He et al., "Filter Pruning via Geometric Median", 2018, arXiv:1811.00250 ("fpgm").
        Z. Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017, arXiv:1708.06519 ("bn").
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = False

    ratio: float = 0.5
    saliency: Saliency = "l2"
    scope: Scope = "layer"
    multiple: int = 8
    rounds: int = 1
    epochs: float = 1.0
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole_numbers(self)
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio must be in (0, 1), got {self.ratio}")
        if self.saliency not in SALIENCIES:
            raise ValueError(f"saliency must be one of {', '.join(SALIENCIES)}, got {self.saliency!r}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {self.multiple}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if not self.epochs > 0:
            raise ValueError(f"epochs must be above 0, got {self.epochs}")
        layers.patterns("only", self.only)
        layers.patterns("keep", self.keep)

    def apply(self, network: Network, context: Context) -> Network:
        """The smaller network, in lifted form. Train it afterwards: what was taken out is missed.

        Raises:
            Unsupported: where nothing can shrink, or a layer in `only` cannot; with the reason.
            UsageError: where a pattern meets no layer.
        """
        start: dict[tuple[str, int], int] = {}
        made = network
        for turn in range(1, self.rounds + 1):
            structure = analyse(made)
            if start and not _several(structure, start):
                break
            # A layer that has come down to it in an earlier round is no reason to refuse the others.
            only = tuple(name for name in self.only if not start or structure.refused.get(name) != SINGLE)
            families = chosen(structure, only=only, keep=self.keep)
            for family, key in zip(families, _keys(families), strict=True):
                start.setdefault(key, len(family))
            context.progress((turn - 0.9) / self.rounds, "weighing units")
            gone = self._gone(structure, families, context, turn / self.rounds * self.ratio, [start[key] for key in _keys(families)])
            if len(gone) == 0:
                continue
            made = network.with_body(_smaller(structure, gone))
            if turn < self.rounds:
                made = self._trained(made, context)
        if made is network:
            widest = max(families, key=len)
            raise Unsupported(f"no unit can go at this ratio and multiple: the widest layer, {widest.name}, has {len(widest)} units")
        return made

    @classmethod
    def space(cls, network: Network) -> Space:
        """Ratios and scopes. Raises Unsupported where nothing can shrink."""
        chosen(analyse(network), only=(), keep=())
        return {"ratio": (0.5, 0.25, 0.75, 0.875), "scope": ("layer", "global", "sensitivity")}

    def _gone(self, structure: Structure, families: list[Family], context: Context, ratio: float, start: list[int]) -> Ids:
        """The units that leave, when `ratio` of those at the start shall be gone."""
        found = saliencies.scores(structure, families, self.saliency, context)
        if self.scope == "layer":
            left = [size * (1 - ratio) for size in start]
        else:
            left = self._competing(structure, families, found, context, (1 - ratio) * sum(start))
        kept = shares.counts(families, left, start, self.multiple)
        return np.concatenate([shares.least(f, s, 1 - k / len(f)) for f, s, k in zip(families, found, kept, strict=True)])

    def _competing(
        self, structure: Structure, families: list[Family], found: Sequence[Scores], context: Context, left: float
    ) -> list[float]:
        """How many units of each family are left, when so many of all shall be."""
        due = 1 - left / sum(len(f) for f in families)
        if due <= 0:
            return [float(len(f)) for f in families]
        if self.scope == "global":
            part = shares.together(found, due)
        else:
            part = shares.borne(structure, families, found, due, context.calibrate, structure.network.fixed_batch)
        return [len(f) * (1 - p) for f, p in zip(families, part, strict=True)]

    def _trained(self, network: Network, context: Context) -> Network:
        settings = Fit(loss=context.loss, epochs=self.epochs, batch=64, learning_rate=1e-3, weight_decay=0.0)
        return train_further(network, context, settings)


def _keys(families: Sequence[Family]) -> list[tuple[str, int]]:
    """Each family's name and its number among those of that name: pieces of one output that go ways of their own share it."""
    names = [family.name for family in families]
    return [(name, names[:at].count(name)) for at, name in enumerate(names)]


def _several(structure: Structure, start: Iterable[tuple[str, int]]) -> bool:
    """Whether a family of the start has more than its last unit left, or cannot be treated for another reason."""
    alive = {family.name for family in structure.families}
    return any(name in alive or structure.refused.get(name, SINGLE) != SINGLE for name, _ in start)


def _smaller(structure: Structure, gone: Ids) -> fx.GraphModule:
    if (wrong := structure.exact(gone)) is not None:
        raise Unsupported(f"taking units out of this network is not safe: {wrong}")
    return structure.without(gone)
