"""Packed sequences: what is exported gives, for any lengths, what the packed network gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hasten.compress import PruneStructure
from hasten.core.data import View
from hasten.core.errors import Unsupported
from hasten.core.recipe import Context
from hasten.load.files import from_module
from hasten.load.lower import forward, lower, run_graph
from hasten.load.program import export_program


class Reader(nn.Module):
    """Ids that are padded with 0; the answer hangs on the last states, the mean of all steps, or the last cells."""

    def __init__(self, kind: Callable[..., nn.Module], says: str, *, ways: int = 1, layers: int = 1, begins: bool = False) -> None:
        super().__init__()
        self.says, self.begins, self.states = says, begins, layers * ways
        self.words = nn.Embedding(20, 12)
        self.cells = kind(12, 8, num_layers=layers, bidirectional=ways > 1, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.wide = nn.Linear(8 * ways, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(ids), lengths.cpu(), batch_first=True, enforce_sorted=False)
        begin = torch.ones(self.states, ids.shape[0], 8) if self.begins else None
        steps, last = self.cells(packed, begin)
        if self.says == "mean":
            padded, found = pad_packed_sequence(steps, batch_first=True, total_length=ids.shape[1])
            return self.wide(padded.sum(1) / found.unsqueeze(1))  # type: ignore[no-any-return]
        if self.says == "cells":
            return self.head(last[1][-1])  # type: ignore[no-any-return]
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])  # type: ignore[no-any-return]


def data(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 10, rows)
    return draw.integers(1, 20, (rows, 9)) * (np.arange(9) < lengths[:, None]), lengths


READERS = {
    "LSTM": lambda: Reader(nn.LSTM, "last"),
    "LSTM, two ways, two layers": lambda: Reader(nn.LSTM, "last", ways=2, layers=2),
    "LSTM, all steps": lambda: Reader(nn.LSTM, "mean", ways=2, layers=2),
    "GRU": lambda: Reader(nn.GRU, "last", layers=2),
    "GRU, all steps": lambda: Reader(nn.GRU, "mean", ways=2),
    "RNN, two ways, two layers": lambda: Reader(nn.RNN, "last", ways=2, layers=2),
    "RNN with ReLU": lambda: Reader(lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k), "mean"),
    "GRU with first states": lambda: Reader(nn.GRU, "last", ways=2, begins=True),
}


@pytest.mark.parametrize("name", READERS)
def test_the_exported_network_gives_what_the_packed_one_gives(name: str) -> None:
    opened = from_module(READERS[name](), data(4))
    graph, program = lower(opened).graph, export_program(opened).module()
    for inputs in (data(1, 1), data(7, 2), data(4, 3)):
        wanted = forward(opened, inputs)[0]
        assert np.allclose(run_graph(graph, inputs)[0], wanted, atol=1e-5)
        assert np.allclose(program(*map(torch.from_numpy, inputs)).detach().numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in READERS if "first states" not in name])
def test_packed_networks_shrink(name: str) -> None:
    opened = from_module(READERS[name](), data(4))
    view = View(inputs=opened.example)
    context = Context(train=view, calibrate=view, original=opened, loss="original")
    smaller = PruneStructure(multiple=1).apply(opened, context)
    cells = [m for m in smaller.module.modules() if isinstance(m, nn.RNNBase)]
    assert cells
    assert {m.hidden_size for m in cells} == {4}
    assert np.allclose(run_graph(lower(smaller).graph, data(6))[0], forward(smaller, data(6))[0], atol=1e-5)


def test_last_cells_that_are_used_are_refused() -> None:
    given = from_module(Reader(nn.LSTM, "cells"), data(4))
    with pytest.raises(Unsupported, match="differs by"):
        lower(given)


def test_a_trace_leaves_torch_as_it_was() -> None:
    before = nn.LSTM.forward, nn.GRU.forward, torch._VF._pack_padded_sequence
    lower(from_module(Reader(nn.LSTM, "last"), data(4)))
    assert (nn.LSTM.forward, nn.GRU.forward, torch._VF._pack_padded_sequence) == before
