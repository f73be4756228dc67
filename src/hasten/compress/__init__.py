"""Steps that change structure and numbers."""

from hasten.compress.balance import Equalize, Smooth
from hasten.compress.factorize import DepthwiseSeparable, FactorizeConv, FactorizeLinear
from hasten.compress.fold import FoldBatchNorm, FoldBranches, FoldIdle, FoldInput, FoldLinear, Unfold
from hasten.compress.prune import PruneStructure, PruneWeights
from hasten.compress.quantize import QuantizeAware, QuantizeDynamic, QuantizeMixed, QuantizeStatic, QuantizeWeights, StoreHalf
from hasten.compress.shape import InsertNorm, PruneBlocks, ReplaceActivation
from hasten.compress.share import PackCodebooks, ShareWeights
from hasten.compress.student import UseStudent

__all__ = [
    "DepthwiseSeparable",
    "Equalize",
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
    "QuantizeAware",
    "QuantizeDynamic",
    "QuantizeMixed",
    "QuantizeStatic",
    "QuantizeWeights",
    "ReplaceActivation",
    "ShareWeights",
    "Smooth",
    "StoreHalf",
    "Unfold",
    "UseStudent",
]
