"""Steps that change structure and numbers."""

from hasten.compress.factorize import DepthwiseSeparable, FactorizeConv, FactorizeLinear
from hasten.compress.fold import FoldBatchNorm, FoldBranches, FoldIdle, FoldInput, FoldLinear, Unfold
from hasten.compress.prune import PruneStructure, PruneWeights
from hasten.compress.quantize import QuantizeStatic
from hasten.compress.shape import InsertNorm, PruneBlocks, ReplaceActivation
from hasten.compress.share import PackCodebooks, ShareWeights

__all__ = [
    "DepthwiseSeparable",
    "FactorizeConv",
    "FactorizeLinear",
    "FoldBatchNorm",
    "FoldBranches",
    "FoldIdle",
    "FoldInput",
    "FoldLinear",
    "InsertNorm",
    "PackCodebooks",
    "PruneBlocks",
    "PruneStructure",
    "PruneWeights",
    "QuantizeStatic",
    "ReplaceActivation",
    "ShareWeights",
    "Unfold",
]
