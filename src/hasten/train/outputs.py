"""What a network gives, as a tuple of tensors."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils import _pytree as tree

from hasten.core.errors import Unsupported

Tensors = tuple[torch.Tensor, ...]


def outputs_of(module: nn.Module, inputs: Tensors) -> Tensors:
    """The tensors among the outputs, nested ones flat, as a tuple. Raises Unsupported where there are none."""
    outputs = module(*inputs)
    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    found = tuple(leaf for leaf in tree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor))
    if not found:
        raise Unsupported(f"training needs a network that returns tensors, got {type(outputs).__name__}")
    return found
