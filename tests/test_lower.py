"""Lowering: the graph computes what the module computes, quietly, for any batch."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from hasten.core.errors import Unsupported
from hasten.core.network import Arrays, Network
from hasten.load import lower as lowering
from hasten.load.lower import OPSET, forward, lower, other_batch, quiet, relative_difference
from hasten.load.program import export_program
from networks import NETWORKS, QUICK, lowered, network

CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in NETWORKS]


def run(graph: bytes, inputs: Arrays) -> Arrays:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return tuple(session.run(None, {i.name: a for i, a in zip(session.get_inputs(), inputs, strict=True)}))


@pytest.mark.parametrize("name", CASES)
def test_the_graph_gives_what_the_module_gives(name: str) -> None:
    graph, (module, _) = lowered(name), NETWORKS[name]()
    data = graph.graph.SerializeToString()
    for inputs in (graph.example, tuple(a[:1] for a in graph.example), other_batch(graph.example)):
        with torch.no_grad():
            expected = module(*(torch.from_numpy(a) for a in inputs))
        expected = expected if isinstance(expected, tuple) else (expected,)
        for a, b in zip(expected, run(data, inputs), strict=True):
            assert a.shape == b.shape
            assert np.abs(a.numpy() - b).max() <= 1e-4 * float(a.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_plain(name: str) -> None:
    graph = lowered(name).graph
    inputs, outputs = [i.name for i in graph.graph.input], [o.name for o in graph.graph.output]
    assert inputs == (["x"] if len(inputs) == 1 else [f"x{i}" for i in range(len(inputs))])
    assert outputs == (["y"] if len(outputs) == 1 else [f"y{i}" for i in range(len(outputs))])
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", OPSET)]
    assert not graph.graph.value_info
    assert not any(t.external_data for t in graph.graph.initializer)
    assert {i.type.tensor_type.shape.dim[0].dim_param for i in graph.graph.input} == {"batch"}


def test_a_graph_is_returned_as_it_is() -> None:
    graph = lowered("cnn")
    assert lower(graph) is graph


def test_leaves_the_module_alone_and_says_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    given = network("two outputs")
    before = {n: t.clone() for n, t in given.module.state_dict().items()}
    lower(given)
    assert all(torch.equal(given.module.state_dict()[n], t) for n, t in before.items())
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]


def test_quiet_gives_everything_back(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), quiet():
        print("hush")
        raise KeyError
    print("heard")
    assert capfd.readouterr().out == "heard\n"


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


def test_a_fixed_batch_stays_in_the_graph() -> None:
    example = (np.ones((2, 3, 2), np.float32),)
    graph = lower(Network(kind="module", body=Fixed(), example=example, fixed_batch=2)).graph
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


class Counted(nn.Module):
    """Makes a number of its batch, as `len` does: torch.export binds it to the example's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear = nn.Parameter(torch.ones(1, 1, 4)), nn.Linear(4, 3)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        rows = self.encoder(torch.cat([self.first.expand(len(x), -1, -1), x], 1))
        return {"y": self.linear(rows), "first": rows[:, 0].reshape(int(x.shape[0]), 2, 2)}


def test_a_batch_that_the_code_counts_stays_open() -> None:
    given = Network(kind="module", body=Counted().eval(), example=(np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32),))
    graph, program = lower(given).graph, export_program(given).module()
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for x in (np.ones((1, 5, 4), np.float32), np.ones((7, 5, 4), np.float32)):
        assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(run(graph.SerializeToString(), (x,)), forward(given, (x,)), strict=True))
        assert torch.allclose(program(torch.from_numpy(x))["y"], given.module(torch.from_numpy(x))["y"], atol=1e-5)


class Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.rows = nn.EmbeddingBag(20, 6, mode=mode)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids)


