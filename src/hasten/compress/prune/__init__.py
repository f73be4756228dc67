"""Steps that take weights away."""

from hasten.compress.prune.weights import PruneWeights

__all__ = ["PruneWeights"]
