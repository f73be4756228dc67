"""Steps that take weights away: units of the structure, or single weights."""

from hasten.compress.prune.channels import PruneStructure
from hasten.compress.prune.weights import PruneWeights

__all__ = ["PruneStructure", "PruneWeights"]
