"""Steps that change structure and numbers: fold, factorize, quantize."""

from hasten.compress.factorize import DepthwiseSeparable, FactorizeConv, FactorizeLinear
from hasten.compress.fold import FoldBatchNorm, FoldBranches, FoldIdle, FoldInput, FoldLinear, Unfold
from hasten.compress.quantize import QuantizeStatic

__all__ = [
    "DepthwiseSeparable",
    "FactorizeConv",
    "FactorizeLinear",
    "FoldBatchNorm",
    "FoldBranches",
    "FoldIdle",
    "FoldInput",
    "FoldLinear",
    "QuantizeStatic",
    "Unfold",
]
