"""Steps that change structure and numbers: fold, quantize."""

from hasten.compress.fold import FoldBatchNorm
from hasten.compress.quantize import QuantizeDynamic, QuantizeStatic, QuantizeWeights, StoreHalf

__all__ = ["FoldBatchNorm", "QuantizeDynamic", "QuantizeStatic", "QuantizeWeights", "StoreHalf"]
