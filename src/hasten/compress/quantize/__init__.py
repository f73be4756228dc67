"""Steps that choose number formats: integers of 8 and 4 bits, and 16-bit storage, in an ONNX graph.

Static integers have one representation: pairs of QuantizeLinear and DequantizeLinear.
"""

from hasten.compress.quantize.aware import QuantizeAware
from hasten.compress.quantize.dynamic import QuantizeDynamic
from hasten.compress.quantize.half import StoreHalf
from hasten.compress.quantize.mixed import QuantizeMixed
from hasten.compress.quantize.static import QuantizeStatic
from hasten.compress.quantize.weights import QuantizeWeights

__all__ = ["QuantizeAware", "QuantizeDynamic", "QuantizeMixed", "QuantizeStatic", "QuantizeWeights", "StoreHalf"]
