"""Lifting: every network, every way to export it, and what must be refused."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hasten.core.errors import ModelRefused
from hasten.load.lift import lift
from hasten.load.lower import quiet
from networks import NETWORKS

LAYERS = {
    "mlp": {"Linear": 3, "ReLU": 2, "Dropout": 1},
    "cnn": {"Conv2d": 2, "BatchNorm2d": 2, "ReLU": 2, "Linear": 1},
    "resnet": {"Conv2d": 6, "BatchNorm2d": 5, "ReLU": 2, "Linear": 1},
    "mobilenet": {"Conv2d": 11, "BatchNorm2d": 7, "Hardswish": 3, "ReLU6": 2, "ReLU": 2, "Hardsigmoid": 2, "Linear": 1},
    "densenet": {"Conv2d": 4, "BatchNorm2d": 4, "ReLU": 3, "Linear": 1},
    "unet": {"Conv2d": 3, "BatchNorm2d": 1, "ReLU": 1, "GroupNorm": 1, "SiLU": 1, "ConvTranspose2d": 1},
    "lstm": {"LSTM": 1, "Linear": 1},
    "gru": {"GRU": 1, "Linear": 1},
    "rnn": {"RNN": 1, "Linear": 1},
    "encoder": {"Linear": 5, "LayerNorm": 2, "Dropout": 3, "ReLU": 1},
    "transformer": {"Embedding": 1, "Linear": 5, "LayerNorm": 2, "GELU": 1, "Dropout": 1},
    "dilated": {"Conv1d": 4, "BatchNorm1d": 3, "ReLU": 3, "Linear": 1},
    "shared": {"Linear": 3, "Tanh": 1, "ReLU": 2},
    "two inputs": {"Conv2d": 1, "BatchNorm2d": 1, "PReLU": 1, "Linear": 2, "BatchNorm1d": 1, "LeakyReLU": 1},
    "two outputs": {"Conv2d": 1, "BatchNorm2d": 1, "ReLU": 1, "Linear": 2, "Sigmoid": 1},
}
# The weights of nn.MultiheadAttention are not those of a layer: they get one of their own.
RENAMED = {
    "block.self_attn.in_proj_weight": "block.self_attn.in_proj.weight",
    "block.self_attn.in_proj_bias": "block.self_attn.in_proj.bias",
}


def export(module: nn.Module, example: tuple[Tensor, ...], *, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in example) if dynamic else None
    with quiet(), torch.no_grad():  # torch warns of an LSTM's own list of weights
        return torch.export.export(module, example, dynamic_shapes=shapes)


def lifted(name: str, way: str = "any batch") -> fx.GraphModule:
    """One for all tests; do not write on it."""
    return _lifted(name, way)


@functools.cache
def _lifted(name: str, way: str) -> fx.GraphModule:
    module, example = NETWORKS[name]()
    if way == "one example":
        example = tuple(x[:1] for x in example)
    program = export(module, example, dynamic=way in ("any batch", "decomposed"))
    with quiet():
        return lift(program.run_decompositions() if way == "decomposed" else program)


def flat(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def difference(a: nn.Module, b: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        pairs = list(zip(flat(a(*inputs)), flat(b(*inputs)), strict=True))
    assert all(x.shape == y.shape for x, y in pairs)
    return max(float((x - y).abs().max()) for x, y in pairs)


def kinds(module: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in module.modules():
        if not isinstance(part, fx.GraphModule) and type(part) is not nn.Module:
            found[type(part).__name__] = found.get(type(part).__name__, 0) + 1
    return found


@pytest.mark.parametrize("way", ["any batch", "one example", pytest.param("four examples", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NETWORKS)
def test_gives_what_the_original_gives_on_any_batch(name: str, way: str) -> None:
    module, example = NETWORKS[name]()
    network = lifted(name, way)
    assert network.meta["fixed_batch"] is None
    for inputs in (example, tuple(x[:1] for x in example), tuple(torch.cat([x, x[:3]]) for x in example)):
        assert difference(network, module, inputs) < 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_restores_every_layer_under_its_name(name: str) -> None:
    module, _ = NETWORKS[name]()
    network = lifted(name)
    assert kinds(network) == LAYERS[name]
    expected = {RENAMED.get(n, n): p for n, p in module.named_parameters()}
    given = dict(network.named_parameters())
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[n], p) and given[n].requires_grad for n, p in expected.items())
    buffers = dict(network.named_buffers())
    assert all(torch.equal(buffers[n], b) for n, b in module.named_buffers())
    assert not network.training


@pytest.mark.long
@pytest.mark.parametrize("name", LAYERS)
def test_lifts_decomposed_programs(name: str) -> None:
    module, example = NETWORKS[name]()
    network = lifted(name, "decomposed")
    assert difference(network, module, tuple(torch.cat([x, x[:3]]) for x in example)) < 1e-5
    weighted = {"Linear", "Conv1d", "Conv2d", "ConvTranspose2d", "BatchNorm1d", "BatchNorm2d", "LayerNorm", "GroupNorm", "Embedding"}
    if name not in ("lstm", "gru", "rnn"):  # unrolled for good
        assert {k: v for k, v in kinds(network).items() if k in weighted} == {k: v for k, v in LAYERS[name].items() if k in weighted}


@pytest.mark.parametrize("name", NETWORKS)
def test_trains(name: str) -> None:
    torch.manual_seed(0)
    _, example = NETWORKS[name]()
    network = copy.deepcopy(lifted(name)).train()
    norms = [m for m in network.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    before = [(m.running_mean.clone(), int(m.num_batches_tracked)) for m in norms]
    for dropout in (m for m in network.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    targets = [torch.randn_like(y) for y in flat(network(*example))]
    losses = []
    for _ in range(12):
        loss = sum(F.mse_loss(y, t) for y, t in zip(flat(network(*example)), targets, strict=True))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in network.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    for norm, (mean, count) in zip(norms, before, strict=True):
        assert not torch.equal(norm.running_mean, mean)
        assert int(norm.num_batches_tracked) == count + 13


def test_training_uses_the_statistics_of_the_batch() -> None:
    torch.manual_seed(0)
    module, (x,) = NETWORKS["cnn"]()
    network = copy.deepcopy(lifted("cnn"))
    module.train(), network.train()
    assert difference(network, module, (x,)) < 1e-5
    assert difference(network.eval(), module.eval(), (x,)) < 1e-5, "the running statistics moved alike"


def test_dropout_drops_again() -> None:
    network = copy.deepcopy(lifted("mlp")).train()
    x = torch.randn(4, 1, 8, 8)
    assert not torch.equal(network(x), network(x))
    assert next(m.p for m in network.modules() if isinstance(m, nn.Dropout)) == 0.2


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_that_was_exported_while_training_is_lifted_in_eval_mode(decomposed: bool) -> None:
    torch.manual_seed(0)
    x, module = torch.randn(4, 3, 6, 6), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    with quiet():
        program = torch.export.export(module, (x,))
        network = lift(program.run_decompositions() if decomposed else program)
    assert difference(network, module.eval(), (x,)) < 1e-6
    assert kinds(network) == {"Conv2d": 1, "BatchNorm2d": 1, "Dropout": 1}
    network.train()(x)
    assert int(network.get_submodule("1").num_batches_tracked) == int(module[1].num_batches_tracked) + 1


def test_one_layer_called_twice_stays_one() -> None:
    network = lifted("shared")
    calls = [n.target for n in network.graph.nodes if n.op == "call_module"]
    assert calls.count("twice") == 2


def test_a_weight_of_two_kinds_of_layer_stays_one_parameter() -> None:
    for network in (lifted("transformer"), copy.deepcopy(lifted("transformer")), pickled(lifted("transformer"))):
        assert network.get_submodule("words").weight is network.get_submodule("head").weight


def pickled(network: fx.GraphModule) -> fx.GraphModule:
    file = io.BytesIO()
    torch.save(network, file, pickle_module=cloudpickle)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", ["resnet", "lstm", "transformer", "two inputs"])
@pytest.mark.parametrize("carry", [copy.deepcopy, pickled])
def test_can_be_copied_and_pickled(name: str, carry: Callable[[fx.GraphModule], fx.GraphModule]) -> None:
    _, example = NETWORKS[name]()
    network = lifted(name, "one example")
    carried = carry(network)
    assert difference(carried, network, example) == 0
    assert list(dict(carried.named_parameters())) == list(dict(network.named_parameters()))
    assert kinds(carried) == kinds(network)


@pytest.mark.parametrize("name", ["resnet", "gru", "encoder"])
def test_can_be_exported_and_lifted_again(name: str) -> None:
    _, example = NETWORKS[name]()
    network = lifted(name)
    again = lift(export(network, example, dynamic=True))
    assert difference(again, network, example) < 1e-5
    assert list(dict(again.named_parameters())) == list(dict(network.named_parameters()))


def test_leaves_the_program_alone() -> None:
    module, example = NETWORKS["cnn"]()
    program = export(module, example, dynamic=True)
    before, text = {n: t.clone() for n, t in program.state_dict.items()}, str(program.graph)
    network = lift(program)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert str(program.graph) == text
    assert all(torch.equal(program.state_dict[n], t) for n, t in before.items())


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.layer(x)
        return {"logits": y, "aux": [y.relu(), None]}


def test_nested_outputs_become_a_tuple_and_it_says_so() -> None:
    x = torch.randn(4, 3)
    network = lift(export(Nested(), (x,), dynamic=True))
    outputs = network(x)
    assert isinstance(outputs, tuple)
    assert torch.equal(outputs[1], outputs[0].relu())
    assert network.meta["notes"] == (
        "its nested outputs became a flat tuple",
        "1 of its 3 outputs are no tensors and were left out",
    )


class Regions(nn.Module):
    """A frozen body, and an assertion."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[1] == 3, "three")
        with torch.no_grad():
            x = self.body(x).relu()
        return self.head(x)


