"""The example batch of a network from a file: the user's rows where they fit its inputs, else numbers made up from the sizes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hasten.core.errors import DataRefused, ModelRefused
from hasten.core.network import Arrays
from hasten.load.batch import random_tensor
from hasten.load.graphs import Input

__all__ = ["fitted", "open_axes", "program_inputs"]

Sizes = tuple[tuple[int | None, ...], ...]
_ROWS = 2
_MOST_MADE_UP = 2**24  # elements; a file must not ask for memory by its shapes alone


def program_inputs(program: torch.export.ExportedProgram) -> tuple[tuple[Input, ...], Sizes]:
    """The inputs of a program, None for an axis of any size, and the sizes that it was exported with."""
    wanted = set(program.graph_signature.user_inputs)
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in wanted]
    names = [n.name for n in program.graph.nodes if n.op == "placeholder" and n.name in wanted]
    inputs, sizes = [], []
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor):
            continue
        shape = tuple(s if isinstance(s, int) else None for s in value.shape)
        dtype = torch.empty(0, dtype=value.dtype)
        if value.dtype == torch.bfloat16:
            raise ModelRefused(f"input {name} must be of a type that numpy has, got bfloat16; export the model in float32")
        inputs.append(Input(name=name, shape=shape, dtype=dtype.numpy().dtype))
        sizes.append(tuple(s if isinstance(s, int) else s.node.hint for s in value.shape))
    return tuple(inputs), tuple(sizes)


def open_axes(inputs: tuple[Input, ...]) -> tuple[tuple[int, ...], ...]:
    """For each input the axes besides the batch that take any size; () where there are none."""
    found = tuple(tuple(i for i, size in enumerate(one.shape) if size is None and i > 0) for one in inputs)
    return found if any(found) else ()


def fitted(inputs: tuple[Input, ...], sizes: Sizes, fixed: int | None, example: Arrays | None) -> Arrays:
    """The example, or one made up, cut to the batch size that is fixed, or its rows repeated up to it; refused where it does not fit."""
    if example is None:
        return _made_up(inputs, sizes, fixed)
    expected = "; ".join(str(i) for i in inputs)
    came = "; ".join(f"{a.dtype} {a.shape}" for a in example)
    if len(example) != len(inputs):
        raise DataRefused(f"the network takes {len(inputs)} inputs ({expected}), got {len(example)} ({came})")
    if fixed is not None:
        if not len(example[0]):
            raise DataRefused(f"the network takes batches of exactly {fixed}, got no row to fill one with")
        example = tuple(np.ascontiguousarray(a[np.arange(fixed) % len(a)]) for a in example)
    for one, array in zip(inputs, example, strict=True):
        fits = len(array.shape) == len(one.shape) and all(s in (None, a) for s, a in zip(one.shape, array.shape, strict=True))
        if not fits or array.dtype != one.dtype:
            raise DataRefused(f"input {one.name} must be {one}, got {array.dtype} {array.shape}")
    return example


def _made_up(inputs: tuple[Input, ...], sizes: Sizes, fixed: int | None) -> Arrays:
    generator = torch.Generator().manual_seed(0)
    arrays = []
    for one, size in zip(inputs, sizes, strict=True):
        shape = [fixed or _ROWS, *(int(s) for s in size[1:] if s is not None)]
        if any(s is None for s in size[1:]) or math.prod(shape) > _MOST_MADE_UP:
            raise DataRefused(f"input {one.name} is {one}: sizes that are open or this large must come from data; give some")
        dtype = torch.from_numpy(np.empty(0, one.dtype)).dtype
        arrays.append(random_tensor(shape, dtype, generator).numpy())
    return tuple(arrays)
