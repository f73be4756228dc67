"""TorchScript files: traced and scripted networks as networks of layers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hasten.core.errors import DataRefused, ModelRefused
from hasten.load.files import open_network
from hasten.load.lower import forward, quiet
from networks import equal

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


class Branching(nn.Module):
    """Control flow on shapes and attributes, a loop, lists and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 3
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.conv(x))
        for _ in range(self.steps):
            x = torch.relu(x) * 0.9 if x.dim() == 4 else x
        flat = x.mean([2, 3]).view(x.size(0), -1)
        found = [head(flat) for head in self.heads]
        return {"a": found[0], "b": found[1]}


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


IMAGES, SERIES = torch.randn(4, 3, 8, 8), torch.randn(4, 5, 6)


def write(path: Path, module: nn.Module, example: Tensor, *, trace: bool) -> Path:
    with quiet():
        made: Any = torch.jit.trace(module.eval(), example, strict=False) if trace else torch.jit.script(module.eval())
        torch.jit.save(made, path)
    return path


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize(("module", "example"), [(Branching(), IMAGES), (Sequence(), SERIES)])
def test_opens_as_a_network_of_layers(module: nn.Module, example: Tensor, trace: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "m.pt", module, example, trace=trace)
    network = open_network(path, (example.numpy(),))
    with torch.no_grad():
        wanted = module(example)
    wanted = list(wanted.values()) if isinstance(wanted, dict) else [wanted]
    assert equal(forward(network, network.example), tuple(w.numpy() for w in wanted), 1e-5)
    assert network.fixed_batch is None
    kinds = {type(m) for m in network.module.modules()}
    assert kinds >= ({nn.Conv2d, nn.Linear} if "conv" in dict(module.named_children()) else {nn.LSTM, nn.Linear})
    assert {n for n, _ in network.module.named_parameters()} <= {n for n, _ in module.named_parameters()}


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x * self.seen


class Choosing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.sum() > 0) else -x


class Endless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x.dim() == 4:
            x = x + 1
        return x


class Saving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch.save(x, "stolen")
        return x


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Counting(), "without a state of its own, got one that writes on its 'seen'"),
        (Choosing(), r"m.pt cannot be followed .*torch.export.save"),
        (Endless(), "at most 100000 calls with loops unrolled"),
        (Saving(), r"got 'torch.save' in .*: not opened"),
    ],
)
def test_what_is_refused(module: nn.Module, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.pt", module, IMAGES, trace=False)
    with pytest.raises(ModelRefused, match=words):
        open_network(path, (IMAGES.numpy(),))


def test_sizes_come_from_data(tmp_path: Path) -> None:
    path = write(tmp_path / "m.pt", Sequence(), SERIES, trace=True)
    with pytest.raises(DataRefused, match=r"m\.pt does not say the sizes of its inputs; give data"):
        open_network(path)
    with pytest.raises(ModelRefused, match="the network takes 1 inputs, got 2"):
        open_network(path, (SERIES.numpy(), np.ones((4, 1), np.float32)))
