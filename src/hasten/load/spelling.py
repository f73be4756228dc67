"""Functions that exporters know in part, written out in what they all know, while a network is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_FAR = 25  # rows from which torch itself computes distances by a product


class Spelled(TorchFunctionMode):
    """Bags of rows of an embedding, which ONNX has as a loop over the examples, and distances between all pairs, which it has not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = _WRITTEN.get(func)
        found = written(*args, **(kwargs or {})) if written else None
        return func(*args, **(kwargs or {})) if found is None else found


def _bag(ids: Tensor, weight: Tensor, *, mode: str = "mean", per_sample_weights: Tensor | None = None, **others: Any) -> Tensor | None:
    """Of ids (n, length) the mean, sum or maximum of their rows, (n, width); None where that is not all there is to it."""
    if ids.dim() != 2 or any(others.get(name) is not None for name in ("offsets", "max_norm", "padding_idx")):
        return None
    rows = F.embedding(ids, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    return rows.amax(1) if mode == "max" else rows.sum(1) if mode == "sum" else rows.mean(1)


def _distances(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary") -> Tensor | None:
    """Of a (…, n, d) and b (…, m, d) the Euclidean distances (…, n, m)."""
    if p != 2:
        return None
    if compute_mode == "donot_use_mm_for_euclid_dist" or (isinstance(b.shape[-2], int) and b.shape[-2] <= _FAR):
        return (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1).sqrt()
    squares = a.square().sum(-1, keepdim=True) + b.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * a @ b.transpose(-1, -2)).clamp(min=0).sqrt()


_WRITTEN: dict[Callable[..., Any], Callable[..., Tensor | None]] = {F.embedding_bag: _bag, torch.cdist: _distances}
