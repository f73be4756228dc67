"""Steps that turn floats into integers. One representation: pairs of QuantizeLinear and DequantizeLinear in an ONNX graph."""

from hasten.compress.quantize.aware import QuantizeAware
from hasten.compress.quantize.static import QuantizeStatic

__all__ = ["QuantizeAware", "QuantizeStatic"]
