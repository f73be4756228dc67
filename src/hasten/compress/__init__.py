"""Steps that change structure and numbers."""

from hasten.compress.fold import FoldBatchNorm
from hasten.compress.prune import PruneStructure, PruneWeights
from hasten.compress.quantize import QuantizeStatic
from hasten.compress.shape import InsertNorm, PruneBlocks, ReplaceActivation
from hasten.compress.share import PackCodebooks, ShareWeights

__all__ = [
    "FoldBatchNorm",
    "InsertNorm",
    "PackCodebooks",
    "PruneBlocks",
    "PruneStructure",
    "PruneWeights",
    "QuantizeStatic",
    "ReplaceActivation",
    "ShareWeights",
]
