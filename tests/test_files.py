"""Opening files: what fits, and what does not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hasten.core.errors import DataRefused, ModelRefused, UsageError
from hasten.load import saved
from hasten.load.files import from_module, open_network, summarize
from hasten.load.lower import forward, lower, run_graph
from networks import NETWORKS, QUICK, equal, lowered, network, program_file, write


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.long) for n in NETWORKS])
def test_opens_a_program_and_a_graph(name: str, tmp_path: Path) -> None:
    given = network(name)
    expected = forward(given, given.example)
    for path in (write(tmp_path / "m.pt2", program_file(name, 1)), write(tmp_path / "m.onnx", lowered(name).graph.SerializeToString())):
        opened = open_network(path, given.example)
        assert opened.kind == "module"
        assert opened.fixed_batch is None
        assert equal(forward(opened, opened.example), expected)
        made_up = open_network(path)
        assert [(a.shape[1:], a.dtype) for a in made_up.example] == [(a.shape[1:], a.dtype) for a in given.example]
        assert {len(a) for a in made_up.example} == {2}


def test_an_example_made_up_is_normal_noise(tmp_path: Path) -> None:
    x = open_network(write(tmp_path / "m.pt2", program_file("cnn"))).example[0]
    assert abs(x.mean()) < 0.1
    assert 0.9 < x.std() < 1.1


def test_summary_of_both_forms(tmp_path: Path) -> None:
    module = summarize(open_network(write(tmp_path / "m.pt2", program_file("two outputs"))))
    assert json.loads(json.dumps(module)) == {
        "kind": "module",
        "inputs": [{"shape": ["batch", 3, 16, 16], "dtype": "float32"}],
        "outputs": [{"shape": ["batch", 5], "dtype": "float32"}, {"shape": ["batch", 4], "dtype": "float32"}],
        "layers": {"BatchNorm2d": 1, "Conv2d": 1, "Linear": 2, "ReLU": 1, "Sigmoid": 1},
        "parameters": 537,
        "fixed_batch": None,
        "notes": [],
    }
    graph = summarize(lowered("two outputs"))
    assert graph["outputs"] == module["outputs"]
    assert graph["layers"] == {"AveragePool": 1, "Conv": 1, "Gemm": 2, "Relu": 1, "Reshape": 1, "Sigmoid": 1}


def test_a_module_is_copied_to_eval_mode() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train()
    given = from_module(module, torch.randn(4, 3))
    assert not given.module.training
    assert module.training
    assert given.module[0].weight is not module[0].weight
    assert equal(from_module(module, [np.ones((4, 3), np.float32)]).example, (np.ones((4, 3)),))


# --- token ids ---


class Tokens(nn.Module):
    """Token ids (batch, length) → three numbers, in ways that take other lengths or do not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.words = nn.Embedding(20, 8)
        self.places = nn.Parameter(torch.randn(7, 8))
        self.head = nn.Linear(6 * 8 if how == "flat" else 8, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.words(ids)
        if self.how == "flat":
            x = x.flatten(1)
        elif self.how == "places":
            x = (x + self.places[: ids.shape[1]]).mean(1)
        elif self.how == "mask":
            x = (x * mask[:, :, None]).sum(1)  # type: ignore[index]
        elif self.how == "branch":
            x = x.mean(1) if ids.shape[1] > 4 else x.sum(1)
        elif self.how == "loop":
            x = torch.stack([x[:, at] * at for at in range(ids.shape[1])]).sum(0)
        else:
            x = x.mean(1)
        return self.head(x)  # type: ignore[no-any-return]


IDS = np.arange(24).reshape(4, 6) % 20


@pytest.mark.parametrize(("how", "mask"), [("mean", None), ("places", None), ("mask", np.float32), ("mask", np.int64), ("mask", np.bool_)])
def test_the_length_of_token_ids_stays_open(how: str, mask: type | None) -> None:
    example = (IDS,) if mask is None else (IDS, (IDS > 3).astype(mask))
    opened = from_module(Tokens(how), example)
    assert opened.open_axes == ((1,),) * len(example)
    assert not opened.notes


@pytest.mark.parametrize("how", ["branch", "loop"])
def test_a_length_that_the_export_fixes_is_told(how: str) -> None:
    """A branch on the length would go the data's way on every other one."""
    opened = from_module(Tokens(how), (IDS,))
    assert opened.open_axes == ()
    assert any("it is prepared for 6 tokens, as in the data, and runs on others in Python alone" in note for note in opened.notes)


def test_whole_numbers_of_one_width_are_no_sequence() -> None:
    opened = from_module(Tokens("flat"), (IDS,))
    assert (opened.open_axes, opened.notes) == ((), ())
    assert from_module(nn.Linear(6, 2), torch.randn(4, 6)).open_axes == ()


# --- what does not fit ---

REFUSED = [
    ("m.pt", r"m.pt is a file of weights .*net.py:Class --weights m.pt; .*torch.export.save"),
    ("m.safetensors", r"m.safetensors is a file of weights .*net.py:Class --weights m.safetensors"),
    ("m.safetensors.index.json", r"a file of weights without their network"),
    ("m.pb", r"give the folder of a SavedModel"),
    ("m.xyz", r"a file named \*.xyz"),
    ("m", "a file without an ending"),
]


@pytest.mark.parametrize(("name", "words"), REFUSED)
def test_other_kinds_are_refused_with_the_way_out(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelRefused, match=words) as raised:
        open_network(write(tmp_path / name, b"x"))
    assert "\n" not in str(raised.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such file: .*m\.pt2"):
        open_network(tmp_path / "m.pt2")


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_an_example_that_does_not_fit(ending: str, tmp_path: Path) -> None:
    data = {"pt2": program_file("cnn"), "onnx": lowered("cnn").graph.SerializeToString()}[ending]
    path = write(tmp_path / f"m.{ending}", data)
    good = np.ones((2, 3, 16, 16), np.float32)
    with pytest.raises(DataRefused, match=r"input x? ?.*must be float32 \(any, 3, 16, 16\), got float32 \(2, 16, 16, 3\)"):
        open_network(path, (good.transpose(0, 2, 3, 1),))
    with pytest.raises(DataRefused, match=r"must be float32 .* got float64"):
        open_network(path, (good.astype(np.float64),))
    with pytest.raises(DataRefused, match=r"takes 1 inputs .* got 2"):
        open_network(path, (good, good))


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class FixedSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, 3) + 1


def test_a_program_of_one_batch_size(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(Mixing(), (torch.randn(4, 3),)), path)
    assert open_network(path).fixed_batch == 4
    opened = open_network(path, (np.ones((9, 3), np.float32),))
    assert (opened.fixed_batch, opened.example[0].shape) == (4, (4, 3))
    repeated = open_network(path, (np.arange(9, dtype=np.float32).reshape(3, 3),)).example[0]
    assert np.array_equal(repeated[:, 0], [0, 3, 6, 0])


def test_a_graph_of_one_batch_size(tmp_path: Path) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(lowered("shared").graph)
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    opened = open_network(write(tmp_path / "m.onnx", graph.SerializeToString()), (np.ones((9, 12), np.float32),))
    assert (opened.fixed_batch, len(opened.example[0])) == (3, 3)


@pytest.mark.parametrize("body", [FixedSize(), Mixing()])
def test_a_module_that_takes_one_size_only_is_known_as_such(body: nn.Module) -> None:
    assert from_module(body, torch.randn(4, 3)).fixed_batch == 4
    assert from_module(nn.Linear(3, 2), torch.randn(4, 3)).fixed_batch is None


def test_an_output_whose_first_axis_is_not_that_of_the_examples_is_named() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 5, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y, (h, _) = self.lstm(x)
            return y[:, -1], h

    with pytest.raises(ModelRefused, match="output 1 has 4 rows for 4 examples and for 5"):
        from_module(Stacked(), torch.randn(4, 6, 3))


class Failing(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return {"nan": x * torch.nan, "none": {}, "sum": x.sum(), "turned": x.T}[self.how] if self.how != "raise" else self.missing


FAULTS = {
    "raise": r"does not run on inputs of shape \(4, 3\): AttributeError",
    "nan": "output 0 must be numbers, got NaN",
    "none": "at least one tensor, got none",
    "sum": r"one row for each of 4 examples, got shape \(\)",
    "turned": r"got shape \(3, 4\); they seem to lie on axis 1, put them first",
}


@pytest.mark.parametrize("how", FAULTS)
def test_a_network_that_does_not_work_is_refused(how: str) -> None:
    with pytest.raises(ModelRefused, match=FAULTS[how]):
        from_module(Failing(how), torch.randn(4, 3))


def test_examples_that_are_none() -> None:
    for example in ((), torch.zeros(0, 3), torch.tensor(1.0)):
        with pytest.raises(DataRefused, match="at least one row"):
            from_module(nn.Identity(), example)
    with pytest.raises(DataRefused, match="numpy can hold"):
        from_module(nn.Identity(), torch.zeros(2, 3, dtype=torch.bfloat16))


def test_computed_weights_become_plain_ones(tmp_path: Path) -> None:
    old, new = nn.utils, nn.utils.parametrizations
    layers = [norm(nn.Linear(6, 6)) for norm in (old.weight_norm, old.spectral_norm, new.weight_norm, new.spectral_norm)]
    module = nn.Sequential(*layers)
    module(torch.randn(4, 6)).sum().backward()  # the older two keep a weight with a history now
    found = from_module(module, torch.randn(4, 6))
    assert found.notes == ("4 weights that are computed from others (weight norm, …) are what they come to now",)
    saved.save(found, tmp_path / "network")
    again, x = saved.load(tmp_path / "network").module, torch.randn(5, 6)
    assert torch.allclose(again(x), module.eval()(x), atol=1e-6)
    assert sorted(again.state_dict()) == sorted(f"{i}.{name}" for i in range(4) for name in ("weight", "bias"))
    assert len(module.state_dict()) > 8


class Batched(nn.Module):
    """Takes all its inputs in one dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embedding = nn.Linear(4, 2), nn.Embedding(10, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.linear(batch["values"]) + self.embedding(batch["kind"])


@pytest.mark.parametrize("named", [False, True])
def test_a_forward_of_one_dict_gets_one(named: bool) -> None:
    module, values, kind = Batched().eval(), torch.randn(3, 4), torch.tensor([1, 2, 3])
    arrays = {"values": values.numpy(), "kind": kind.numpy()}
    opened = from_module(module, tuple(arrays.values()), list(arrays)) if named else from_module(module, arrays)
    assert torch.equal(opened.module(values, kind), module({"values": values, "kind": kind}))


def test_what_wraps_a_network_is_taken_off() -> None:
    plain, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(3, 4)
    wrapped = (torch.compile(plain), nn.DataParallel(plain), AveragedModel(plain), torch.jit.script(plain), copy.deepcopy(plain).bfloat16())
    for module in wrapped:
        opened = from_module(module, x)
        assert set(opened.module.state_dict()) == set(plain.state_dict())
        assert torch.allclose(opened.module(x), plain(x), atol=1e-6 if not opened.notes else 0.05)
        assert equal(run_graph(lower(opened).graph, (x.numpy(),)), forward(opened, (x.numpy(),)))
    assert opened.notes == ("its bfloat16 weights are taken as float32",)


def test_a_network_in_halves_is_held_to_their_precision() -> None:
    opened = from_module(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).half(), torch.randn(3, 64).half())
    assert lower(opened).graph.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
