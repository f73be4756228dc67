"""Pruning: less of a network."""

from hasten.compress.prune.channels import PruneStructure

__all__ = ["PruneStructure"]
