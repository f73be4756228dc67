"""Steps that change structure and numbers: fold, prune, quantize."""

from hasten.compress.fold import FoldBatchNorm
from hasten.compress.prune import PruneWeights
from hasten.compress.quantize import QuantizeStatic

__all__ = ["FoldBatchNorm", "PruneWeights", "QuantizeStatic"]
