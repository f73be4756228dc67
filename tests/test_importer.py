"""The importer of ONNX: round trips, names and layers, open axes, steps on what was imported, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from hasten.compress import FoldBatchNorm, PruneStructure
from hasten.core.data import View
from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.core.recipe import Context
from hasten.load import files, importer, saved
from hasten.load import lower as lowering
from hasten.load.importer import import_graph, to_module
from hasten.load.importer.interpret import MOST_NODES
from hasten.load.importer.table import OPERATORS, Operator
from hasten.load.lower import forward, lower, other_batch, quiet
from hasten.train import FineTune
from networks import NETWORKS, QUICK, equal, lowered, network

LAYERS = {
    "mlp": {"Linear": 3, "ReLU": 2},
    "cnn": {"Conv2d": 2, "ReLU": 2, "Linear": 1},
    "resnet": {"Conv2d": 6, "ReLU": 4, "Linear": 1},
    "mobilenet": {"Conv2d": 11, "Hardswish": 3, "ReLU6": 2, "ReLU": 2, "Hardsigmoid": 2, "Linear": 1},
    "densenet": {"Conv2d": 4, "BatchNorm2d": 4, "ReLU": 3, "Linear": 1},
    "unet": {"Conv2d": 3, "ReLU": 1, "GroupNorm": 1, "SiLU": 1, "ConvTranspose2d": 1},
    "lstm": {"LSTM": 2, "Linear": 1},
    "gru": {"GRU": 1, "Linear": 1},
    "rnn": {"RNN": 2, "Linear": 1},
    "encoder": {"Linear": 5, "LayerNorm": 2, "ReLU": 1},
    "transformer": {"Embedding": 1, "Linear": 5, "LayerNorm": 2, "GELU": 1},
    "dilated": {"Conv1d": 4, "ReLU": 3, "Linear": 1},
    "shared": {"Linear": 3, "Tanh": 1, "ReLU": 2},
    "two inputs": {"Conv2d": 1, "PReLU": 1, "Linear": 2, "LeakyReLU": 1},
    "two outputs": {"Conv2d": 1, "ReLU": 1, "Linear": 2, "Sigmoid": 1},
}


def kinds(module: nn.Module) -> dict[str, int]:
    return dict(Counter(type(m).__name__ for m in module.modules() if not any(True for _ in m.children()) and type(m) is not nn.Module))


def long_but(names: tuple[str, ...]) -> list[Any]:
    return [n if n in names else pytest.param(n, marks=pytest.mark.long(share=1)) for n in NETWORKS]


@pytest.mark.parametrize("name", long_but(QUICK))
def test_round_trip(name: str) -> None:
    """torch → ONNX → torch → ONNX keeps the outputs, on another batch size too."""
    graph = lowered(name)
    module = to_module(graph)
    assert module.fixed_batch is None
    for example in (graph.example, other_batch(graph.example)):
        assert equal(forward(graph, example), forward(module, example))
    assert equal(forward(lower(module), graph.example), forward(graph, graph.example))
    if name in LAYERS:
        assert kinds(module.module) == LAYERS[name]


def model(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], constants: dict[str, Any] | None = None, opset: int = 18, **more: Any
) -> onnx.ModelProto:
    """A graph of these nodes that gives "y"."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in more.pop("domains", ()))]
    return helper.make_model(graph, opset_imports=imports, ir_version=9, **more)


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_sizes_that_a_graph_computes_stay_open() -> None:
    """Shape → Gather → Concat → Reshape, with batch and time left open."""
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Gather", ["s", "one"], ["t"], axis=0),
        helper.make_node("Mul", ["n", "t"], ["nt"]),
        helper.make_node("Unsqueeze", ["nt", "first"], ["row"]),
        helper.make_node("Concat", ["row", "four"], ["flat"], axis=0),
        helper.make_node("Reshape", ["x", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["z"]),
        helper.make_node("Unsqueeze", ["n", "first"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["back"], axis=0),
        helper.make_node("Reshape", ["z", "back"], ["y"]),
    ]
    w = noise(4, 3)
    constants = {"zero": np.int64(0), "one": np.int64(1), "first": np.int64([0]), "four": np.int64([4]), "rest": np.int64([-1, 3]), "w": w}
    module = import_graph(model(nodes, {"x": ["n", "t", 4]}, constants), (noise(2, 5, 4),))
    x = noise(3, 7, 4)
    assert np.allclose(module(torch.from_numpy(x))[0].detach().numpy(), x @ w, atol=1e-5)
    assert kinds(module) == {"Linear": 1}


def test_names_come_from_weights_and_from_nodes() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "features.0.weight", "features.0.bias"], ["a"], "any"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "onnx::MatMul_7"], ["y"], "/head/out/MatMul"),
    ]
    constants = {"features.0.weight": noise(2, 3, 1, 1), "features.0.bias": noise(2), "onnx::MatMul_7": noise(2, 4)}
    module = import_graph(model(nodes, {"x": ["n", 3, 1, 1]}, constants), (noise(2, 3, 1, 1),))
    assert isinstance(module.get_submodule("features.0"), nn.Conv2d)
    assert isinstance(module.get_submodule("head.out"), nn.Linear)


