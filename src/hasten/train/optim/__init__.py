"""Optimizers: torch's interface, each rule written once, run by one compiled loop on a CPU."""

from collections.abc import Callable

import torch

from hasten.train.optim.adafactor import Adafactor
from hasten.train.optim.adam import Adam, AdamW, Lion, NAdam
from hasten.train.optim.adaptive import Adagrad, RMSprop
from hasten.train.optim.kernel import missing
from hasten.train.optim.muon import Muon
from hasten.train.optim.prodigy import Prodigy
from hasten.train.optim.sam import SAM
from hasten.train.optim.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from hasten.train.optim.sgd import SGD, Momentum
from hasten.train.optim.soap import SOAP

__all__ = [  # noqa: RUF022 - the house sorts by code points
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "Momentum",
    "Muon",
    "NAdam",
    "Prodigy",
    "RMSprop",
    "SAM",
    "SGD",
    "SOAP",
    "ScheduleFreeAdamW",
    "ScheduleFreeSGD",
    "missing",
]

BY_NAME: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adafactor": Adafactor,
    "adagrad": Adagrad,
    "adam": Adam,
    "adamw": AdamW,
    "lion": Lion,
    "momentum": Momentum,
    "muon": Muon,
    "nadam": NAdam,
    "prodigy": Prodigy,
    "rmsprop": RMSprop,
    "sam": lambda params, **options: SAM(AdamW(params, **options)),
    "schedule_free": ScheduleFreeAdamW,
    "schedule_free_sgd": ScheduleFreeSGD,
    "sgd": SGD,
    "soap": SOAP,
}
"""What an optimizer is called in words: made of (parameters or groups, lr=…)."""
