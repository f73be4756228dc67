"""The example batch of a network from a file: the user's rows where they fit its inputs, else numbers made up from the sizes."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hasten.core.data import Array
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
        hint = "; is one of them the labels? Say which with --target" if len(example) > len(inputs) else ""
        raise DataRefused(f"the network takes {len(inputs)} inputs ({expected}), got {len(example)} ({came}){hint}")
    if fixed is not None:
        if not len(example[0]):
            raise DataRefused(f"the network takes batches of exactly {fixed}, got no row to fill one with")
        example = tuple(np.ascontiguousarray(a[np.arange(fixed) % len(a)]) for a in example)
    for one, array in zip(inputs, example, strict=True):
        if not _same(one.shape, array.shape) or array.dtype != one.dtype:
            raise DataRefused(f"input {one.name} must be {one}, got {array.dtype} {array.shape}{_way_out(one, array)}")
    return example


def _way_out(one: Input, array: Array) -> str:
    """What would make the array fit, where that can be told."""
    if len(array.shape) == len(one.shape) and array.dtype != one.dtype and array.dtype.kind in "iu" and one.dtype.kind in "iu":
        return f"; store it as {one.dtype}: array.astype('{one.dtype}')"
    if array.ndim == 4 and _same(one.shape, (array.shape[0], array.shape[3], *array.shape[1:3])):
        scaled = ", in floats and scaled as in training" if array.dtype != one.dtype else ""
        return f"; the channels lie last: array.transpose(0, 3, 1, 2){scaled}"
    if len(array.shape) == len(one.shape) - 1 and _same(one.shape, (array.shape[0], 1, *array.shape[1:])):
        return "; an axis of one channel is missing: array[:, None]"
    if array.dtype == np.uint8 and one.dtype.kind == "f" and _same(one.shape, array.shape):
        return "; turn the pixels into floats, scaled as in training"
    if array.ndim == 2 and one.shape[1:] and one.shape[1] is not None and array.shape[1] > one.shape[1]:
        return f"; the data has {array.shape[1] - one.shape[1]} columns too many"
    return ""


def _same(shape: tuple[int | None, ...], other: tuple[int, ...]) -> bool:
    return len(shape) == len(other) and all(s in (None, o) for s, o in zip(shape, other, strict=True))


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
