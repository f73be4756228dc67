"""Recurrent layers as one call: traced without a look at every step, and written as ONNX's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._decomp import decomposition_table


@contextlib.contextmanager
def recurrent_by_shape() -> Iterator[None]:
    """While a network is traced, what a recurrent layer gives is told by its shapes.

    Torch would follow every step of every sequence, for the shapes alone: half a minute for three layers and 160 steps.
    """
    layers = [getattr(torch.ops.aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")]
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


def translations() -> dict[Any, Callable[..., Any]]:
    """How plain recurrent layers (`nn.RNN`) are written in ONNX; the exporter writes each of their steps."""
    aten = torch.ops.aten
    return {aten.rnn_tanh.input: _written("Tanh"), aten.rnn_relu.input: _written("Relu")}


def _written(activation: str) -> Callable[..., Any]:
    from onnxscript import opset18

    op: Any = opset18

    def rnn(  # the arguments of the operator
        x: Any, hx: Any, params: Sequence[Any], has_biases: bool, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        del dropout, train
        ways, each = 1 + bidirectional, 4 if has_biases else 2
        x, last = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x, []
        for depth in range(num_layers):
            own = [params[at * each : (at + 1) * each] for at in range(depth * ways, (depth + 1) * ways)]
            weights = [op.Concat(*(op.Unsqueeze(way[i], [0]) for way in own), axis=0) for i in range(each)]
            biases = [op.Concat(*weights[2:], axis=-1)] if has_biases else [None]
            begin = op.Slice(hx, [depth * ways], [(depth + 1) * ways], [0])
            settings = {"direction": "bidirectional" if bidirectional else "forward", "activations": [activation] * ways}
            steps, end = op.RNN(x, *weights[:2], *biases, None, begin, hidden_size=hx.shape[2], **settings)
            x = op.Reshape(op.Transpose(steps, perm=[0, 2, 1, 3]), [0, 0, -1])
            last.append(end)
        return op.Transpose(x, perm=[1, 0, 2]) if batch_first else x, op.Concat(*last, axis=0)

    return rnn
