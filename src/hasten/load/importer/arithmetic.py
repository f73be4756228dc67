"""Operators that treat each element by itself, and products of matrices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.core.errors import Unsupported
from hasten.load.importer.table import Call, Either, Value, elementwise, operator, scalar


def _bits(x: Tensor) -> Tensor:
    return torch.bitwise_not(x)


elementwise(
    {
        "Identity": lambda x: x,
        "Abs": torch.abs, "Neg": torch.neg, "Ceil": torch.ceil, "Floor": torch.floor, "Round": torch.round, "Sqrt": torch.sqrt,
        "Exp": torch.exp, "Log": torch.log, "Reciprocal": torch.reciprocal, "Sign": torch.sign, "Erf": torch.erf,
        "Sin": torch.sin, "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos, "Atan": torch.atan,
        "Sinh": torch.sinh, "Cosh": torch.cosh, "Asinh": torch.asinh, "Acosh": torch.acosh, "Atanh": torch.atanh,
        "Not": torch.logical_not, "BitwiseNot": _bits, "IsNaN": torch.isnan, "Det": torch.linalg.det,
        "Relu": F.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh, "Softplus": F.softplus, "Softsign": F.softsign,
        "HardSwish": F.hardswish, "Mish": F.mish,
    }
)  # fmt: skip


def _pair(*names: str, numbers: bool = True) -> Callable[[Callable[[Any, Any], Tensor]], Callable[..., Tensor]]:
    """Enters an operator of two operands; one without axes goes in as a number where torch takes one."""

    def enter(function: Callable[[Any, Any], Tensor]) -> Callable[..., Tensor]:
        def both(a: Either, b: Either, *, call: Call, axis: int | None = None, broadcast: int = 0) -> Tensor:
            x, y = (scalar(v) if numbers else v for v in (a, b))
            x, y = (call.tensor(v) for v in (x, y))
            if not isinstance(x, Tensor) and not isinstance(y, Tensor):
                x = call.tensor(a) if not isinstance(a, np.ndarray) else torch.as_tensor(a)
            if broadcast and axis is not None and isinstance(y, Tensor) and isinstance(x, Tensor):
                y = y.reshape(y.shape + (1,) * (x.dim() - axis - y.dim()))
            return function(x, y)

        for name in names:
            operator(name)(both)
        return function

    return enter


_pair("Add")(lambda a, b: a + b)
_pair("Sub")(lambda a, b: a - b)
_pair("Mul")(lambda a, b: a * b)
_pair("Equal")(lambda a, b: torch.eq(a, b) if isinstance(a, Tensor) else torch.eq(b, a))
_pair("Greater")(lambda a, b: a > b)
_pair("Less")(lambda a, b: a < b)
_pair("GreaterOrEqual")(lambda a, b: a >= b)
_pair("LessOrEqual")(lambda a, b: a <= b)
_pair("And", numbers=False)(torch.logical_and)
_pair("Or", numbers=False)(torch.logical_or)
_pair("Xor", numbers=False)(torch.logical_xor)
_pair("BitwiseAnd", numbers=False)(torch.bitwise_and)
_pair("BitwiseOr", numbers=False)(torch.bitwise_or)
_pair("BitwiseXor", numbers=False)(torch.bitwise_xor)


@_pair("Div")
def _divide(a: Any, b: Any) -> Tensor:
    floats = any(v.is_floating_point() if isinstance(v, Tensor) else isinstance(v, (float, torch.SymFloat)) for v in (a, b))
    if floats:
        return a / b  # type: ignore[no-any-return]
    return torch.div(a if isinstance(a, Tensor) else torch.full_like(b, a), b, rounding_mode="trunc")


@operator("Mod")
def _mod(a: Tensor, b: Either, *, fmod: int = 0, call: Call) -> Tensor:
    b = scalar(b)
    return (torch.fmod if fmod else torch.remainder)(a, call.tensor(b))


@operator("Pow")
def _pow(x: Tensor, y: Either, *, call: Call) -> Tensor:
    """The result has the type of the base."""
    y = scalar(y)
    if isinstance(y, float) and x.is_floating_point():
        return torch.pow(x, y)
    exponent = call.tensor(y)
    if isinstance(exponent, Tensor) and exponent.is_floating_point() and not x.is_floating_point():
        return torch.pow(x.to(exponent.dtype), exponent).to(x.dtype)
    return torch.pow(x, exponent).to(x.dtype)


@operator("BitShift")
def _shift(x: Tensor, by: Tensor, *, direction: str) -> Tensor:
    kind, signed = x.dtype, {torch.uint16: torch.int32, torch.uint32: torch.int64}.get(x.dtype, x.dtype)
    a, b = x.to(signed), by.to(signed)
    return (torch.bitwise_left_shift(a, b) if direction == "LEFT" else torch.bitwise_right_shift(a, b)).to(kind)


@operator("Sum")
def _sum(*xs: Tensor) -> Tensor:
    return functools.reduce(torch.add, xs)


@operator("Mean")
def _mean(*xs: Tensor) -> Tensor:
    return functools.reduce(torch.add, xs) / len(xs)


@operator("Max")
def _max(*xs: Tensor) -> Tensor:
    return functools.reduce(torch.maximum, xs)


@operator("Min")
def _min(*xs: Tensor) -> Tensor:
    return functools.reduce(torch.minimum, xs)


@operator("IsInf")
def _is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if detect_negative:
        return torch.isneginf(x)
    return torch.isposinf(x) if detect_positive else torch.zeros_like(x, dtype=torch.bool)


@operator("Clip")
def _clip(x: Tensor, low: Either = None, high: Either = None, *, call: Call, min: float | None = None, max: float | None = None) -> Tensor:
    low, high = (scalar(v) if v is not None else w for v, w in ((low, min), (high, max)))
    if isinstance(low, (Tensor, np.ndarray)) or isinstance(high, (Tensor, np.ndarray)):
        x = x if low is None else torch.maximum(x, torch.as_tensor(call.tensor(low), dtype=x.dtype))
        return x if high is None else torch.minimum(x, torch.as_tensor(call.tensor(high), dtype=x.dtype))
    if (low, high) == (0, 6) and x.is_floating_point():
        return F.relu6(x)
    if low is None and high is None:
        return x
    if low == 0 and (high is None or high >= 3e38) and x.is_floating_point():
        return F.relu(x)
    if low is not None and high is not None and high < low:
        return torch.full_like(x, high)
    return torch.clamp(x, low, high)


@operator("Gelu", "com.microsoft.Gelu")
def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@operator("com.microsoft.FastGelu")
def _fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("Swish")
def _swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("com.microsoft.QuickGelu")
def _quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    return x * torch.sigmoid(alpha * x)


@operator("LeakyRelu")
def _leaky(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


@operator("PRelu")
def _prelu(x: Tensor, weight: Either, *, call: Call) -> Tensor:
    """One slope, or one for each channel, is a layer; other shapes are arithmetic."""
    if isinstance(weight, np.ndarray):
        places = x.dim() - 2  # axes behind the channels
        by_channel = x.dim() > 1 and weight.shape in ((x.shape[1], *[1] * places), (1, x.shape[1], *[1] * places))
        if weight.size == 1 or by_channel:
            return F.prelu(x, call.weight("weight", weight.reshape(-1)))
    slope = call.tensor(weight)
    if call.opset < 7 and slope.dim() == 1 and x.dim() > 1:
        slope = slope.reshape([-1] + [1] * (x.dim() - 2))
    return torch.where(x < 0, x * slope, x)


@operator("Elu")
def _elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@operator("Celu")
def _celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


@operator("Selu")
def _selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    if math.isclose(alpha, 1.6732632, rel_tol=1e-6) and math.isclose(gamma, 1.05070102, rel_tol=1e-6):
        return F.selu(x)
    return gamma * F.elu(x, alpha)


@operator("ThresholdedRelu")
def _thresholded(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.threshold(x, alpha, 0.0)


@operator("HardSigmoid")
def _hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    if math.isclose(alpha, 1 / 6, rel_tol=1e-5) and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(alpha * x + beta, 0, 1)


@operator("Shrink")
def _shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    inside = torch.where(x < -lambd, x + bias, torch.zeros_like(x))
    return torch.where(x > lambd, x - bias, inside)


@operator("Dropout")
def _dropout(
    x: Tensor, ratio_: Either = None, training: Either = None, *, call: Call, ratio: float = 0.5, seed: int | None = None
) -> Value:
    """Off in eval mode, and a layer that trains again; one that the file leaves on is refused."""
    on = training is not None and (isinstance(training, Tensor) or bool(training))
    rate = ratio if ratio_ is None else scalar(ratio_)
    if on and (isinstance(training, Tensor) or rate != 0):
        raise Unsupported("expected dropout that is off outside training, got one that the file keeps on")
    given = F.dropout(x, rate, training=False) if isinstance(rate, float) and x.is_floating_point() else x
    return (given, torch.ones_like(x, dtype=torch.bool)) if call.reads(1) else given


@operator("MatMul")
def _matmul(a: Either, b: Either, *, call: Call) -> Tensor:
    """By a constant matrix on the right it is a linear layer."""
    if isinstance(a, Tensor) and a.dim() > 1 and _matrix(b):
        return F.linear(a, call.weight("weight", b.T))
    return torch.matmul(call.tensor(a), call.tensor(b))


@operator("hasten.Linear")
def _linear(a: Either, b: Either, bias: Either, *, call: Call) -> Tensor:
    """MatMul and the addition of a row behind it."""
    if isinstance(b, Tensor) and isinstance(a, np.ndarray):  # xᵀ = …: the constant is on the left
        return torch.matmul(call.tensor(a), b) + call.tensor(bias)
    if isinstance(a, Tensor) and a.dim() > 1 and _matrix(b) and bias.shape == (b.shape[1],):
        return F.linear(a, call.weight("weight", b.T), call.weight("bias", bias))
    return torch.matmul(call.tensor(a), call.tensor(b)) + call.tensor(bias)


def _matrix(value: Either) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind == "f"


@operator("Gemm")
def _gemm(
    a: Tensor,
    b: Either,
    bias: Either = None,
    *,
    call: Call,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    broadcast: int = 0,
) -> Tensor:
    a = a.transpose(0, 1) if transA else a
    row = bias is None or (
        isinstance(bias, np.ndarray) and bias.dtype.kind == "f" and bias.shape[-1:] != (1,) and bias.size == bias.shape[-1:][0]
    )
    if _matrix(b) and alpha == 1 and beta == 1 and row:
        weight = call.weight("weight", b if transB else b.T)
        return F.linear(a, weight, None if bias is None else call.weight("bias", bias.reshape(-1)))
    b = call.tensor(b)
    product = torch.matmul(a, b.transpose(0, 1) if transB else b)
    product = product if alpha == 1 else product * alpha if product.is_floating_point() else (product * alpha).to(product.dtype)
    bias = call.tensor(bias)
    return product if bias is None else product + (bias if beta == 1 else bias * beta)


@operator("Einsum")
def _einsum(*xs: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *xs)
