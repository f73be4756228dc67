"""Steps that change structure and numbers: fold, quantize."""

from hasten.compress.fold import FoldBatchNorm, FoldBranches, FoldIdle, FoldInput, FoldLinear, Unfold
from hasten.compress.quantize import QuantizeStatic

__all__ = ["FoldBatchNorm", "FoldBranches", "FoldIdle", "FoldInput", "FoldLinear", "QuantizeStatic", "Unfold"]