def test_a_tied_weight_stays_one() -> None:
    module = to_module(lowered("transformer")).module
    holders = [name for name, m in module.named_modules() for p in m.parameters(recurse=False) if p.shape == (20, 16)]
    assert len(holders) == 2
    assert len({id(p) for p in module.parameters() if p.shape == (20, 16)}) == 1


def test_layers_that_a_file_spells_out_are_put_together() -> None:
    make = helper.make_node
    nodes = [
        make("ReduceMean", ["x"], ["m"], axes=[-1]), make("Sub", ["x", "m"], ["d"]), make("Pow", ["d", "two"], ["d2"]),
        make("ReduceMean", ["d2"], ["v"], axes=[-1]), make("Add", ["v", "eps"], ["ve"]), make("Sqrt", ["ve"], ["sd"]),
        make("Div", ["d", "sd"], ["z"]), make("Mul", ["z", "w"], ["zw"]), make("Add", ["zw", "b"], ["n"]),
        make("Div", ["n", "root"], ["e"]), make("Erf", ["e"], ["f"]), make("Add", ["f", "one"], ["g"]),
        make("Mul", ["n", "g"], ["h"]), make("Mul", ["h", "half"], ["i"]),
        make("Sigmoid", ["i"], ["s"]), make("Mul", ["i", "s"], ["y"]),
    ]  # fmt: skip
    w, b = noise(6), noise(6) + 1
    scalars = {"two": 2.0, "eps": 1e-5, "root": 2.0**0.5, "one": 1.0, "half": 0.5}
    graph = model(nodes, {"x": ["n", 6]}, {"w": w, "b": b} | {k: np.float32(v) for k, v in scalars.items()}, opset=13)
    x = noise(3, 6)
    module = import_graph(graph, (x,))
    assert kinds(module) == {"LayerNorm": 1, "GELU": 1, "SiLU": 1}
    given = Network(kind="graph", body=graph, example=(x,))
    assert equal(forward(given, (x,)), (module(torch.from_numpy(x))[0].detach().numpy(),))


@pytest.mark.parametrize("name", ["cnn", "lstm", *(pytest.param(n, marks=pytest.mark.long(share=1)) for n in ("resnet", "bert"))])
def test_steps_work_on_what_was_imported(name: str) -> None:
    module, rows = to_module(lowered(name)), 8
    inputs = tuple(np.concatenate([a, a])[:rows] for a in module.example)
    classes = forward(module, module.example)[0].shape[1]
    view = View(inputs=inputs, labels=np.arange(len(inputs[0])) % classes)
    context = Context(train=view, calibrate=view, original=module)
    smaller = PruneStructure(ratio=0.5, multiple=1).apply(module, context)
    assert numbers(smaller) < numbers(module)
    tuned = FineTune(epochs=1).apply(smaller, context)
    before, after = forward(smaller, module.example)[0], forward(tuned, module.example)[0]
    assert before.shape == after.shape
    assert not np.allclose(before, after)


VIEW = View(inputs=(np.zeros((0, 1)),))


def numbers(given: Network) -> int:
    return sum(p.numel() for p in given.module.parameters())


def test_batch_norms_train_again() -> None:
    module, example = NETWORKS["cnn"]()
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            module, example, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), optimize=False, verbose=False
        )
    assert program is not None
    body = import_graph(program.model_proto, tuple(x.numpy() for x in example))
    norms = [m for m in body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2
    assert torch.equal(norms[0].running_var, module[1].running_var)
    given = Network(kind="module", body=body, example=tuple(x.numpy() for x in example))
    folded = FoldBatchNorm().apply(given, Context(train=VIEW, calibrate=VIEW))
    assert kinds(folded.module).get("BatchNorm2d", 0) == 0
    before = norms[0].running_mean.clone()
    body.train()(example[0])
    assert not torch.equal(before, norms[0].running_mean)


def branch(name: str, op: str) -> onnx.GraphProto:
    out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node(op, ["x"], [name])], name, [], [out])


