"""How to train: one frozen value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from hasten.core.errors import UsageError
from hasten.core.names import patterns
from hasten.core.recipe import Loss
from hasten.train import optim
from hasten.train.augment import Augment
from hasten.train.average import Average
from hasten.train.clip import Clip
from hasten.train.health import Health
from hasten.train.precision import Precision
from hasten.train.schedules import NAMED, Moment, OfTorch, OneCycle, Plateau, Schedule
from hasten.train.stop import Stop

OptimizerFactory = Callable[..., torch.optim.Optimizer]
Augmentation = Literal["none", "shift"]
Balance = Literal["none", "sampling", "weights"]
Match = Literal["features", "attention"]


@dataclass(frozen=True, kw_only=True)
class Hints:
    """What a network learns from the hidden values of its teacher, beside the outputs.

    Args:
        match: "features": mean squared error ÷ variance of what layers of the same name read, the student's brought to the
            teacher's width by a learnt linear map; "attention": squared distance of where both look (`hints.Attend`).
        only: patterns of layer names; by default, of all layers that read maps of one size, the last.
        weight: of the mean over the layers against the rest of the loss, > 0.

    Raises:
        UsageError: on a value outside its range.

    References:
        A. Romero et al., "FitNets: Hints for Thin Deep Nets", 2014, arXiv:1412.6550.
        S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural
        Networks via Attention Transfer", 2016, arXiv:1612.03928.
    """

    match: Match = "features"
    only: tuple[str, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.match not in get_args(Match):
            raise UsageError(f"match must be one of {list(get_args(Match))}, got {self.match!r}")
        if isinstance(self.only, str) or not all(isinstance(name, str) for name in self.only):
            raise UsageError(f"only must be a tuple of layer names or patterns, got {self.only!r}")
        _within("weight", self.weight, 0 < self.weight < math.inf, "a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How to train.

    The learning rate rises linearly from near 0 to `learning_rate` during the first `warm_up` of the steps, then follows the
    schedule: "linear" and "cosine" fall to 0 at the end ("linear" is the one-cycle policy), "constant" stays. What a field of
    its own class does is told there; whatever is off changes no byte of the result. "one-cycle" rises by itself, from its own
    beginning to `learning_rate`, without a warm-up in front.

    Args:
        loss: "classes": cross-entropy with integer labels, of logits, or of probabilities where the network's outputs are
            such, labels of −100 left out; "values": mean squared error ÷ variance of the labels; "original": mean over the
            outputs of (mean squared error ÷ variance) against the teacher's outputs, labels unused.
        epochs: passes over the data, > 0; parts of a pass count.
        batch: examples per step, >= 1; all of them where there are fewer, or for None. A pass leaves out its incomplete last
            batch. 1 is a single example; a batch norm that needs more refuses.
        optimizer: a name of `optim.BY_NAME`: "adamw", or "sgd" with Nesterov momentum 0.9, in fused kernels: ours on a CPU with a
            compiler, else torch's; "muon" with steps of AdamW's size, which embeddings, biases and norms take; "schedule_free",
            for schedule="constant"; "sam" around AdamW; others with their own defaults. Or what makes one of (parameter groups,
            lr=learning_rate), such as `torch.optim.RMSprop`. One whose step needs a closure gets the gradient of the same batch.
        learning_rate: at its highest, > 0; or "auto" (see `rates.choose`).
        weight_decay: on weights with two or more axes only, not on biases and norms; >= 0.
        schedule: of the learning rate: a name, one of `schedules`, or `OfTorch`.
        warm_up: share of the steps, in [0, 1).
        label_smoothing: share of a label spread over all classes, in [0, 1); for "classes".
        distil: weight of the teacher's outputs against the labels, in [0, 1]: loss = (1 − distil)·labels + distil·teacher.
            The teacher's part is T²·KL(teacher ‖ network) of the classes' probabilities at temperature T, or for "values"
            the squared error. 0 for "original", which has no labels to weigh. Outputs behind the first are held to a teacher's;
            with 0 there is none, and they drift.
        temperature: T, > 0.
        augmentation: of the first input; "shift" moves images by up to two pixels, each on its own; or an `Augment`.
        hints: what is learnt from the teacher's hidden values besides; None for nothing.
        freeze_norms: batch norms keep their statistics and normalise with them.
        clip: largest global norm of the gradient, > 0; `math.inf` for none; or a `Clip`.
        seed: of every random number.
        accumulate: parts that a batch goes through the network in, >= 1; their gradients are added by the number of targets.
        balance: of classes: "sampling" draws each class equally often, "weights" weighs its losses instead; or the weights.
        penalty: (a, b): a·Σ|w| + b/2·Σw² on weights with two or more axes is added to the loss that the gradient is of.
        freeze: patterns of layers that stay as they are, statistics included.
        rates: (pattern of layers, factor on their learning rate), the first that meets counts.
        stop, precision, average, health: see there.

    Raises:
        UsageError: on a value outside its range.

    References:
        L. N. Smith, N. Topin, "Super-Convergence", 2018, arXiv:1708.07120 (one cycle).
        G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
    """

    loss: Loss = "classes"
    epochs: float = 10.0
    batch: int | None = 128
    optimizer: str | OptimizerFactory = "adamw"
    learning_rate: float | Literal["auto"] = 2e-3
    weight_decay: float = 0.01
    schedule: str | Schedule | OfTorch = "linear"
    warm_up: float = 0.2
    label_smoothing: float = 0.0
    distil: float = 0.0
    temperature: float = 2.0
    augmentation: Augmentation | Augment = "none"
    hints: Hints | None = None
    freeze_norms: bool = False
    clip: float | Clip = 1.0
    seed: int = 0
    accumulate: int = 1
    balance: Balance | tuple[float, ...] = "none"
    penalty: tuple[float, float] = (0.0, 0.0)
    freeze: tuple[str, ...] = ()
    rates: tuple[tuple[str, float], ...] = ()
    stop: Stop = field(default_factory=Stop)
    precision: Precision = field(default_factory=Precision)
    average: Average | None = None
    health: Health = field(default_factory=Health)

    def __post_init__(self) -> None:
        self._check_words()
        for name in ("epochs", "temperature"):
            _within(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a finite number above 0")
        if self.learning_rate != "auto":
            _within("learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "a finite number above 0")
        for name in ("warm_up", "label_smoothing"):
            _within(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        _within("batch", self.batch, self.batch is None or self.batch >= 1, "at least 1, or None for all")
        _within("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "a finite number of at least 0")
        _within("distil", self.distil, 0 <= self.distil <= 1, "in [0, 1]")
        _within("accumulate", self.accumulate, self.accumulate >= 1, "at least 1")
        _within("penalty", self.penalty, all(0 <= p < math.inf for p in self.penalty), "two finite numbers of at least 0")
        for pattern, factor in self.rates:
            _within(f"the factor of {pattern!r} in rates", factor, 0 < factor < math.inf, "a finite number above 0")
        patterns("freeze", self.freeze)
        self._check_together()
        self.clipping()  # its checks are ours

    def _check_words(self) -> None:
        kinds = {"loss": get_args(Loss), "augmentation": get_args(Augmentation), "balance": get_args(Balance)}
        for name, known in {**kinds, "optimizer": tuple(optim.BY_NAME)}.items():
            value = getattr(self, name)
            if value not in known and (isinstance(value, str) or name == "loss"):
                raise UsageError(f"{name} must be one of {list(known)}, got {value!r}")
        if isinstance(self.schedule, str) and self.schedule not in NAMED:
            raise UsageError(f"schedule must be one of {list(NAMED)}, got {self.schedule!r}")
        if isinstance(self.learning_rate, str) and self.learning_rate != "auto":
            raise UsageError(f"learning_rate must be a number or 'auto', got {self.learning_rate!r}")

    def _check_together(self) -> None:
        if self.loss == "original" and self.distil:
            raise UsageError(f"distil weighs a teacher against labels and must be 0 with the loss 'original', got {self.distil}")
        if self.loss != "classes" and self.label_smoothing:
            raise UsageError(f"label_smoothing must be 0 with the loss {self.loss!r}, got {self.label_smoothing}")
        if self.loss != "classes" and self.balance != "none":
            raise UsageError(f"balance is of classes and must be 'none' with the loss {self.loss!r}, got {self.balance!r}")
        if isinstance(self.schedule, OfTorch) and self.warm_up:
            raise UsageError(f"warm_up must be 0 with a scheduler of torch, which holds the rate itself, got {self.warm_up}")
        if isinstance(self.schedule, OfTorch) and self.learning_rate == "auto":
            raise UsageError("learning_rate='auto' sets the rate, which a scheduler of torch holds itself; give a number")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss looks at a teacher."""
        return self.loss == "original" or self.distil > 0 or self.hints is not None

    @property
    def needs_validation(self) -> bool:
        """Whether something looks at validation data."""
        return self.stop.patience is not None or isinstance(self.scheduled(), Plateau)

    def augment(self) -> Augment:
        """The augmentation, its short name written out."""
        return self.augmentation if isinstance(self.augmentation, Augment) else Augment(shift=2 * (self.augmentation == "shift"))

    def clipping(self) -> Clip:
        """The clipping, a plain number written out."""
        return self.clip if isinstance(self.clip, Clip) else Clip(at=self.clip)

    def scheduled(self) -> Schedule | OfTorch:
        """The schedule, its name written out."""
        return NAMED[self.schedule] if isinstance(self.schedule, str) else self.schedule

    def size(self, examples: int) -> int:
        """Examples in a batch."""
        return examples if self.batch is None else min(self.batch, examples)

    def steps(self, examples: int) -> int:
        """Number of optimizer steps on so many examples."""
        return self.stop.steps or max(1, round(self.epochs * max(1, examples // (self.batch or examples))))

    def rate(self, step: int, steps: int, *, epoch: int = 0, looks: tuple[float, ...] = ()) -> float:
        """The learning rate of one step, counted from 1, after so many finished passes and looks at validation data.

        >>> [round(Fit(learning_rate=1.0, warm_up=0.5).rate(step, 4), 2) for step in (1, 2, 3, 4)]
        [0.33, 0.67, 1.0, 0.5]
        """
        schedule, highest = self.scheduled(), self.highest
        warm = 0 if isinstance(schedule, OneCycle) else int(self.warm_up * steps)
        if step <= warm:
            return highest * step / (warm + 1)
        if isinstance(schedule, OfTorch):
            return highest
        return highest * schedule.share(Moment(step=step - warm - 1, steps=steps - warm, epoch=epoch, looks=looks))

    @property
    def highest(self) -> float:
        """The learning rate as a number. Raises UsageError where it was to be chosen and has not been."""
        if isinstance(self.learning_rate, str):
            raise UsageError("learning_rate='auto' must be chosen first; `rates.choose` and `Trainer` do")
        return self.learning_rate


def _within(name: str, value: Any, holds: bool, words: str) -> None:
    if not holds:
        raise UsageError(f"{name} must be {words}, got {value}")
