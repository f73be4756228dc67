"""What a step sees when it runs a network: batches as the network takes them, and what gradients say about its weights.

Shapes: inputs, one tensor per network input, each (batch, …).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.data import View
from hasten.core.errors import DataRefused, Unsupported
from hasten.core.network import Network
from hasten.core.recipe import Context
from hasten.train.objective import objective
from hasten.train.outputs import outputs_of
from hasten.train.settings import Fit

BATCH = 64
_EXAMPLES = 2048  # that gradients are taken on: more change the order of weights by little


def batches(view: View, *, fixed_batch: int | None, device: str | torch.device = "cpu") -> Iterator[tuple[Tensor, ...]]:
    """The examples of `view` in batches that the network takes; a fixed batch leaves out the incomplete last one.

    Raises:
        DataRefused: on too few examples for one batch.
    """
    size, least = fixed_batch or BATCH, fixed_batch or 1
    if len(view) < least:
        raise DataRefused(f"calibration needs at least {least} examples, got {len(view)}")
    for piece in view.batches(size):
        if len(piece) >= least:
            yield tuple(torch.from_numpy(np.array(a)).to(device) for a in piece.inputs)


def gradients(module: nn.Module, weights: Sequence[Tensor], network: Network, context: Context) -> Iterator[list[Tensor]]:
    """The gradient of the training loss with respect to `weights`, batch by batch, on up to 2,048 examples of *train*.

    `module` runs in eval mode and is given back in the mode that it came in; no `.grad` is left behind.

    Raises:
        Unsupported: where the data has no labels: against the original's own outputs the gradient says nothing.
        DataRefused: on labels that do not fit, or fewer examples than one batch.
    """
    if context.loss == "original":
        raise Unsupported("gradients need labels: the distance to the original's own outputs is 0, and so is its gradient")
    view, size = context.train, network.fixed_batch or BATCH
    if size == 1:
        raise Unsupported("gradients are taken on batches, this network takes one example at a time; re-export with a dynamic batch")
    if len(view) < (network.fixed_batch or 1):
        raise DataRefused(f"gradients need at least {network.fixed_batch or 1} examples, got {len(view)}")
    view = view.take(np.linspace(0, len(view) - 1, min(len(view), _EXAMPLES)).round().astype(np.int64))
    inputs = tuple(torch.from_numpy(np.array(a)).to(weights[0].device) for a in view.inputs)
    pieces = [p for p in torch.split(torch.arange(len(view)), size) if len(p) == size or not network.fixed_batch]
    training = module.training
    module.eval()
    wants = [w.requires_grad for w in weights]
    try:
        for w in weights:
            w.requires_grad_(True)
        aim = objective(Fit(loss=context.loss, batch=size), module, None, inputs, view.labels)
        for index in pieces:
            seen = tuple(a[index] for a in inputs)
            with torch.enable_grad():
                loss = aim(outputs_of(module, seen), index, seen)
            found = torch.autograd.grad(loss, weights, allow_unused=True)
            yield [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
    finally:
        for w, wanted in zip(weights, wants, strict=True):
            w.requires_grad_(wanted)
        module.train(training)
