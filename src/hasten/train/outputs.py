"""What a network gives, as a tuple of tensors."""

from __future__ import annotations

import torch
from torch import nn

from hasten.core.errors import Unsupported

Tensors = tuple[torch.Tensor, ...]


def outputs_of(module: nn.Module, inputs: Tensors) -> Tensors:
    """The outputs as a tuple. Raises Unsupported on anything but tensors."""
    outputs = module(*inputs)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    if not (isinstance(outputs, (tuple, list)) and outputs and all(isinstance(o, torch.Tensor) for o in outputs)):
        raise Unsupported(f"training needs a network that returns a tensor or a tuple of tensors, got {type(outputs).__name__}")
    return tuple(outputs)
