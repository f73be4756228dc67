"""Steps that let weights share few values, and store them as such."""

from hasten.compress.share.pack import PackCodebooks
from hasten.compress.share.weights import ShareWeights

__all__ = ["PackCodebooks", "ShareWeights"]
