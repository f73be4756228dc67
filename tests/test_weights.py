"""A Python file and its weights: what fits, and every way in which it does not."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hasten.core.errors import DataRefused, ModelRefused, UsageError
from hasten.load import saved
from hasten.load.files import from_module, open_network
from hasten.load.lower import forward
from hasten.load.source import Source
from hasten.load.weights import fill, read_weights
from networks import equal

SCRIPT = """
from torch import nn
from parts import Block

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Block(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(x))

class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()

def build():
    return Net()

number = 3
"""
PARTS = """
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(self.layer(x)).relu()
"""
X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(SCRIPT)
    (tmp_path / "parts.py").write_text(PARTS)
    return tmp_path


def state(folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    net = open_network(f"{folder}/net.py:Net", (X,)).module
    return {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in net.state_dict().items()}


def opened(folder: Path, weights: str) -> Any:
    return open_network(Source.of(f"{folder}/net.py:build", folder / weights), (X,))


def shards(folder: Path, held: dict[str, torch.Tensor]) -> None:
    homes = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(held)}
    for file in set(homes.values()):
        save_file({n: t for n, t in held.items() if homes[n] == file}, folder / file)
    (folder / "all.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))


def test_weights_from_every_kind_of_file(folder: Path) -> None:
    held = state(folder)
    torch.save(held, folder / "plain.pt")
    torch.save(
        {"step": 3, "model_state": {f"module.{k}": v for k, v in held.items()}, "optimizer": {"m": torch.ones(3)}}, folder / "check.ckpt"
    )
    save_file(held, folder / "w.safetensors")
    shards(folder, held)
    results = {}
    for file in ("plain.pt", "check.ckpt", "w.safetensors", "all.safetensors.index.json"):
        network = opened(folder, file)
        assert all(torch.equal(v, held[k]) for k, v in network.module.state_dict().items())
        results[file] = network
    notes = results["check.ckpt"].notes
    assert notes == (
        "the weights are the part 'model_state' of check.ckpt",
        "their names in check.ckpt begin with 'module.', which was left out",
    )
    assert results["plain.pt"].notes == ()


def test_another_process_needs_neither_the_script_nor_its_folder(folder: Path) -> None:
    network = open_network(f"{folder}/net.py:Net", (X,))
    saved.save(network, folder / "saved")
    for file in ("net.py", "parts.py"):
        (folder / file).unlink()
    for name in ("net", "parts"):
        del sys.modules[name]
    again = saved.load(folder / "saved")
    assert equal(forward(again, (X,)), forward(network, (X,)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h.pop("head.weight"), r"1 of 9 are missing: head.weight"),
        (
            lambda h: h.update({"heat.weight": h.pop("head.weight")}),
            r"missing: head.weight \(the nearest are heat.weight in the file\); 1 are unknown to the network: heat.weight \(the nearest are head.weight",
        ),
        (lambda h: h.update({"head.weight": torch.ones(4, 6)}), r"shapes differ: head.weight must be \(3, 6\), got \(4, 6\)"),
    ],
)
def test_names_that_do_not_fit_are_told(folder: Path, change: Any, words: str) -> None:
    held = state(folder)
    change(held)
    save_file(held, folder / "w.safetensors")
    with pytest.raises(ModelRefused, match=words):
        opened(folder, "w.safetensors")


def test_counts_of_seen_batches_may_be_missing() -> None:
    norm = nn.BatchNorm1d(2)
    assert fill(norm, {k: v for k, v in norm.state_dict().items() if "num" not in k}, "w") == ()
    with pytest.raises(ModelRefused, match=r"expected tensors by name in w, got 'a' \(int\)"):
        fill(norm, {"a": 1}, "w")


class Payload:
    def __reduce__(self) -> Any:
        return (print, ("code has run",))


def test_pickled_objects_are_not_opened(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": Payload()}, folder / "evil.pt")
    (folder / "plain.pth").write_bytes(pickle.dumps(Payload()))
    for file in ("evil.pt", "plain.pth"):
        with pytest.raises(ModelRefused, match=r"not opened; save the weights alone"):
            opened(folder, file)
    assert "code has run" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "named by a plain relative path"),
        ({"weight_map": {"a": "x.safetensors"}}, r"expected the file .x.safetensors. beside the model"),
        ({"weight_map": [1]}, "must be JSON with"),
        ({}, "must be JSON with"),
    ],
)
def test_an_index_names_files_beside_it_only(tmp_path: Path, index: Any, words: str) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelRefused, match=words):
        read_weights(tmp_path / "m.safetensors.index.json")


def test_what_a_script_cannot_give(folder: Path) -> None:
    script = f"{folder}/net.py"
    with pytest.raises(UsageError, match=r"has no 'Nett'; the nearest are Net"):
        open_network(f"{script}:Nett", (X,))
    with pytest.raises(ModelRefused, match=r"net.py:Wide\(\) fails: .*missing 1 required .*give a function without arguments"):
        open_network(f"{script}:Wide", (X,))
    with pytest.raises(ModelRefused, match="must be a torch module, or a class or function that gives one, got int"):
        open_network(f"{script}:number", (X,))
    with pytest.raises(DataRefused, match="does not say the sizes of its inputs"):
        open_network(f"{script}:Net")
    (folder / "bad.py").write_text("1 / 0")
    with pytest.raises(ModelRefused, match=r"bad\.py cannot be run: ZeroDivisionError"):
        open_network(f"{folder}/bad.py", (X,))
    with pytest.raises(UsageError, match="weights are for a class in a Python file"):
        Source.of("m.onnx", "w.pt")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(5, 2)

    def forward(self, a: Any, b: Any, scale: Any = None) -> dict[str, Any]:
        total = self.left(a) + self.right(b["b"] if isinstance(b, dict) else b)
        return {"sum": total if scale is None else total * scale, "twice": (2 * total, -total)}


A, B, S = torch.randn(4, 3), torch.randn(4, 5), torch.rand(4, 1)


def test_examples_may_be_dicts_and_nested() -> None:
    module = Pair().eval()
    plain = from_module(module, (A, B))
    assert type(plain.module) is Pair
    given = forward(plain, plain.example)
    assert len(given) == 3
    for example in ({"b": B, "a": A}, (A, {"b": B}), [A, B], {"a": A, "b": {"b": B}}):
        network = from_module(module, example)
        assert equal(forward(network, network.example), given)
    scaled = from_module(module, {"scale": S, "a": A, "b": B})
    with torch.no_grad():
        assert equal(forward(scaled, scaled.example)[:1], (module(A, B, S)["sum"].numpy(),))


def test_names_of_the_data_become_keywords() -> None:
    module = Pair().eval()
    turned = from_module(module, (B, A), ("b", "a"))
    assert equal(forward(turned, turned.example), forward(from_module(module, (A, B)), (A.numpy(), B.numpy())))
    assert type(from_module(module, (A, B), ("a", "b")).module) is Pair
    assert type(from_module(module, (A, B), ("x0", "x1")).module) is Pair


def test_a_source_knows_equal_files(folder: Path) -> None:
    one, other = Source.of(f"{folder}/net.py:Net"), Source.of(f"{folder}/net.py:build")
    assert one.digest() == Source(**one.to_json()).digest() != other.digest()
    assert (one.stem, Source.of("a/b.onnx").stem, str(one)) == ("Net", "b", f"{folder}/net.py:Net")
