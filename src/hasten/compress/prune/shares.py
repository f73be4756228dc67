"""How many units each family loses: by its place among the least of all, or by what the outputs bear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch

from hasten.compress.passes import batches
from hasten.compress.prune.saliency import Scores
from hasten.compress.prune.structure import Family, Structure
from hasten.compress.prune.units import Ids
from hasten.core.data import View
from hasten.core.network import Arrays, Network
from hasten.core.runner import joined
from hasten.load.lower import forward

Scope = Literal["layer", "global", "sensitivity"]

SCOPES: tuple[str, ...] = get_args(Scope)
_MOST = 0.9  # of a family, where families compete
_DIGITS = 9  # of scores with mean 1: sums in another order make no difference
_LEVELS = (0.25, 0.5, 0.75, 0.875)
_LOOKED_AT = 128


def together(found: Sequence[Scores], ratio: float) -> list[float]:
    """The share of each family among the least of all units, each family's scores divided by their mean.

    Units that matter alike go from all families in equal shares.
    """
    fair = np.concatenate([s / (s.mean() or 1.0) for s in found]).round(_DIGITS)
    place = np.concatenate([(np.argsort(np.argsort(s, kind="stable"), kind="stable") + 0.5) / len(s) for s in found])
    owner = np.repeat(np.arange(len(found)), [len(s) for s in found])
    gone = np.lexsort((place, fair))[: round(ratio * len(fair))]
    taken = np.bincount(owner[gone], minlength=len(found))
    return [min(_MOST, float(count / len(s))) for count, s in zip(taken, found, strict=True)]


def borne(
    structure: Structure, families: Sequence[Family], found: Sequence[Scores], ratio: float, view: View, fixed_batch: int | None
) -> list[float]:
    """Shares that together take `ratio` of the weights in reach and change the outputs on `view` the least.

    Each family is silenced alone at a few levels; the relative squared change of the outputs is its price there. Levels are
    bought from the cheapest per weight until the ratio is reached: prices are taken to add up.
    """
    pieces = list(batches(view.take(slice(0, max(_LOOKED_AT, fixed_batch or 1))), fixed_batch=fixed_batch))
    whole = _outputs(structure.module, pieces)
    weights = [_weights(structure, family) for family in families]
    prices = [
        [_change(whole, _outputs(structure.silenced(least(family, own, level)), pieces)) for level in _LEVELS]
        for family, own in zip(families, found, strict=True)
    ]
    at = [-1] * len(families)
    while sum(w * (_LEVELS[i] if i >= 0 else 0.0) for w, i in zip(weights, at, strict=True)) < ratio * sum(weights):
        offers = [(_offer(prices[k], at[k]) / (weights[k] * _gain(at[k])), k) for k in range(len(families)) if at[k] + 1 < len(_LEVELS)]
        if not offers:
            break
        at[min(offers)[1]] += 1
    return [_LEVELS[i] if i >= 0 else 0.0 for i in at]


def counts(families: Sequence[Family], left: Sequence[float], start: Sequence[int], multiple: int) -> list[int]:
    """How many units each family keeps: at least one, and a multiple where its units are single channels and it was wide enough at
    the start, so that several rounds end where one would."""
    kept = []
    for family, aim, size in zip(families, left, start, strict=True):
        step = multiple if family.width == 1 and size >= 2 * multiple else 1
        kept.append(min(len(family), max(step, round(aim / step) * step)))
    return kept


def least(family: Family, found: Scores, share: float) -> Ids:
    """The units that matter least, this share of them, never all."""
    count = min(len(family) - 1, round(share * len(family)))
    return family.units[np.sort(np.argsort(found, kind="stable")[:count])]


def _gain(at: int) -> float:
    return _LEVELS[at + 1] - (_LEVELS[at] if at >= 0 else 0.0)


def _offer(prices: Sequence[float], at: int) -> float:
    return max(0.0, prices[at + 1] - (prices[at] if at >= 0 else 0.0))


def _weights(structure: Structure, family: Family) -> float:
    """Numbers stored in the tensors along the axes that hold the family's units."""
    inside, total = set(family.units.tolist()), 0.0
    for place, ids in structure.trace.axes():
        roots = structure.trace.units.find(ids).tolist()
        total += float(np.prod(structure.trace.stored[place.path].shape)) * sum(u in inside for u in roots) / len(roots)
    return total


def _change(whole: Arrays, silenced: Arrays) -> float:
    """Σ squared difference ÷ Σ square, over the outputs of floats."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(whole, silenced, strict=True) if a.dtype.kind == "f"]
    return sum(float(np.square(a - b).sum() / (np.square(a).sum() or 1.0)) for a, b in pairs)


def _outputs(module: object, pieces: Sequence[tuple[torch.Tensor, ...]]) -> Arrays:
    given = [tuple(t.numpy() for t in piece) for piece in pieces]
    return joined(forward(Network(kind="module", body=module, example=inputs), inputs) for inputs in given)
