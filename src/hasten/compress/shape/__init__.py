"""Steps that change the design of a network: which blocks, norms and activations it has."""

from hasten.compress.shape.activations import ReplaceActivation
from hasten.compress.shape.blocks import PruneBlocks
from hasten.compress.shape.norms import InsertNorm

__all__ = ["InsertNorm", "PruneBlocks", "ReplaceActivation"]