class Prototypes(nn.Module):
    """Distances to `count` learnt points."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(count, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.points)


@pytest.mark.parametrize("module", [*map(Bags, ("mean", "sum", "max")), Prototypes(5), Prototypes(30)], ids=str)
def test_what_onnx_has_not_is_written_out(module: nn.Module) -> None:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 20, (4, 7)) if isinstance(module, Bags) else draw.normal(size=(4, 3, 6)).astype(np.float32)
    given = Network(kind="module", body=module, example=(x,))
    graph, program = lower(given).graph, export_program(given).module()
    assert not {"Loop", "If"} & {node.op_type for node in graph.graph.node}
    for inputs in ((x,), other_batch((x,))):
        assert np.allclose(run(graph.SerializeToString(), inputs)[0], forward(given, inputs)[0], atol=1e-5)
        assert np.allclose(program(torch.from_numpy(inputs[0])).detach().numpy(), forward(given, inputs)[0], atol=1e-5)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Eigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x)


@pytest.mark.parametrize("module", [Branching(), Eigenvalues()])
def test_refuses_what_onnx_has_not(module: nn.Module) -> None:
    example = (np.stack([np.eye(3, dtype=np.float32)] * 2),)
    with pytest.raises(Unsupported, match="cannot be exported to ONNX: ") as raised:
        lower(Network(kind="module", body=module, example=example))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_refuses_a_graph_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    given, graph = network("two outputs"), lowered("two outputs").graph
    real = lowering.run_graph
    monkeypatch.setattr(lowering, "_export", lambda network: graph)
    lower(given)
    monkeypatch.setattr(lowering, "run_graph", lambda graph, inputs: tuple(a * 1.001 for a in real(graph, inputs)))
    with pytest.raises(Unsupported, match=r"output 0 .* must equal the module's to 0.0001, differs by 0.001 of its largest"):
        lower(given)
    monkeypatch.setattr(lowering, "run_graph", lambda graph, inputs: tuple(a[: len(given.example[0])] for a in real(graph, inputs)))
    with pytest.raises(Unsupported, match=r"must have the module's shape \(5, 5\), got \(4, 5\)"):
        lower(given)


class Nested(nn.Module):
    def forward(self, x: Tensor) -> dict[str, object]:
        return {"a": x + 1, "b": (x * 2, None)}


def test_forward_gives_nested_outputs_flat() -> None:
    a, b = forward(Network(kind="module", body=Nested(), example=()), (np.ones((2, 2), np.float32),))
    assert (a == 2).all()
    assert (b == 2).all()


def test_relative_difference_against_its_formula() -> None:
    a, b = np.array([1.0, -4.0], np.float32), np.array([1.5, -4.0], np.float32)
    assert relative_difference(a, b) == 0.5 / 4
    assert relative_difference(a, a) == relative_difference(a[:0], a[:0]) == 0
    assert not relative_difference(a, np.array([np.nan, 0], np.float32)) <= 1


def test_what_depends_on_weights_alone_is_computed() -> None:
    """ONNX wants the gates of an LSTM in another order; the exporter leaves that to the engine where they are large."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(40, 72, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0][:, -1]

    graph = lower(Network(kind="module", body=Wide().eval(), example=(np.zeros((2, 5, 40), np.float32),))).graph.graph
    held = {i.name: list(i.dims) for i in graph.initializer}
    (layer,) = (node for node in graph.node if node.op_type == "LSTM")
    assert [held[name] for name in layer.input[1:3]] == [[1, 4 * 72, 40], [1, 4 * 72, 72]]
    assert sum(int(np.prod(shape)) for shape in held.values()) < 1.1 * 4 * 72 * (40 + 72 + 2)


class Bounded(nn.Module):
    """As importers write "all rows": up to a large number, which bounds the batch from above."""

    def forward(self, x: Tensor) -> Tensor:
        return x[0:999_999_999] * 2


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 2 else x * 3


def test_a_program_whose_batch_has_bounds_takes_any_within() -> None:
    program = export_program(Network(kind="module", body=Bounded(), example=(np.ones((2, 3), np.float32),)))
    for rows in (1, 2, 5):
        assert torch.equal(program.module()(torch.ones(rows, 3)), torch.full((rows, 3), 2.0))


def test_a_program_that_takes_one_batch_alone_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"torch.export cannot follow this network: .*Constraints violated \(batch\)"):
        export_program(Network(kind="module", body=Halves(), example=(np.ones((2, 3), np.float32),)))


def test_the_exporter_reads_its_table_once_and_what_is_added_to_one_copy_is_in_no_other() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    from hasten.load import registry

    given = vars(ONNXRegistry)["from_torchlib"]
    registry._read.cache_clear()
    for width in (2, 3):
        lower(Network(kind="module", body=nn.Linear(width, width).eval(), example=(np.zeros((2, width), np.float32),)))
    assert registry._read.cache_info().misses == 1
    assert vars(ONNXRegistry)["from_torchlib"] is given
    with registry.read_once():
        one, other = (ONNXRegistry.from_torchlib(opset_version=18) for _ in range(2))
        target = next(iter(one.functions))
        one.functions[target].clear()
    assert other.functions[target]
