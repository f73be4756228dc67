"""Packed sequences (`torch.nn.utils.rnn.pack_padded_sequence`) as padded ones with their lengths, while a network is traced.

How many steps a packed sequence has depends on the lengths, which no exporter can follow. Run over the padding as well, a recurrent
layer gives the same at every real step; what lies behind reaches none of them, and the last state is that of the last real step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hasten.core.errors import Unsupported

_RUN: dict[str, Callable[..., Any]] = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}


@contextlib.contextmanager
def packed_as_padded() -> Iterator[None]:
    """Within it a `PackedSequence` holds the padded sequence (length, n, width) and, as its batch sizes, the lengths (n,)."""
    usual = [(kind, kind.forward) for kind in (nn.LSTM, nn.GRU, nn.RNN)]
    try:
        torch._VF._pack_padded_sequence, torch._VF._pad_packed_sequence = _packed, _padded  # type: ignore[assignment]
        for kind, forward in usual:
            setattr(kind, "forward", _forward(forward))  # noqa: B010  # mypy takes no new method
        yield
    finally:
        for kind, forward in usual:
            setattr(kind, "forward", forward)  # noqa: B010
        del torch._VF._pack_padded_sequence, torch._VF._pad_packed_sequence  # what torch has comes out from behind them


def _packed(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    return x.transpose(0, 1) if batch_first else x, lengths


def _padded(x: Tensor, lengths: Tensor, batch_first: bool, padding: float, length: int) -> tuple[Tensor, Tensor]:
    del length  # that of the longest; the padding stays
    x = torch.where((torch.arange(x.shape[0]).unsqueeze(1) < lengths).unsqueeze(-1), x, padding)
    return x.transpose(0, 1) if batch_first else x, lengths


def _forward(usual: Any) -> Any:
    def forward(layer: Any, x: Any, hx: Any = None) -> Any:
        return _run(layer, x, hx) if isinstance(x, PackedSequence) else usual(layer, x, hx)

    return forward


def _run(layer: Any, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
    """The layer over a padded sequence, each layer and each way by itself.

    The last cells of an LSTM, which its operator tells of the last step alone, are NaN: whatever uses them is found to differ.
    """
    if getattr(layer, "proj_size", 0):
        raise Unsupported("a packed sequence through an LSTM with projections cannot be exported")
    x, lengths, order, back = packed
    steps = torch.arange(x.shape[0]).unsqueeze(1)
    final = (steps == lengths - 1).unsqueeze(-1)
    turn = torch.where(steps < lengths, lengths - 1 - steps, steps), torch.arange(x.shape[1])
    is_lstm, ways, last = isinstance(layer, nn.LSTM), 1 + layer.bidirectional, []
    states = None if hx is None else layer.permute_hidden(hx, order)
    for depth in range(layer.num_layers):
        outputs = []
        for at in range(depth * ways, depth * ways + ways):
            begin = _begin(layer, x, states, at)
            out = _once(layer, at, x[turn] if at % ways else x, begin)
            last.append((out * final.to(x.dtype)).sum(0))
            outputs.append(out[turn] if at % ways else out)
        x = torch.cat(outputs, -1)
    hidden: Any = torch.stack(last)
    hidden = (hidden, torch.full_like(hidden, torch.nan)) if is_lstm else hidden
    return PackedSequence(x, lengths, order, back), layer.permute_hidden(hidden, back)


def _begin(layer: Any, x: Tensor, states: Any, at: int) -> Any:
    """The first states of one way of one layer."""
    is_lstm = isinstance(layer, nn.LSTM)
    if states is not None:
        return [s[at : at + 1] for s in states] if is_lstm else states[at : at + 1]
    zeros = [torch.zeros(1, x.shape[1], layer.hidden_size, dtype=x.dtype) for _ in range(1 + is_lstm)]
    return zeros if is_lstm else zeros[0]


def _once(layer: Any, at: int, x: Tensor, begin: Any) -> Tensor:
    outputs: Tensor = _RUN[layer.mode](x, begin, layer.all_weights[at], layer.bias, 1, 0.0, False, False, False)[0]
    return outputs
