"""Steps that move scale from one place of a network to another, so that it rounds better; the function stays the same."""

from hasten.compress.balance.equalize import Equalize
from hasten.compress.balance.smooth import Smooth

__all__ = ["Equalize", "Smooth"]
