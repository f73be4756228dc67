"""Steps that replace a layer by thinner ones whose product is near it."""

from hasten.compress.factorize.conv import FactorizeConv
from hasten.compress.factorize.linear import FactorizeLinear
from hasten.compress.factorize.separable import DepthwiseSeparable

__all__ = ["DepthwiseSeparable", "FactorizeConv", "FactorizeLinear"]
