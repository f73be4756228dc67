"""Steps that merge layers without changing what the network computes."""

from hasten.compress.fold.batchnorm import FoldBatchNorm
from hasten.compress.fold.branches import FoldBranches
from hasten.compress.fold.idle import FoldIdle
from hasten.compress.fold.linear import FoldLinear
from hasten.compress.fold.standardise import FoldInput
from hasten.compress.fold.unfold import Unfold

__all__ = ["FoldBatchNorm", "FoldBranches", "FoldIdle", "FoldInput", "FoldLinear", "Unfold"]
