"""x"""
from hasten.compress.quantize.static import QuantizeStatic
