"""Steps that change structure and numbers: fold, quantize."""

from hasten.compress.fold import FoldBatchNorm
from hasten.compress.quantize import QuantizeAware, QuantizeStatic

__all__ = ["FoldBatchNorm", "QuantizeAware", "QuantizeStatic"]
