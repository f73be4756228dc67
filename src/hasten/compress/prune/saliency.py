"""How much each unit of a family matters: one number per unit, by a rule of choice.

Every layer that makes the units counts alike: its numbers are divided by their mean before they are added up.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from hasten.compress.prune.structure import Family, Structure
from hasten.compress.prune.trace import Place
from hasten.core.errors import Unsupported
from hasten.core.recipe import Context
from hasten.train.objective import objective
from hasten.train.outputs import outputs_of
from hasten.train.settings import Fit

Saliency = Literal["l1", "l2", "taylor", "fpgm", "bn", "random"]
Scores = np.ndarray[Any, np.dtype[np.float64]]

SALIENCIES: tuple[str, ...] = get_args(Saliency)
_BATCHES, _BATCH = 8, 64


def scores(structure: Structure, families: list[Family], saliency: Saliency, context: Context) -> list[Scores]:
    """For each family, one number per unit; the least goes first.

    "l1", "l2": the norm of the weights that make the unit. "fpgm": the sum of its distances to the others' weights, small
    where others can stand in. "bn": the batch norm's |γ|. "taylor": the mean over batches of (Σ gradient · weight)², the
    loss to first order. "random": the control.

    Raises:
        Unsupported: "bn" for a family without batch norm; "taylor" where nothing can be trained.
    """
    if saliency == "random":
        return [np.random.default_rng([context.seed, zlib.crc32(f.name.encode())]).random(len(f)) for f in families]
    if saliency == "bn":
        return [_gains(structure, family) for family in families]
    tensors = {**dict(structure.module.named_buffers()), **dict(structure.module.named_parameters())}
    if saliency == "taylor":
        effect = _effects(structure, context)
        return [_by_maker(structure, family, lambda place: effect[place]) for family in families]
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


def _by_maker(structure: Structure, family: Family, per_position: Callable[[Place], Scores]) -> Scores:
    total = np.zeros(len(family))
    where = {unit: i for i, unit in enumerate(family.units.tolist())}
    for place in structure.makers(family):
        found = per_position(place)
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
    module = structure.module
    wanted = list(dict.fromkeys(structure.trace.writers))
    parameters = dict(module.named_parameters())
    learnt = [p for p in wanted if p.path in parameters]
    if not learnt:
        raise Unsupported("the saliency 'taylor' needs weights that train, the network has none")
    loss = _loss(module, context)
    total = {place: np.zeros(parameters[place.path].shape[place.axis]) for place in learnt}
    pieces = torch.split(torch.arange(min(len(context.train), _BATCHES * _BATCH)), _BATCH)
    for index in pieces:
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(index), list(parameters.values()), allow_unused=True)
        known = dict(zip(parameters, gradients, strict=True))
        for place in learnt:
            gradient = known[place.path]
            if gradient is not None:
                product = (gradient * parameters[place.path]).detach()
                total[place] += _rows(product, place.axis).sum(1).square().numpy() / len(pieces)
    return total


def _loss(module: nn.Module, context: Context) -> Callable[[Tensor], Tensor]:
    """The loss of the examples at an index. Without labels: the mean square of the outputs, what they depend on most."""
    inputs = tuple(torch.from_numpy(np.array(a[: _BATCHES * _BATCH])) for a in context.train.inputs)
    if context.loss == "original":
        return lambda index: _size(outputs_of(module, tuple(a[index] for a in inputs)))
    labels = context.train.labels
    aim = objective(Fit(loss=context.loss, batch=_BATCH), module, None, inputs, None if labels is None else labels[: _BATCHES * _BATCH])

    def loss(index: Tensor) -> Tensor:
        seen = tuple(a[index] for a in inputs)
        return aim(outputs_of(module, seen), index, seen)

    return loss


def _size(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([o.square().mean() for o in outputs if o.is_floating_point()]).sum()
