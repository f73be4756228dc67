"""Weights take few values: each layer, or each group of its channels, has a codebook."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hasten.compress import layers
from hasten.compress.passes import gradients
from hasten.compress.prune.weight_places import RECURRENT, Found, again, each, reachable
from hasten.compress.settings import whole_numbers
from hasten.compress.share import kmeans
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage
from hasten.train import FineTune


@dataclass(frozen=True, kw_only=True)
class ShareWeights:
    """Replaces the weights of a layer by the centroids of a k-means over them: w → c[argmin |w − c|], 2^bits centroids.

    Lloyd's algorithm from centroids at equal distances between the lowest and the highest weight. Exact zeros stay zero and
    take one centroid, so pruned weights stay pruned; the others start outside of the hole that pruning left around 0. With
    `epochs` the centroids learn: the gradient of a centroid is the sum over its weights, ∂L/∂c = Σ ∂L/∂w. The result holds plain
    weights of the usual size and runs as fast as before; `PackCodebooks` stores the codebooks and indices instead, and
    `packed=True` of an engine compresses what repeats. Fold batch norms before (`FoldBatchNorm`): folding later, as the export to
    ONNX does, multiplies every channel by a number of its own, and only the weights of one channel still share.

    Linear, convolutional, recurrent and attention layers are treated, never biases, norms, embeddings or weights shared with one.
    Layers of classes of the user's own are treated where torch.export can follow the network and shows plain products in them (the network
    then comes back lifted), else not. Weights computed from others and tensors with no more weights than centroids are left alone.

    Args:
        bits: of an index, in [2, 8].
        per: "layer" for one codebook per weight tensor, "group" for `groups` of them.
        groups: equal parts of the weight's first axis (output channels; gates of a recurrent layer), >= 1; 1 with "layer". A
            tensor whose first axis is no multiple of it has one codebook.
        importance: "equal", or "fisher": a weight counts F + mean(F) with F the sum over training batches of (∂L/∂w)²; the
            mean over its tensor keeps weights without a gradient from being ignored.
        epochs: of training the centroids, >= 0, and all else that trains; labels alone teach, or the original where there are
            none. With `Context.fidelity` "short" a quarter of it.
        learning_rate: of that training at its highest, > 0.
        only: names or patterns of the layers to treat; empty for all.
        keep: names or patterns of layers to leave alone.

    Raises:
        ValueError: on a setting outside its range.

    References:
        S. Han, H. Mao, W. J. Dally, "Deep Compression", 2015, arXiv:1510.00149.
        Y. Choi, M. El-Khamy, J. Lee, "Towards the Limit of Network Quantization", 2016, arXiv:1612.01543 (fisher).
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.NUMBERS
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"size"})
    reads_profile: ClassVar[bool] = False

    bits: int = 4
    per: Literal["layer", "group"] = "layer"
    groups: int = 1
    importance: Literal["equal", "fisher"] = "equal"
    epochs: float = 0.0
    learning_rate: float = 1e-3
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole_numbers(self)
        for name, known in (("per", ("layer", "group")), ("importance", ("equal", "fisher"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("only", "keep"):
            layers.patterns(name, getattr(self, name))
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be in [2, 8], got {self.bits}")
        if self.groups < 1 or (self.per == "layer" and self.groups != 1):
            raise ValueError(f"groups must be at least 1, and 1 with per='layer', got {self.groups}")
        if not 0 <= self.epochs < math.inf:
            raise ValueError(f"epochs must be a finite number of at least 0, got {self.epochs}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a finite number above 0, got {self.learning_rate}")

    def apply(self, network: Network, context: Context) -> Network:
        """The network with shared weights, in eval mode.

        Raises:
            Unsupported: where no layer has more weights than centroids, where weights are not finite, and where "fisher" has no
                labels to learn from.
            UsageError: where `only` or `keep` meets no layer.
            DataRefused: where the data does not do for the training.
        """
        module, known = reachable(network, only=self.only, keep=self.keep)
        found = {name: w for name, w in known.items() if w.value.numel() > 2**self.bits}
        if not found:
            raise Unsupported(f"ShareWeights needs a layer with more than {2**self.bits} weights, found none")
        if unfit := [name for name, w in found.items() if not w.value.isfinite().all()]:
            raise Unsupported(f"ShareWeights needs finite weights, {unfit[0]!r} has others; name its layer in keep")
        sizes = self._sizes(module, found, network, context)
        books = {name: self._codebook(w.value.detach(), sizes.get(name)) for name, w in found.items()}
        if self.epochs:
            module.load_state_dict(self._learnt(found, books, network.with_body(module), context))
        else:
            _settle(found, books)
        return network.with_body(module)

    @classmethod
    def space(cls, network: Network) -> Space:
        """Bits. Raises Unsupported where no weights could be shared."""
        if not any(w.value.numel() > 4 for w in reachable(network)[1].values()):
            raise Unsupported("ShareWeights needs a layer with more than 4 weights, found none")
        return {"bits": (4, 5, 6, 8)}

    def _sizes(self, module: nn.Module, found: Found, network: Network, context: Context) -> dict[str, Tensor]:
        """How much each weight counts; empty where all count the same."""
        if self.importance == "equal":
            return {}
        total = [torch.zeros_like(v) for v in each(found)]
        for grads in gradients(module, list(each(found)), network, context):
            for sums, grad in zip(total, grads, strict=True):
                sums += grad.square()
        return {name: sums + sums.mean() for name, sums in zip(found, total, strict=True)}

    def _learnt(self, found: Found, books: Books, network: Network, context: Context) -> dict[str, Tensor]:
        """The state of a copy whose centroids were trained."""
        _refuse_tied(network.module, books)
        student = copy.deepcopy(network.module)
        found = again(found, student)
        _attach(found, books)
        tuning = FineTune(epochs=self.epochs, learning_rate=self.learning_rate, distil=0.0)
        trained = tuning.apply(network.with_body(student), context).module
        state = {name: value for name, value in trained.state_dict().items() if ".parametrizations." not in f".{name}"}
        with torch.no_grad():
            return state | {name: getattr(trained.get_submodule(found[name].layer_name), found[name].attribute) for name in books}

    def _codebook(self, weight: Tensor, sizes: Tensor | None) -> _Codebook:
        parts = self.groups if len(weight) % self.groups == 0 else 1
        values = weight.reshape(parts, -1)  # (parts, weights of each)
        counts = [None] * parts if sizes is None else list(sizes.reshape(parts, -1))
        found = [_cluster(row, 2**self.bits, count) for row, count in zip(values, counts, strict=True)]
        centroids = torch.stack([c for c, _ in found]).to(weight.dtype)  # (parts, k)
        index = torch.stack([i for _, i in found]) + 2**self.bits * torch.arange(parts, device=weight.device)[:, None]
        return _Codebook(centroids, index.view_as(weight))


def _cluster(values: Tensor, k: int, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """k centroids and the index of each value's own; exact zeros have the last one to themselves."""
    others = values != 0
    if others.all():
        return _lloyd(values, k, sizes, hole=None)
    centroids = torch.zeros(k, dtype=torch.float64, device=values.device)
    index = torch.full(values.shape, k - 1, device=values.device)
    if others.any():
        left, right = values[values < 0], values[values > 0]
        hole = (left.max().item(), right.min().item()) if len(left) and len(right) else None
        centroids[: k - 1], index[others] = _lloyd(values[others], k - 1, None if sizes is None else sizes[others], hole=hole)
    return centroids, index


def _lloyd(values: Tensor, k: int, sizes: Tensor | None, *, hole: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    centroids = kmeans.lloyd(values, kmeans.linear(values, k, hole=hole), sizes)
    return centroids, kmeans.nearest(values, centroids)


class _Codebook(nn.Module):
    """A parametrization: the weight is c[index], so that gradients of weights add up in their centroid. 0 stays 0."""

    index: Tensor
    alive: Tensor

    def __init__(self, centroids: Tensor, index: Tensor) -> None:
        super().__init__()
        self.start = centroids
        self.register_buffer("index", index)
        self.register_buffer("alive", (centroids != 0).to(centroids))

    def weight(self) -> Tensor:
        """What it says at first."""
        return self.forward(self.start)

    def forward(self, centroids: Tensor) -> Tensor:
        return (centroids * self.alive).flatten()[self.index]

    def right_inverse(self, weight: Tensor) -> Tensor:
        del weight
        return self.start


Books = dict[str, _Codebook]


def _refuse_tied(module: nn.Module, books: Books) -> None:
    names = dict(module.named_parameters(remove_duplicate=False))
    holders = Counter(map(id, names.values()))
    for name in books:
        if holders[id(names[name])] > 1:
            raise Unsupported(f"cannot train the centroids of {name!r}, which two layers hold; take epochs=0 or name its layer in keep")


def _attach(found: Found, books: Books) -> None:
    for name, w in found.items():
        parametrize.register_parametrization(w.layer, w.attribute, books[name])
    for layer in {w.layer: None for w in found.values() if isinstance(w.layer, RECURRENT)}:
        layer.register_forward_pre_hook(_refresh)


def _refresh(layer: Any, args: object) -> None:
    """Recurrent layers keep a list of their weights, which parametrizing leaves behind."""
    del args
    layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]


@torch.no_grad()
def _settle(found: Found, books: Books) -> None:
    for name, w in found.items():
        w.value.copy_(books[name].weight())
