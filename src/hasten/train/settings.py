"""How to train: one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from hasten.core.errors import UsageError
from hasten.core.recipe import Loss

Schedule = Literal["linear", "cosine", "constant"]
Optimizer = Literal["adamw", "sgd"]
Augmentation = Literal["none", "shift"]
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
    schedule: "linear" and "cosine" fall to 0 at the end ("linear" is the one-cycle policy), "constant" stays.

    Args:
        loss: "classes": cross-entropy with integer labels, of logits, or of probabilities where the network's outputs are
            such; "values": mean squared error ÷ variance of the labels; "original": mean over the outputs of (mean squared
            error ÷ variance) against the teacher's outputs, labels unused.
        epochs: passes over the data, > 0; parts of a pass count.
        batch: examples per step, >= 2; all of them where there are fewer. A pass leaves out its incomplete last batch.
        optimizer: "adamw", or "sgd" with Nesterov momentum 0.9; the fused kernels of torch.
        learning_rate: at its highest, > 0.
        weight_decay: on weights with two or more axes only, not on biases and norms; >= 0.
        schedule: of the learning rate.
        warm_up: share of the steps, in [0, 1).
        label_smoothing: share of a label spread over all classes, in [0, 1); for "classes".
        distil: weight of the teacher's outputs against the labels, in [0, 1]: loss = (1 − distil)·labels + distil·teacher.
            The teacher's part is T²·KL(teacher ‖ network) of the classes' probabilities at temperature T, or for "values"
            the squared error. 0 for "original", which has no labels to weigh.
        temperature: T, > 0.
        augmentation: of the first input; "shift" moves images by up to two pixels, each on its own.
        hints: what is learnt from the teacher's hidden values besides; None for nothing.
        freeze_norms: batch norms keep their statistics and normalise with them.
        clip: largest global norm of the gradient, > 0; `math.inf` for none.
        seed: of every random number.

    Raises:
        UsageError: on a value outside its range.

    References:
        L. N. Smith, N. Topin, "Super-Convergence", 2018, arXiv:1708.07120 (one cycle).
        G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
    """

    loss: Loss = "classes"
    epochs: float = 10.0
    batch: int = 128
    optimizer: Optimizer = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    schedule: Schedule = "linear"
    warm_up: float = 0.2
    label_smoothing: float = 0.0
    distil: float = 0.0
    temperature: float = 2.0
    augmentation: Augmentation = "none"
    hints: Hints | None = None
    freeze_norms: bool = False
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("loss", Loss), ("optimizer", Optimizer), ("schedule", Schedule), ("augmentation", Augmentation)):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"{name} must be one of {list(get_args(kind))}, got {getattr(self, name)!r}")
        for name in ("epochs", "learning_rate", "temperature"):
            _within(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a finite number above 0")
        for name in ("warm_up", "label_smoothing"):
            _within(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        _within("batch", self.batch, self.batch >= 2, "at least 2")
        _within("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "a finite number of at least 0")
        _within("distil", self.distil, 0 <= self.distil <= 1, "in [0, 1]")
        _within("clip", self.clip, self.clip > 0, "above 0")
        if self.loss == "original" and self.distil:
            raise UsageError(f"distil weighs a teacher against labels and must be 0 with the loss 'original', got {self.distil}")
        if self.loss != "classes" and self.label_smoothing:
            raise UsageError(f"label_smoothing must be 0 with the loss {self.loss!r}, got {self.label_smoothing}")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss looks at a teacher."""
        return self.loss == "original" or self.distil > 0 or self.hints is not None

    def steps(self, examples: int) -> int:
        """Number of optimizer steps on so many examples."""
        return max(1, round(self.epochs * max(1, examples // self.batch)))

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of one step, counted from 1.

        >>> [round(Fit(learning_rate=1.0, warm_up=0.5).rate(step, 4), 2) for step in (1, 2, 3, 4)]
        [0.33, 0.67, 1.0, 0.5]
        """
        warm = int(self.warm_up * steps)
        if step <= warm:
            return self.learning_rate * step / (warm + 1)
        left = (steps - step + 1) / (steps - warm)
        shape = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[self.schedule]
        return self.learning_rate * shape


def _within(name: str, value: float, holds: bool, words: str) -> None:
    if not holds:
        raise UsageError(f"{name} must be {words}, got {value}")
