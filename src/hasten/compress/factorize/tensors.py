"""Decompositions of a convolution's weight, in 64 bits: Tucker-2 and CP.

Shapes: weight (out, in, *kernel).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

_SWEEPS = 100
_STILL = 1e-7  # share of the squared norm that one more sweep must explain


@dataclass(frozen=True, kw_only=True, eq=False)
class Tucker:
    """weight ≈ core ×₁ out ×₂ inner: core (r_out, r_in, *kernel), out (out, r_out), inner (in, r_in), both with orthonormal columns."""

    core: Tensor
    out: Tensor
    inner: Tensor

    def whole(self) -> Tensor:
        """The weight that it stands for."""
        return torch.einsum("or,rs...,is->oi...", self.out, self.core, self.inner)


def tucker(weight: Tensor, rank_out: int, rank_in: int) -> Tucker:
    """Tucker-2: truncated higher-order SVD, then higher-order orthogonal iteration (alternating least squares on both bases)."""
    out, inner = basis(unfolded(weight, 0), rank_out), basis(unfolded(weight, 1), rank_in)
    held = 0.0
    for _ in range(_SWEEPS):
        out = basis(unfolded(torch.einsum("oi...,is->os...", weight, inner), 0), rank_out)
        inner = basis(unfolded(torch.einsum("oi...,or->ri...", weight, out), 1), rank_in)
        core = torch.einsum("oi...,or,is->rs...", weight, out, inner)
        now = float(core.square().sum())
        if now - held <= _STILL * now:
            break
        held = now
    return Tucker(core=core, out=out, inner=inner)


def unfolded(weight: Tensor, mode: int) -> Tensor:
    """The tensor as a matrix with the axis `mode` in front."""
    return weight.movedim(mode, 0).flatten(1)


def basis(rows: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of a wide matrix, from its Gram matrix; the identity where none is left out."""
    if rank == len(rows):
        return torch.eye(rank, dtype=rows.dtype)
    vectors: Tensor = torch.linalg.eigh(rows @ rows.T)[1].flip(1)
    return vectors[:, :rank]


def sizes(weight: Tensor, mode: int) -> Tensor:
    """Singular values of the unfolding, largest first."""
    found: Tensor = torch.linalg.svdvals(unfolded(weight, mode))
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Polyads:
    """weight ≈ Σ_r a¹_r ∘ a²_r ∘ …: one factor (axis, rank) for each axis of the weight; `fit` is the share of energy explained."""

    factors: list[Tensor]
    fit: float

    def whole(self) -> Tensor:
        """The weight that it stands for."""
        shape = [len(f) for f in self.factors]
        return (self.factors[0] @ _products(self.factors[1:]).T).view(shape)


def polyads(weight: Tensor, rank: int, seed: int) -> Polyads:
    """CP by alternating least squares, from singular vectors and, where there are too few, random ones.

    Every sweep solves one axis after the other; columns are kept at equal length in all factors, so that no term grows while
    another cancels it.
    """
    draws = torch.Generator().manual_seed(seed)
    factors = [_start(weight, mode, rank, draws) for mode in range(weight.dim())]
    energy, fit = max(float(weight.square().sum()), 1e-300), -math.inf
    for _ in range(_SWEEPS):
        for mode in range(weight.dim()):
            gram = _grams(f for i, f in enumerate(factors) if i != mode)
            gram.diagonal().add_(1e-10 * float(gram.diagonal().mean()) + 1e-30)
            met = _met(weight, factors, mode)
            factors[mode] = torch.linalg.solve(gram, met.T).T
        # |W − Ŵ|² = |W|² − 2⟨W, Ŵ⟩ + |Ŵ|², from what the last axis met
        now = float(2 * (met * factors[-1]).sum() - _grams(factors).sum()) / energy
        factors = _even(factors)
        if now - fit <= _STILL:
            return Polyads(factors=factors, fit=max(now, fit))
        fit = now
    return Polyads(factors=factors, fit=fit)


def _grams(factors: Iterable[Tensor]) -> Tensor:
    made: Tensor | None = None
    for f in factors:
        made = f.T @ f if made is None else made * (f.T @ f)
    assert made is not None
    return made


def _met(weight: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """The weight times the factors of all other axes, (axis, rank): the longest first, by one product, which leaves little."""
    first, *others = sorted((i for i in range(weight.dim()) if i != mode), key=lambda i: -weight.shape[i])
    made: Tensor = torch.tensordot(weight, factors[first], dims=([first], [0]))
    left = [i for i in range(weight.dim()) if i != first]
    for i in others:
        shape = [len(factors[i]) if i == j else 1 for j in left]
        made = (made * factors[i].view(*shape, -1)).sum(left.index(i))
        left.remove(i)
    return made


def _start(weight: Tensor, mode: int, rank: int, draws: torch.Generator) -> Tensor:
    size = weight.shape[mode]
    known = torch.linalg.eigh(unfolded(weight, mode) @ unfolded(weight, mode).T)[1].flip(1)[:, :rank]
    drawn = torch.randn(size, max(rank - size, 0), generator=draws, dtype=weight.dtype) / math.sqrt(size)
    return torch.cat([known, drawn], 1)


def _products(factors: list[Tensor]) -> Tensor:
    """Column by column, all products of entries of the factors, the last axis fastest."""
    made = factors[0]
    for f in factors[1:]:
        made = (made[:, None] * f[None]).flatten(0, 1)
    return made


def _even(factors: list[Tensor]) -> list[Tensor]:
    lengths = [f.norm(dim=0).clamp(min=1e-150) for f in factors]
    size = torch.stack([v.log() for v in lengths]).mean(0).exp()
    return [f / v * size for f, v in zip(factors, lengths, strict=True)]
