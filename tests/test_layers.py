"""Layers by name, and the lifted form."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from hasten.compress import layers
from hasten.core.errors import UsageError
from hasten.load.lower import forward
from networks import equal, network


def test_patterns_choose_layers_and_an_unknown_name_tells_the_nearest() -> None:
    module = network("resnet").module
    convs = layers.named(module, (nn.Conv2d,))
    assert set(layers.named(module, (nn.Conv2d,), only=("1.*",))) == {name for name in convs if name.startswith("1.")}
    assert not set(layers.named(module, (nn.Conv2d,), keep=("1.*",))) & set(layers.named(module, (nn.Conv2d,), only=("1.*",)))
    with pytest.raises(UsageError, match=r"no layer is named '1.convv1'; the nearest are 1.conv1"):
        layers.named(module, (nn.Conv2d,), only=("1.convv1",))
    with pytest.raises(TypeError, match="keep must be a tuple"):
        layers.patterns("keep", "1.conv1")


@pytest.mark.parametrize("name", ["resnet", "lstm"])
def test_the_lifted_form_gives_the_same_and_is_a_copy(name: str) -> None:
    of = network(name)
    made = layers.lifted(of)
    assert isinstance(made, fx.GraphModule)
    assert layers.is_lifted(made)
    assert equal(forward(of, of.example), forward(of.with_body(made), of.example))
    again = layers.lifted(of.with_body(made))
    with torch.no_grad():
        next(again.parameters()).add_(1)
    assert equal(forward(of, of.example), forward(of.with_body(made), of.example))


def test_a_network_is_exported_once_and_everyone_gets_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    of = network("mlp")
    first = layers.lifted(of)
    with torch.no_grad():
        next(first.parameters()).add_(1)
    with monkeypatch.context() as patched:
        patched.setattr(layers, "export_program", None)
        assert equal(forward(of, of.example), forward(of.with_body(layers.lifted(of)), of.example))
    with torch.no_grad():
        next(of.module.parameters()).add_(1)
    assert equal(forward(of, of.example), forward(of.with_body(layers.lifted(of)), of.example))


def test_a_symbolic_trace_is_not_lifted() -> None:
    traced = fx.symbolic_trace(_Relu())
    assert not layers.is_lifted(traced)


class _Relu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu().flatten(1)
