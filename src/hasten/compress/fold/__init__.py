"""Steps that merge layers without changing what the network computes."""

from hasten.compress.fold.batchnorm import FoldBatchNorm

__all__ = ["FoldBatchNorm"]
