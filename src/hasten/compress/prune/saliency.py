"""How much each unit of a family matters: one number per unit, by a rule of choice.

Every layer that makes the units counts alike: its numbers are divided by their mean before they are added up.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from hasten.compress.passes import gradients
from hasten.compress.prune.structure import Family, Structure
from hasten.compress.prune.trace import Place
from hasten.core.errors import Unsupported
from hasten.core.recipe import Context

Saliency = Literal["l1", "l2", "taylor", "fpgm", "bn", "random"]
Scores = np.ndarray[Any, np.dtype[np.float64]]

SALIENCIES: tuple[str, ...] = get_args(Saliency)


def scores(structure: Structure, families: list[Family], saliency: Saliency, context: Context) -> list[Scores]:
    """For each family, one number per unit; the least goes first.

    "l1", "l2": the norm of the weights that make the unit. "fpgm": the sum of its distances to the others' weights, small
    where others can stand in. "bn": the batch norm's |γ|. "taylor": the mean over batches of (Σ gradient · weight)², the
    loss to first order. "random": the control.

    Raises:
        Unsupported: "bn" for a family without batch norm; "taylor" without labels or where nothing can be trained.
    """
    if saliency == "random":
        return [np.random.default_rng([context.seed, zlib.crc32(f.name.encode())]).random(len(f)) for f in families]
    if saliency == "bn":
        return [_gains(structure, family) for family in families]
    tensors = {**dict(structure.module.named_buffers()), **dict(structure.module.named_parameters())}
    if saliency == "taylor":
        effect = _effects(structure, context)
        for family in families:
            if not any(place in effect for place in structure.makers(family)):
                raise Unsupported(f"the saliency 'taylor' needs weights that train, those that make {family.name} do not")
        return [_by_maker(structure, family, effect.get) for family in families]
    rule: dict[str, Callable[[Tensor], Tensor]] = {
        "l1": lambda rows: rows.abs().sum(1),
        "l2": lambda rows: rows.square().sum(1).sqrt(),
        "fpgm": lambda rows: torch.cdist(rows, rows).sum(1),
    }
    return [
        _by_maker(structure, family, lambda place: rule[saliency](_rows(tensors[place.path], place.axis)).numpy()) for family in families
    ]


def _rows(tensor: Tensor, axis: int) -> Tensor:
    return tensor.detach().movedim(axis, 0).flatten(1).double()


def _by_maker(structure: Structure, family: Family, per_position: Callable[[Place], Scores | None]) -> Scores:
    total = np.zeros(len(family))
    where = {unit: i for i, unit in enumerate(family.units.tolist())}
    for place in structure.makers(family):
        found = per_position(place)
        if found is None:
            continue
        found = found / (found.mean() or 1.0)
        for unit, value in zip(structure.positions(place).tolist(), found.tolist(), strict=True):
            if unit in where:
                total[where[unit]] += value
    return total


def _gains(structure: Structure, family: Family) -> Scores:
    tensors = dict(structure.module.named_parameters())
    total, seen = np.zeros(len(family)), False
    where = {unit: i for i, unit in enumerate(family.units.tolist())}
    for place in structure.trace.norms:
        for unit, value in zip(structure.positions(place).tolist(), tensors[place.path].detach().abs().tolist(), strict=True):
            if unit in where:
                total[where[unit]] += value
                seen = True
    if not seen:
        raise Unsupported(f"the saliency 'bn' needs a batch norm behind {family.name}, it has none; take another saliency, or fold later")
    return total


def _effects(structure: Structure, context: Context) -> dict[Place, Scores]:
    """(Σ gradient · weight)² of each position along each output axis, averaged over batches of *train*."""
    parameters = dict(structure.module.named_parameters())
    wanted = [p for p in dict.fromkeys(structure.trace.writers) if p.path in parameters]
    weights = [parameters[place.path] for place in wanted]
    if not weights:
        raise Unsupported("the saliency 'taylor' needs weights that train, the network has none")
    total = {place: np.zeros(parameters[place.path].shape[place.axis]) for place in wanted}
    count = 0
    for found in gradients(structure.module, weights, structure.network, context):
        count += 1
        for place, weight, gradient in zip(wanted, weights, found, strict=True):
            total[place] += _rows(gradient * weight, place.axis).sum(1).square().numpy()
    return {place: value / count for place, value in total.items()}