def test_regions_without_gradients_are_opened() -> None:
    x, module = torch.randn(4, 3), Regions()
    network = lift(torch.export.export(module, (x,)))
    assert difference(network, module, (x,)) < 1e-6
    assert kinds(network) == {"Linear": 2, "ReLU": 1}


class Overwriting(nn.Module):
    """In-place calls that others can see, and one that nobody sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        part = y[:, :2]
        part.relu_()
        return y + self.layer(y).tanh_()


def test_calls_that_overwrite_keep_their_meaning() -> None:
    torch.manual_seed(0)
    x, module = torch.randn(4, 4), Overwriting()
    network = lift(export(module, (x,), dynamic=True))
    assert difference(network, module, (x,)) < 1e-6
    assert kinds(network) == {"Linear": 1, "Tanh": 1}


class Names(nn.Module):
    """Weights whose names are awkward: a bare matrix, a layer that holds another, a name that torch.fx has."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.outer = nn.Linear(4, 4)
        self.outer.inner = nn.Linear(4, 4)
        self.graph = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.matrix)
        return self.graph(self.outer.inner(self.outer(x)) * self.matrix.sum())


def test_awkward_names_get_names_of_their_own() -> None:
    x, module = torch.randn(4, 3), Names()
    network = lift(export(module, (x,), dynamic=True))
    assert difference(network, module, (x,)) < 1e-5
    assert {n for n, m in network.named_modules() if isinstance(m, nn.Linear)} == {
        "matrix_linear",
        "outer_linear",
        "outer.inner",
        "graph_linear",
    }
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in module.parameters())


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.sum(0))
        return x + self.seen


