"""Networks that were once treated wrongly, each with the law that it broke."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hasten.compress import FoldBatchNorm, FoldIdle, PruneStructure, QuantizeStatic
from hasten.compress.layers import lifted
from hasten.core.data import View
from hasten.core.errors import Unsupported
from hasten.core.network import Arrays, Network
from hasten.core.recipe import Context
from hasten.core.runner import Runner
from hasten.engines import OpenVINO
from hasten.load import saved
from hasten.load.files import from_module
from hasten.load.lower import forward, lower, relative_difference, run_graph
from hasten.train import FineTune


class By(nn.Module):
    """Layers and what is done with them."""

    def __init__(self, does: Callable[..., object], *layers: nn.Module) -> None:
        super().__init__()
        self.does, self.layers = does, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> object:
        return self.does(x, *self.layers)


def made(network: nn.Module, *example: np.ndarray) -> Network:
    return from_module(network.eval(), example)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def context(of: Network, engine: OpenVINO | None = None) -> Context:
    rows = np.arange(40) % len(of.example[0])
    noise = np.random.default_rng(1)
    view = View(inputs=tuple(a[rows] + 0.1 * noise.standard_normal(a[rows].shape).astype(np.float32) for a in of.example))
    profile = {} if engine is None else {"profile": engine.profile}
    return Context(train=view, calibrate=view.take(slice(0, 20)), original=of, loss="original", **profile)


def in_openvino(network: Network, folder: Path) -> Arrays:
    folder.mkdir()
    OpenVINO().pack(network, folder)
    with Runner(folder) as runner:
        return runner.outputs(network.example)


def test_a_recurrent_network_of_calls_can_be_saved_and_read(tmp_path: Path) -> None:
    of = made(seeded(lambda: By(lambda x, r, h: h(r(x)[0][:, -1]), nn.RNN(6, 8, batch_first=True), nn.Linear(8, 3))), draw(4, 5, 6))
    module = of.with_body(lifted(of))
    saved.save(module, tmp_path / "network")
    again = saved.load(tmp_path / "network")
    assert relative_difference(forward(of, of.example)[0], forward(again, of.example)[0]) < 1e-6


EXTREMES = {
    "over time": lambda: nn.Sequential(By(lambda x, c: torch.relu(c(x)).max(2)[0], nn.Conv1d(8, 8, 3)), nn.Linear(8, 3)),
    "between layers": lambda: nn.Sequential(By(lambda x, a: torch.tanh(a(x).amax(1)), nn.Linear(12, 8)), nn.Linear(8, 3)),
    "in a gate": lambda: Attending(),
    "behind a view": lambda: nn.Sequential(
        By(lambda x, c: c(x).view(x.shape[0], 4, 2, 10).amax(2), nn.Conv1d(8, 8, 3)), nn.Conv1d(4, 4, 3)
    ),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_integers_around_a_maximum_are_right_in_openvino(name: str, tmp_path: Path) -> None:
    of = made(seeded(EXTREMES[name]), draw(4, 8, 12))
    graph = QuantizeStatic().apply(lower(of), context(of, OpenVINO()))
    assert relative_difference(forward(of, of.example)[0], in_openvino(graph, tmp_path / "packed")[0]) < 0.05


@pytest.mark.parametrize("of_calls", [False, True])
def test_pictures_with_their_channels_last_are_exported_as_others_are(of_calls: bool, tmp_path: Path) -> None:
    body = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    of = made(seeded(lambda: By(lambda x, b: b(x.permute(0, 3, 1, 2)), body)), draw(4, 8, 8, 4))
    of = of.with_body(lifted(of)) if of_calls else of
    graph = lower(of)
    assert not {"Range", "GatherND", "Shape"} & {n.op_type for n in graph.graph.graph.node}
    made_ = QuantizeStatic().apply(graph, context(of, OpenVINO()))
    assert relative_difference(forward(of, of.example)[0], in_openvino(made_, tmp_path / "packed")[0]) < 0.05


class Optional(nn.Module):
    """Goes another way where nothing is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        z = self.norm(y)
        return z + (y if skip is None else skip)


def test_a_fold_follows_the_way_that_the_network_goes() -> None:
    of = made(seeded(Optional), draw(4, 4, 9))
    with pytest.raises(Unsupported, match="FoldBatchNorm needs a batch norm directly behind"):
        FoldBatchNorm().apply(of, context(of))


def test_a_slice_that_is_whole_on_the_example_alone_stays() -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places, self.head = nn.Parameter(torch.randn(1, 9, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(nn.functional.dropout(x, training=self.training) + self.places[:, : x.shape[1]])

    of = made(seeded(Placed), draw(4, 9, 4))
    of = Network(kind="module", body=of.module, example=of.example, open_axes=((1,),))
    short = (of.example[0][:, :7],)
    folded = FoldIdle().apply(of, context(of))
    assert relative_difference(forward(of, short)[0], forward(folded, short)[0]) < 1e-6


def test_outputs_by_name_are_trained() -> None:
    of = made(seeded(lambda: By(lambda x, a, b: {"out": a(x), "aux": b(x)}, nn.Linear(6, 3), nn.Linear(6, 3))), draw(20, 6))
    trained = FineTune(epochs=1, batch=8).apply(of, context(of))
    assert list(trained.module(torch.zeros(1, 6))) == ["out", "aux"]


class Attending(nn.Module):
    """Weighs channels by their largest values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weigh, self.last = nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 1), nn.Conv1d(8, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(x * torch.sigmoid(self.weigh(x.amax(2, keepdim=True))))


def _positions() -> nn.Module:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.places, self.head = nn.Linear(5, 8), nn.Parameter(torch.randn(1, 6, 8)), nn.Linear(48, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.embed(x) + self.places).flatten(1))

    return Flat()


def _words() -> nn.Module:
    convs = (nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 4))
    return nn.Sequential(
        By(lambda x, a, b: torch.cat([torch.relu(a(x)).max(2)[0], torch.relu(b(x)).max(2)[0]], 1), *convs), nn.Linear(16, 3)
    )


@pytest.mark.parametrize(("build", "shape", "most"), [(_positions, (4, 6, 5), 130), (_words, (4, 8, 12), 300)])
def test_what_shrinks_behind_maxima_and_merged_axes(build: Callable[[], nn.Module], shape: tuple[int, ...], most: int) -> None:
    of = made(seeded(build), draw(*shape))
    small = PruneStructure(multiple=2).apply(of, context(of))
    assert sum(p.numel() for p in small.module.parameters()) <= most
    assert relative_difference(forward(small, of.example)[0], run_graph(lower(small).graph, of.example)[0]) < 1e-5


def test_weights_that_are_computed_from_others_are_what_they_come_to() -> None:
    norm = nn.utils.parametrizations.weight_norm
    layers = (norm(nn.Linear(6, 16)), nn.ReLU(), norm(nn.Linear(16, 3)))
    # As a step meets it: the door makes plain weights of them.
    of = Network(kind="module", body=seeded(lambda: nn.Sequential(*layers)).eval(), example=(draw(20, 6),))
    assert relative_difference(forward(of, of.example)[0], forward(of.with_body(lifted(of)), of.example)[0]) < 1e-6
    small = PruneStructure(multiple=2).apply(of, context(of))
    assert small.module(torch.zeros(1, 6)).shape == (1, 3)
    assert sum(p.numel() for p in small.module.parameters()) < 100
    assert nn.utils.parametrize.is_parametrized(of.module[0]), "the given network stays as it is"
