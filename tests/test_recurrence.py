"""Recurrent layers are traced by their shapes: exact all the same, and as fast for a long sequence as for a short one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hasten.compress.layers import lifted
from hasten.core.network import Network
from hasten.load.lower import forward, lower
from hasten.load.recurrence import recurrent_by_shape

KINDS: dict[str, Callable[..., nn.Module]] = {
    "lstm": nn.LSTM,
    "projected lstm": lambda *a, **k: nn.LSTM(*a, proj_size=4, **k),
    "gru": nn.GRU,
    "rnn, tanh": nn.RNN,
    "rnn, relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}


class Reader(nn.Module):
    """A recurrent layer and a linear one on its last step and its last states."""

    def __init__(self, cell: nn.Module, width: int) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, states = self.cell(x)
        state = states[0] if isinstance(states, tuple) else states
        return self.head(outputs[:, -1]) + state.sum((0, 2)).unsqueeze(-1)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_traced_computes_the_same(kind: str, ways: int) -> None:
    torch.manual_seed(0)
    cell = KINDS[kind](6, 8, num_layers=2, batch_first=True, bidirectional=ways == 2)
    module = Reader(cell, (4 if "projected" in kind else 8) * ways).eval()
    network = Network(kind="module", body=module, example=(torch.randn(3, 7, 6).numpy(),))
    want = forward(network, network.example)[0]
    np.testing.assert_allclose(forward(network.with_body(lifted(network)), network.example)[0], want, atol=1e-6)
    if "projected" not in kind:
        graph = lower(network)
        np.testing.assert_allclose(forward(graph, network.example)[0], want, atol=1e-5)
        assert [n.op_type for n in graph.graph.graph.node].count(kind.partition(",")[0].upper()) == 2


def test_no_step_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And torch has its own ways back afterwards, also behind an error."""
    from torch._decomp import decompositions

    steps: list[int] = []
    real = decompositions.lstm_cell
    monkeypatch.setattr(decompositions, "lstm_cell", lambda *a, **k: steps.append(1) or real(*a, **k))
    before = dict(torch.ops.aten.lstm.input.py_kernels)
    network = Network(kind="module", body=Reader(nn.LSTM(6, 8, batch_first=True), 8).eval(), example=(np.zeros((3, 90, 6), np.float32),))
    lifted(network)
    lower(network)
    assert not steps
    with pytest.raises(ZeroDivisionError), recurrent_by_shape():
        raise ZeroDivisionError
    assert torch.ops.aten.lstm.input.py_kernels == before
