"""Changing weights by gradients."""

from hasten.train import optim
from hasten.train.distil import Distil
from hasten.train.finetune import FineTune, train_further, training, treatable
from hasten.train.loop import Diverged, Fitted, fit
from hasten.train.settings import Fit, Hints

__all__ = ["Distil", "Diverged", "FineTune", "Fit", "Fitted", "Hints", "fit", "optim", "train_further", "training", "treatable"]