def test_a_branch_is_chosen_and_a_loop_unrolled() -> None:
    one = helper.make_node("If", ["yes"], ["a"], then_branch=branch("t", "Neg"), else_branch=branch("e", "Abs"))
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "x"], ["s2"]), helper.make_node("Identity", ["c"], ["c2"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, None),
        ],
        [helper.make_tensor_value_info("c2", TensorProto.BOOL, []), helper.make_tensor_value_info("s2", TensorProto.FLOAT, None)],
    )
    nodes = [one, helper.make_node("Loop", ["three", "", "a"], ["y"], body=body)]
    x = noise(2, 3)
    module = import_graph(model(nodes, {"x": ["n", 3]}, {"yes": np.bool_(True), "three": np.int64(3)}), (x,))
    assert np.allclose(module(torch.from_numpy(x))[0].numpy(), 2 * x, atol=1e-6)


def test_a_loop_without_end_is_refused() -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Neg", ["s"], ["s2"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, None),
        ],
        [helper.make_tensor_value_info("c2", TensorProto.BOOL, []), helper.make_tensor_value_info("s2", TensorProto.FLOAT, None)],
    )
    loop = helper.make_node("Loop", ["many", "", "x"], ["y"], body=body)
    with pytest.raises(Unsupported, match=f"at most {MOST_NODES} calls"):
        import_graph(model([loop], {"x": ["n", 3]}, {"many": np.int64(2**40)}), (noise(2, 3),))


def test_a_loop_without_nodes_is_counted_too() -> None:
    """Its body only hands on what it is given: no node is followed, however often it runs."""
    given = [("i", TensorProto.INT64, []), ("c", TensorProto.BOOL, []), ("s", TensorProto.FLOAT, None)]
    values = [helper.make_tensor_value_info(*one) for one in given]
    loop = helper.make_node("Loop", ["many", "", "x"], ["y"], body=helper.make_graph([], "body", values, values[1:]))
    with pytest.raises(Unsupported, match=f"at most {MOST_NODES} calls"):
        import_graph(model([loop], {"x": ["n", 3]}, {"many": np.int64(2**40)}), (noise(2, 3),))


@pytest.mark.parametrize(
    ("nodes", "match"),
    [
        ([helper.make_node("Pow", ["size", "many"], ["s"])], "Pow .*sizes of 64 bits"),
        ([helper.make_node("Mul", ["size", "large"], ["m"]), helper.make_node("Mul", ["m", "large"], ["s"])], "Mul .*sizes of 64 bits"),
        ([helper.make_node("Div", ["size", "none"], ["s"])], r"Div .*ZeroDivisionError"),
    ],
    ids=["power", "product", "division"],
)
def test_sizes_cannot_grow_without_end(nodes: list[onnx.NodeProto], match: str) -> None:
    """Sizes are Python's integers, which know no end: 4^(2^40) would take all memory there is."""
    ends = [helper.make_node("Shape", ["x"], ["size"]), *nodes, helper.make_node("Reshape", ["x", "s"], ["y"])]
    numbers = {"many": np.int64(2**40), "large": np.int64(2**62), "none": np.int64(0)}
    with pytest.raises(Unsupported, match=match):
        import_graph(model(ends, {"x": [4, 3]}, numbers), (noise(4, 3),))


def test_a_function_is_followed_and_one_that_calls_itself_refused() -> None:
    def function(op: str, domain: str) -> onnx.FunctionProto:
        node = helper.make_node(op, ["a"], ["b"], domain=domain)
        return helper.make_function("own", "twice", ["a"], ["b"], [node], [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)])

    call = helper.make_node("twice", ["x"], ["y"], domain="own")
    x = noise(2, 3)
    module = import_graph(model([call], {"x": ["n", 3]}, functions=[function("Relu", "")], domains=["own"]), (x,))
    assert kinds(module) == {"ReLU": 1}
    with pytest.raises(Unsupported, match="do they call themselves"):
        import_graph(model([call], {"x": ["n", 3]}, functions=[function("twice", "own")], domains=["own"]), (x,))


@pytest.mark.parametrize(
    ("node", "constants", "match"),
    [
        (helper.make_node("Strange", ["x"], ["y"], "place", domain="far"), {}, "far.Strange 'place': this operator is not known here"),
        (helper.make_node("Reshape", ["x", "i"], ["y"]), {}, r"Reshape \(node 1\): its input shape must be known before"),
        (helper.make_node("ConstantOfShape", ["n"], ["y"]), {"n": np.int64([2**40])}, "at most 67108864 elements"),
        (helper.make_node("Dropout", ["x", "half", "on"], ["y"]), {"half": np.float32(0.5), "on": np.bool_(True)}, "keeps on"),
    ],
    ids=["unknown operator", "computed shape", "shape bomb", "dropout in use"],
)
def test_refusals_name_the_node(node: onnx.NodeProto, constants: dict[str, Any], match: str) -> None:
    first = helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64)
    graph = model([first, node], {"x": ["n", 3]}, constants, domains=["far"])
    with pytest.raises(Unsupported, match=match):
        import_graph(graph, (noise(2, 3),))


