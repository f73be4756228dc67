"""hasten makes neural networks fast and proves that they still work."""

__version__ = "0.1.0"
