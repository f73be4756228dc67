"""Distillation: a smaller network learns to follow the original, outside and inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from hasten.core.errors import UsageError
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Loss, Space, Stage
from hasten.train.finetune import train_further, training, treatable
from hasten.train.settings import Fit, Hints

Match = Literal["logits", "features", "attention"]


@dataclass(frozen=True, kw_only=True)
class Distil:
    """Trains what the steps before have made of the network to follow the original.

    loss = (1 − distil)·loss(labels) + distil·distance(outputs) + hints·mean over layers of distance(hidden values); without
    labels the distance of the outputs stands alone in front. Hidden values are what layers of one name read in both networks:

    - "features": mean squared error ÷ variance; where the student is narrower, a linear map of its channels to the
      original's width is learnt along and thrown away at the end.
    - "attention": in front of convolutions the squared distance of Q/‖Q‖, Q = Σ_c a_c² at each place; in front of layers
      that read tokens the mean squared difference of the cosines between all pairs of tokens. Needs no map.

    Training is that of `FineTune`. With `Context.fidelity` "short" it takes a quarter of the epochs.

    Args:
        match: what is followed beside the labels: the outputs alone ("logits"), or hidden values as well.
        distil: weight of the original's outputs against the labels, in [0, 1]; above 0 for "logits".
        hints: weight of the hidden values, > 0; of no effect on "logits", where it must stay as it is.
        only: patterns of names of linear, convolutional or recurrent layers in the original whose reading is followed. By
            default the last of all layers that read maps of one size: the end of each stage. Must be empty for "logits".
        temperature: at which class probabilities are compared, > 0.
        epochs: passes over *train*, > 0.
        learning_rate: at its highest, > 0.
        batch: examples per step, >= 2; a network with a fixed batch size is trained at that size.

    Raises:
        UsageError: on a value outside its range.

    References:
        G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
        A. Romero et al., "FitNets: Hints for Thin Deep Nets", 2014, arXiv:1412.6550.
        S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural
        Networks via Attention Transfer", 2016, arXiv:1612.03928.
        W. Park, D. Kim, Y. Lu, M. Cho, "Relational Knowledge Distillation", 2019, arXiv:1904.05068 (relations, here of tokens).
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.TRAIN
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"score"})
    reads_profile: ClassVar[bool] = False

    match: Match = "logits"
    distil: float = 0.9
    hints: float = 1.0
    only: tuple[str, ...] = ()
    temperature: float = 4.0
    epochs: float = 10.0
    learning_rate: float = 1e-3
    batch: int = 64

    def __post_init__(self) -> None:
        if self.match not in get_args(Match):
            raise UsageError(f"match must be one of {list(get_args(Match))}, got {self.match!r}")
        if self.match == "logits" and (self.only or self.hints != 1.0):
            raise UsageError("only and hints speak of hidden values; match them by 'features' or 'attention', got 'logits'")
        if self.match == "logits" and self.distil == 0:
            raise UsageError("distil must be above 0 where the outputs alone are matched, got 0; FineTune learns from labels")
        self._settings("classes")  # its checks are ours

    def apply(self, network: Network, context: Context) -> Network:
        """The network with weights trained towards `context.original`.

        Raises:
            Unsupported: where nothing can be trained, where the original is no module, and where a layer of `only`, or every
                layer, cannot be compared: other name, other number of places, called more than once.
            UsageError: where a pattern in `only` meets no layer of the original.
        """
        return train_further(network, context, self._settings(context.loss))

    @classmethod
    def space(cls, network: Network) -> Space:
        """What to match, and learning rates. Raises Unsupported where nothing can be trained."""
        treatable(network)
        return {"match": ("logits", "features", "attention"), "learning_rate": (1e-3, 3e-4, 3e-3)}

    def _settings(self, loss: Loss) -> Fit:
        hints = None if self.match == "logits" else Hints(match=self.match, only=self.only, weight=self.hints)
        return training(self, loss, hints=hints)