def write(path: Path, graph: onnx.ModelProto) -> Path:
    onnx.save(graph, path)
    return path


def test_a_file_becomes_a_module_that_lowers_to_the_file(tmp_path: Path) -> None:
    graph = lowered("cnn").graph
    opened = files.open_network(write(tmp_path / "net.onnx", graph))
    assert opened.kind == "module"
    assert lower(opened).graph is opened.source
    changed = opened.with_body(opened.module)
    assert changed.source is None
    saved.save(opened, tmp_path / "kept")
    again = saved.load(tmp_path / "kept")
    assert again.source == opened.source
    assert equal(forward(again, opened.example), forward(opened, opened.example))


def test_an_import_that_computes_something_else_stays_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS, "Relu", Operator(lambda x: torch.tanh(x), (("x", "Tensor"),), False, frozenset()))
    opened = files.open_network(write(tmp_path / "net.onnx", lowered("cnn").graph))
    assert opened.kind == "graph"
    assert "must equal ONNX Runtime's" in opened.notes[0]
    assert any("must equal" in note for note in files.summarize(opened)["notes"])


class Elsewhere(nn.Module):
    """Gives what it is to give on the example's shape, and fails or errs on another one."""

    def __init__(self, of: nn.Module, example: Any, how: str) -> None:
        super().__init__()
        self.of, self.shape, self.how = of, example[0].shape, how

    def forward(self, *inputs: torch.Tensor) -> Any:
        if inputs[0].shape == self.shape:
            return self.of(*inputs)
        if self.how == "raise":
            raise RuntimeError("only one size")
        return tuple(2 * y for y in self.of(*inputs))


@pytest.mark.parametrize(("how", "match"), [("raise", "RuntimeError: only one size"), ("err", "must equal ONNX Runtime's")])
@pytest.mark.parametrize("other", ["batch", "length"])
def test_an_import_that_fails_on_another_size_stays_a_graph(monkeypatch: pytest.MonkeyPatch, how: str, match: str, other: str) -> None:
    graph = model([helper.make_node("Softplus", ["x"], ["y"])], {"x": [2, "length"] if other == "length" else ["n", 3]})
    x = (noise(2, 3),)
    given = Network(
        kind="graph", body=graph, example=x, fixed_batch=2 if other == "length" else None, open_axes=((1,),) * (other == "length")
    )

    def made(network: Network) -> Network:
        right = to_module(network)
        return right.with_body(Elsewhere(right.module, x, how))

    assert files.imported(given).kind == "module"
    monkeypatch.setattr(importer, "to_module", made)
    found = files.imported(given)
    assert found.kind == "graph"
    assert match in found.notes[0]


def rounded_by_onnxruntime(tmp_path: Path) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter([{"x": network("cnn").example[0]}])

        def get_next(self) -> Any:
            return next(self.rows, None)

    onnx.save(lowered("cnn").graph, tmp_path / "floats.onnx")
    with quiet():
        quantize_static(tmp_path / "floats.onnx", tmp_path / "integers.onnx", Reader(), quant_format=QuantFormat.QDQ)
    return onnx.load(tmp_path / "integers.onnx")


def test_integers_are_held_against_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's integer kernels round now and then the other way, and saturate on older processors."""
    graph = rounded_by_onnxruntime(tmp_path)
    plain, asked = lowering.run_graph, []

    def optimized(graph: onnx.ModelProto, inputs: Any, *, as_written: bool = False) -> Any:
        asked.append(as_written)
        return tuple(a if as_written else a + 0.01 * np.abs(a).max() for a in plain(graph, inputs, as_written=True))

    for module in (lowering, files):
        monkeypatch.setattr(module, "run_graph", optimized)
    opened = files.imported(Network(kind="graph", body=graph, example=network("cnn").example))
    assert opened.kind == "module"
    assert any("ONNX Runtime's own kernels differ by 0.0" in note for note in opened.notes)
    assert asked.count(True) == 2
    assert equal(forward(opened, opened.example), plain(graph, opened.example, as_written=True))


def test_networks_of_the_law_table_are_all_expected() -> None:
    assert set(LAYERS) | {"bert", "albert", "vit"} == set(NETWORKS)
    assert network("mlp").source is None
