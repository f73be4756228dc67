"""Steps that change structure and numbers: fold, quantize."""

from hasten.compress.fold import FoldBatchNorm
from hasten.compress.quantize import QuantizeAware, QuantizeStatic
from hasten.compress.student import UseStudent

__all__ = ["FoldBatchNorm", "QuantizeAware", "QuantizeStatic", "UseStudent"]