@pytest.mark.parametrize("decomposed", [False, True])
def test_refuses_a_state(decomposed: bool) -> None:
    program = torch.export.export(Stateful(), (torch.randn(2, 3),))
    with quiet():
        program = program.run_decompositions() if decomposed else program
    with pytest.raises(ModelRefused, match="writes on its buffer seen"):
        lift(program)


class Mixing(nn.Module):
    """Examples see each other, so no other batch size gives the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_a_batch_that_cannot_be_freed_stays_fixed() -> None:
    x = torch.randn(4, 3)
    network = lift(torch.export.export(Mixing(), (x,)))
    assert network.meta["fixed_batch"] == 4
    assert difference(network, Mixing(), (x,)) == 0


class Reshaping(nn.Module):
    """A batch size written into a view where it could be read two ways."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(3 * x.shape[0], 5).view(3, x.shape[0], 5).transpose(0, 1)


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_batch_is_freed_where_it_lies_behind_another_axis(batch: int) -> None:
    network = lift(torch.export.export(Reshaping(), (torch.randn(batch, 3, 5),)))
    assert network.meta["fixed_batch"] is None
    assert difference(network, Reshaping(), (torch.randn(7, 3, 5),)) == 0


def test_the_check_of_a_freed_batch_catches_a_wrong_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.load import batch

    monkeypatch.setattr(batch._Rewriting, "_holder", lambda self, sizes, numel, inner: len(sizes) - 1)
    assert lift(torch.export.export(Reshaping(), (torch.randn(1, 3, 5),))).meta["fixed_batch"] == 1
