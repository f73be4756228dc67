"""Steps that change structure and numbers: fold, prune, share, quantize."""

from hasten.compress.fold import FoldBatchNorm
from hasten.compress.prune import PruneWeights
from hasten.compress.quantize import QuantizeStatic
from hasten.compress.share import PackCodebooks, ShareWeights

__all__ = ["FoldBatchNorm", "PackCodebooks", "PruneWeights", "QuantizeStatic", "ShareWeights"]
