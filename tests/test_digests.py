"""What makes a network another one: a finished run is found again by these digests, so none of it may be left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hasten.load.source import Source, digest_module


class Cool(nn.Module):
    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) / self.temperature


class Warm(Cool):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.temperature


def of(module: nn.Module) -> str:
    with torch.no_grad():
        for value in module.parameters():
            value.fill_(0.5)
    return digest_module(module)


def test_a_module_is_its_weights_its_attributes_and_its_code() -> None:
    Warm.__qualname__ = Warm.__name__ = "Cool"
    assert of(Cool()) == of(Cool().train()) == of(Cool().eval())
    assert len({of(Cool()), of(Cool(2.0)), of(Warm()), of(Cool().double())}) == 4


@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx_data"])
def test_a_graph_is_its_weights_outside_as_well(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    found = [Source.of(tmp_path / "model.onnx").digest()]
    for weights in (b"0", b"1"):
        (tmp_path / name).write_bytes(weights)
        found.append(Source.of(tmp_path / "model.onnx").digest())
    assert len(set(found)) == 3
    assert sorted(Source.of(tmp_path / "model.onnx").files()) == [tmp_path / "model.onnx", tmp_path / name]
    (tmp_path / "other.onnx").write_bytes(b"")
    assert Source.of(tmp_path / "model.onnx").digest() == found[-1]


def test_a_script_is_what_it_imports_from_beside_it(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("import torch\nfrom layers import Block\n")
    (tmp_path / "layers.py").write_text("import parts.deep\n")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "deep.py").write_text("import net\nx = 1\n")
    (tmp_path / "else.py").write_text("y = 1\n")
    source = Source.of(f"{tmp_path}/net.py:Net")
    assert [p.name for p in source.files()] == ["net.py", "layers.py", "deep.py"]
    before = source.digest()
    (tmp_path / "else.py").write_text("y = 2\n")
    assert source.digest() == before
    (tmp_path / "parts" / "deep.py").write_text("import net\nx = 2\n")
    assert source.digest() != before
