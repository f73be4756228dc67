"""Changing weights by gradients."""

from hasten.train.finetune import FineTune
from hasten.train.loop import Diverged, Fitted, fit
from hasten.train.settings import Fit

__all__ = ["Diverged", "FineTune", "Fit", "Fitted", "fit"]
