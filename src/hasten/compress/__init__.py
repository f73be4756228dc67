"""Steps that change structure and numbers: fold, balance, quantize."""

from hasten.compress.balance import Equalize, Smooth
from hasten.compress.fold import FoldBatchNorm
from hasten.compress.quantize import QuantizeDynamic, QuantizeMixed, QuantizeStatic, QuantizeWeights, StoreHalf

__all__ = ["Equalize", "FoldBatchNorm", "QuantizeDynamic", "QuantizeMixed", "QuantizeStatic", "QuantizeWeights", "Smooth", "StoreHalf"]
