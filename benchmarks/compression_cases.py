"""What compression.py measures: the networks, how they are trained, the smaller ones that they are held against, and the recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

import torch
from reference_networks import Reference
from torch import nn

from hasten.compress import (
    FactorizeConv,
    FactorizeLinear,
    PackCodebooks,
    PruneBlocks,
    PruneStructure,
    PruneWeights,
    QuantizeDynamic,
    QuantizeStatic,
    QuantizeWeights,
    ShareWeights,
    Smooth,
)
from hasten.core.recipe import Step
from hasten.tasks import networks
from hasten.train import Augment, FineTune, Fit, Precision

FIT = Fit(epochs=5, batch=64, learning_rate=0.01)
LARGE = replace(FIT, epochs=5, learning_rate=0.002, augmentation=Augment(resize=0.5), precision=Precision(channels_last=True))
Steps = tuple[Step, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One network.

    Args:
        original: how it is trained.
        smaller: the network of the same kind that the control trains from scratch.
        recipes: names → steps; the controls have as much time as the first one.
        one_original: all seeds start from the same trained network, as a user's is one; they differ in what the recipes and the
            controls draw.
    """

    original: Reference
    smaller: Callable[[], nn.Module]
    recipes: dict[str, Steps]
    one_original: bool = False


def _recipes(half: float, most: Steps, words: str, *, last: Steps = (), alone: bool = False, epochs: float = 8) -> dict[str, Steps]:
    """The recipes of image networks: as much gone as it bears, `most`, trained for `epochs`; a share `half`; and each step `alone`."""
    tune, long = FineTune(epochs=3, learning_rate=3e-3), FineTune(epochs=epochs, learning_rate=5e-3)
    chance: Steps = tuple(replace(step, saliency="random") for step in most)  # type: ignore[type-var]
    recipes: dict[str, Steps] = {
        words: (*most, long, *last),
        f"{words} by chance": (*chance, long, *last),
        "int8": (QuantizeStatic(),),
        "16 values": (ShareWeights(bits=4), PackCodebooks()),
        f"−{half:.0%} units": (PruneStructure(ratio=half), tune),
        f"−{half:.0%} units by chance": (PruneStructure(ratio=half, saliency="random"), tune),
        f"−{half:.0%} units by sensitivity": (PruneStructure(ratio=half, scope="sensitivity"), tune),
        "thin factors": (FactorizeConv(), FactorizeLinear(), tune),
        "90 % zeros": (PruneWeights(amount=0.9, scope="global", schedule="gradual", epochs=3),),
    }
    return recipes if alone else dict(islice(recipes.items(), 5))


class Bag(nn.Module):
    """The mean of learnt word vectors and a linear layer: what a sentence encoder has to be held against."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(30_522, 64), nn.Linear(64, classes)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        shares = mask.to(self.words.weight.dtype).unsqueeze(-1)
        return self.head((self.words(ids) * shares).sum(1) / shares.sum(1))


def _texts() -> dict[str, Steps]:
    tune = FineTune(epochs=2, batch=32, learning_rate=3e-4)
    return {
        "−50% units, dynamic int8": (PruneStructure(ratio=0.5), tune, QuantizeDynamic()),
        "−50% units, dynamic int8 by chance": (PruneStructure(ratio=0.5, saliency="random"), tune, QuantizeDynamic()),
        "int8": (QuantizeStatic(),),
        "smoothed, int8": (Smooth(), QuantizeStatic()),
        "dynamic int8": (QuantizeDynamic(),),
        "weights in 4 bits": (QuantizeWeights(bits=4),),
    }


def _reference(network: str, goal: float, settings: Fit = FIT) -> Reference:
    return Reference(network=network, task="fashion_mnist", examples=20_000, goal=goal, settings=settings)


CASES = {
    "mlp": Case(
        original=_reference("mlp", 0.86, Fit(epochs=20, learning_rate=0.003)),
        smaller=lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10)),
        recipes=_recipes(0.5, (PruneStructure(ratio=0.75),), "−75% units, int8", last=(QuantizeStatic(),), alone=True),
    ),
    "lstm": Case(
        original=_reference("lstm", 0.85, Fit(epochs=8, batch=64, learning_rate=0.003)),
        smaller=lambda: networks.lstm(hidden=40),
        recipes=_recipes(0.5, (PruneStructure(ratio=0.6875),), "−69% units", alone=True),
    ),
    "mobilenet": Case(
        original=_reference("mobilenet", 0.89),
        smaller=lambda: networks.mobilenet(width=8),
        recipes=_recipes(0.25, (PruneStructure(ratio=0.5),), "−50% units"),
    ),
    "resnet20": Case(
        original=_reference("resnet20", 0.90),
        smaller=lambda: networks.resnet20(width=8),
        recipes=_recipes(0.25, (PruneBlocks(blocks=2), PruneStructure(ratio=0.5)), "−2 blocks, −50% units"),
    ),
    "resnet18": Case(
        original=_reference("resnet18", 0.91, LARGE),
        smaller=lambda: networks.resnet18(width=16),
        recipes=dict(
            islice(_recipes(0.5, (PruneStructure(ratio=0.75),), "−75% units, int8", epochs=5, last=(QuantizeStatic(),)).items(), 3)
        ),
        one_original=True,
    ),
    "minilm": Case(
        original=Reference(network="minilm", task="r8", goal=0.95, settings=Fit(epochs=6, batch=32, learning_rate=0.01), still="encoder."),
        smaller=lambda: Bag(8),
        recipes=_texts(),
        one_original=True,
    ),
}
