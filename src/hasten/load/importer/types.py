"""Element types: ONNX's numbers and torch's names, and casts between them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hasten.core.errors import Unsupported
from hasten.load.importer.table import Array, Call, Either, Value, operator, to_tensor

KINDS: dict[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 14: torch.complex64, 15: torch.complex128, 16: torch.bfloat16,
}  # fmt: skip


def kind(number: int) -> torch.dtype:
    """torch's type for ONNX's number of it. Raises Unsupported for texts and the narrow ones."""
    if number not in KINDS:
        raise Unsupported(f"expected a type of numbers that torch computes with, got ONNX type {number}")
    return KINDS[number]


@operator("Cast")
def _cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x if x.dtype == kind(to) else x.to(kind(to))


@operator("CastLike")
def _cast_like(x: Either, like: Either, *, call: Call, saturate: int = 1, round_mode: str = "up") -> Value:
    """A constant stays one: of the other value only its type is asked."""
    target = like.dtype if isinstance(like, Tensor) else number_of(like)
    if isinstance(x, np.ndarray) and x.dtype != object and target != torch.bfloat16:
        return x.astype(str(target).removeprefix("torch."))
    return call.tensor(x).to(target)


@operator("BitCast")
def _bit_cast(x: Tensor, *, to: int) -> Tensor:
    return x.view(kind(to))


def number_of(array: Array) -> torch.dtype:
    """torch's type of a constant."""
    return torch.int64 if array.dtype == object else to_tensor(np.empty(0, array.dtype)).dtype
