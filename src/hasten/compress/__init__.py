"""Steps that change structure and numbers: fold, quantize."""

from hasten.compress.fold import FoldBatchNorm, FoldLinear, Unfold
from hasten.compress.quantize import QuantizeStatic

__all__ = ["FoldBatchNorm", "FoldLinear", "QuantizeStatic", "Unfold"]
