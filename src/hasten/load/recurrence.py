"""Tracing of recurrent layers without a look at every step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._decomp import decomposition_table


@contextlib.contextmanager
def recurrent_by_shape(names: tuple[str, ...] = ("lstm", "gru", "rnn_tanh", "rnn_relu")) -> Iterator[None]:
    """While a network is traced, what a recurrent layer gives is told by its shapes.

    Torch would follow every step of every sequence, for the shapes alone: half a minute for three layers and 160 steps.

    Args:
        names: the operators that stay whole in what is traced; one that is taken apart must not be among them.
    """
    layers = [getattr(torch.ops.aten, name).input for name in names]
    keys = torch._C.DispatchKey
    usual = [(dict(layer.py_kernels), decomposition_table[layer]) for layer in layers]
    told = dict.fromkeys((keys.Autograd, keys.CompositeImplicitAutograd, keys.Meta), _recurrent_shapes)
    try:
        for layer in layers:
            _dispatched(layer, layer.py_kernels | told, _recurrent_shapes)
        yield
    finally:
        for layer, before in zip(layers, usual, strict=True):
            _dispatched(layer, *before)


def _dispatched(layer: Any, kernels: dict[Any, Any], apart: Callable[..., Any]) -> None:
    decomposition_table[layer] = apart
    layer.py_kernels.clear()
    layer.py_kernels.update(kernels)
    layer._dispatch_cache.clear()


def _recurrent_shapes(x: torch.Tensor, hx: Any, *others: Any) -> tuple[torch.Tensor, ...]:
    """The outputs and the last states, empty. Shapes: x (…, …, in), states (layers · ways, batch, width).

    Args:
        others: weights, whether there are biases, how many layers, dropout, training, both ways, batch first.
    """
    states = hx if isinstance(hx, (list, tuple)) else [hx]
    ways = 1 + bool(others[5])
    outputs = x.new_empty(*x.shape[:-1], states[0].shape[-1] * ways)
    return (outputs, *(torch.empty_like(state) for state in states))
