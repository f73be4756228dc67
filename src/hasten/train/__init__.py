"""Changing weights by gradients."""

from hasten.train import optim
from hasten.train.augment import Augment
from hasten.train.average import Average
from hasten.train.checkpoint import Checkpoints
from hasten.train.clip import Clip
from hasten.train.distil import Distil
from hasten.train.finetune import FineTune, train_further, training, treatable
from hasten.train.health import Health
from hasten.train.loop import Diverged, Fitted, Trainer, fit
from hasten.train.precision import Precision
from hasten.train.settings import Fit, Hints
from hasten.train.stop import Stop

__all__ = [
    "Augment",
    "Average",
    "Checkpoints",
    "Clip",
    "Distil",
    "Diverged",
    "FineTune",
    "Fit",
    "Fitted",
    "Health",
    "Hints",
    "Precision",
    "Stop",
    "Trainer",
    "fit",
    "optim",
    "train_further",
    "training",
    "treatable",
]
