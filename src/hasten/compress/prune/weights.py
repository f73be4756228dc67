"""Single weights become zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hasten.compress import layers
from hasten.compress.prune import weight_masks as masks
from hasten.compress.prune.weight_places import Found, again, reachable
from hasten.compress.prune.weight_saliency import SALIENCIES
from hasten.compress.settings import whole_numbers
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage
from hasten.train import FineTune

_USUAL = 0.5  # share of zeros where nothing is said
_RAMP = 0.5  # share of the training steps in which the zeros grow; in the rest the others settle
_GROWTHS = 16  # times that the zeros grow


@dataclass(frozen=True, kw_only=True)
class PruneWeights:
    """Sets the weights that matter least to zero, one by one, anywhere in a layer (unstructured pruning).

    The zeros are plain zeros in plain weights; nothing holds them afterwards, so a step that trains fills them again: train
    inside this one, with `epochs`. They make the stored file smaller where it is packed (`OnnxRuntime(packed=True)`), and
    nothing faster: with 90 % zeros no convolution engine that was measured (ONNX Runtime, OpenVINO, XNNPACK) gained anything,
    so this step aims at the size alone.

    Linear, convolutional, recurrent and attention layers are pruned; never biases, norms, embeddings or weights shared with one.
    Layers of classes of the user's own are pruned where torch.export can follow the network and shows plain products in them (the network
    then comes back lifted), else not. Weights that are computed from others (weight norm, parametrizations) are left alone, and so are,
    with `pattern`, weights whose inputs are no multiple of m. Zeros that are there already count.

    Args:
        amount: share of zeros, in [0, 1); a half where neither it nor `threshold` nor `pattern` is given.
        threshold: zero is what has |w| < threshold, >= 0; with the saliency "magnitude".
        pattern: (n, m): of every m weights that follow each other along the inputs, the n that matter most stay; 0 < n < m.
        scope: "layer" takes the same share of every weight tensor, "global" the lowest of all together; with `amount`.
        saliency: what matters: "magnitude" |w|; "taylor" the mean over training batches of |w · ∂loss/∂w|; "activation"
            |w| · ‖x‖₂ with the layer's input feature or channel x over the calibrate view; "random", the control.
        schedule: "once" cuts before training; "gradual" while it trains: s_t = s_f − s_f·(1 − t/T)³ with T half of the
            steps, in 16 cuts.
        epochs: of training with the zeros held, >= 0, above 0 for "gradual"; labels alone teach, or the original where there
            are none. With `Context.fidelity` "short" a quarter of it.
        learning_rate: of that training at its highest, > 0.
        only: names or patterns of the layers to prune; empty for all.
        keep: names or patterns of layers to leave alone.

    Raises:
        ValueError: on a setting outside its range, or two that exclude each other.

    References:
        S. Han, J. Pool, J. Tran, W. Dally, "Learning both Weights and Connections for Efficient Neural Networks", 2015,
            arXiv:1506.02626.
        M. Zhu, S. Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878 (gradual).
        P. Molchanov, S. Tyree, T. Karras, T. Aila, J. Kautz, "Pruning Convolutional Neural Networks for Resource Efficient
            Inference", 2016, arXiv:1611.06440 (taylor).
        M. Sun, Z. Liu, A. Bair, J. Z. Kolter, "A Simple and Effective Pruning Approach for Large Language Models", 2023,
            arXiv:2306.11695 (activation).
        A. Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv:2104.08378 (pattern).
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"size"})
    reads_profile: ClassVar[bool] = False

    amount: float | None = None
    threshold: float | None = None
    pattern: tuple[int, int] | None = None
    scope: Literal["layer", "global"] = "layer"
    saliency: Literal["magnitude", "taylor", "activation", "random"] = "magnitude"
    schedule: Literal["once", "gradual"] = "once"
    epochs: float = 0.0
    learning_rate: float = 1e-3
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole_numbers(self)
        for name, known in (("scope", ("layer", "global")), ("saliency", tuple(SALIENCIES)), ("schedule", ("once", "gradual"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("only", "keep"):
            layers.patterns(name, getattr(self, name))
        self._check_numbers()
        self._check_pairs()

    def _check_numbers(self) -> None:
        if self.amount is not None and not 0 <= self.amount < 1:
            raise ValueError(f"amount must be in [0, 1), got {self.amount}")
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold must be a finite number of at least 0, got {self.threshold}")
        if self.pattern is not None and not (len(self.pattern) == 2 and 0 < self.pattern[0] < self.pattern[1]):
            raise ValueError(f"pattern must be (n, m) with 0 < n < m, got {self.pattern}")
        if not 0 <= self.epochs < math.inf:
            raise ValueError(f"epochs must be a finite number of at least 0, got {self.epochs}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a finite number above 0, got {self.learning_rate}")

    def _check_pairs(self) -> None:
        given = [name for name in ("amount", "threshold", "pattern") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"only one of amount, threshold and pattern says how much, got {' and '.join(given)}")
        if self.scope == "global" and given not in ([], ["amount"]):
            raise ValueError(f"scope must be 'layer' with {given[0]}, which looks at no other layer")
        if self.threshold is not None and (self.saliency, self.schedule) != ("magnitude", "once"):
            raise ValueError("threshold must go with the saliency 'magnitude' and the schedule 'once'")
        if self.schedule == "gradual" and not self.epochs:
            raise ValueError("epochs must be above 0 with the schedule 'gradual', got 0")

    def apply(self, network: Network, context: Context) -> Network:
        """The network with zeros, in eval mode.

        Raises:
            Unsupported: where no layer can be pruned, or the saliency cannot tell what matters in one, or gives NaN.
            UsageError: where `only` or `keep` meets no layer.
            DataRefused: where the data does not do for the saliency or the training.
        """
        module, known = reachable(network, only=self.only, keep=self.keep)
        if not (found := self._fitting(known)):
            raise Unsupported(_why_nothing(network.module, self.pattern))
        cut = _Cut(self, network, context, found)
        if self.schedule == "once":
            cut.grow(module, found, 1.0)
        if not self.epochs:
            return network.with_body(module)
        return FineTune(epochs=self.epochs, learning_rate=self.learning_rate, distil=0.0).train(
            network.with_body(module), context, after_step=cut.after_step
        )

    @classmethod
    def space(cls, network: Network) -> Space:
        """Shares and scopes. Raises Unsupported on a network without such layers."""
        if not reachable(network)[1]:
            raise Unsupported(_why_nothing(network.module, None))
        return {"amount": (0.5, 0.8, 0.9), "scope": ("layer", "global")}

    def _fitting(self, found: Found) -> Found:
        if self.pattern is None:
            return found
        return {name: w for name, w in found.items() if w.value.shape[w.inputs_axis] % self.pattern[1] == 0}

    def _masks(self, scores: dict[str, Tensor], found: Found, share: float) -> masks.Masks:
        """What is zero when so large a share of all the zeros is there."""
        if self.threshold is not None:
            return {name: values < self.threshold for name, values in scores.items()}
        if self.pattern is not None:
            (stay, of), axes = self.pattern, {name: w.inputs_axis for name, w in found.items()}
            drop = round((of - stay) * share)
            return {name: masks.by_pattern(values, drop, of, axes[name]) for name, values in scores.items()}
        choose: Callable[[dict[str, Tensor], float], masks.Masks] = masks.overall if self.scope == "global" else masks.by_layer
        return choose(scores, share * (_USUAL if self.amount is None else self.amount))


class _Cut:
    """The zeros of one application: makes them grow, and holds them while the network trains."""

    def __init__(self, step: PruneWeights, network: Network, context: Context, given: Found) -> None:
        self._step, self._network, self._context, self._given = step, network, context, given
        self._found: Found | None = None
        self._masks: masks.Masks = {}

    def grow(self, module: nn.Module, found: Found, share: float) -> None:
        """Chooses the zeros and sets them."""
        scores = SALIENCIES[self._step.saliency](module, found, self._network, self._context)
        if unclear := [name for name, values in scores.items() if values.isnan().any()]:
            raise Unsupported(f"PruneWeights needs to know what each weight matters, for {unclear[0]!r} it is not a number")
        self._masks = self._step._masks(scores, found, share)
        self._hold(found)

    def after_step(self, student: nn.Module, step: int, steps: int) -> None:
        """Sets the zeros again after an optimizer's step, more of them where it is their time."""
        if self._found is None:  # the trained copy is another module than the one that was cut
            self._found = again(self._given, student)
            self._masks = {name: mask.to(self._found[name].value.device) for name, mask in self._masks.items()}
        last = max(1, round(_RAMP * steps))
        if self._step.schedule == "gradual" and step <= last and _GROWTHS * step // last > _GROWTHS * (step - 1) // last:
            self.grow(student, self._found, 1 - (1 - step / last) ** 3)
        else:
            self._hold(self._found)

    @torch.no_grad()
    def _hold(self, found: Found) -> None:
        for name, mask in self._masks.items():
            found[name].value.masked_fill_(mask, 0)


def _why_nothing(module: nn.Module, pattern: tuple[int, int] | None) -> str:
    kinds = sorted({type(m).__name__ for m in module.modules() if m._parameters})
    inputs = f" whose inputs are a multiple of {pattern[1]}" if pattern else ""
    wanted = f"PruneWeights needs a linear, convolutional, recurrent or attention layer{inputs}"
    return f"{wanted}; the network's layers with weights are {', '.join(kinds)[:200] or 'none'}"
