"""The law table: every step × every law × every network, every engine × every law. A row is one method."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from hasten import testing
from hasten.compress import (
    DepthwiseSeparable,
    Equalize,
    FactorizeConv,
    FactorizeLinear,
    FoldBatchNorm,
    FoldBranches,
    FoldIdle,
    FoldInput,
    FoldLinear,
    InsertNorm,
    PackCodebooks,
    PruneBlocks,
    PruneStructure,
    PruneWeights,
    QuantizeAware,
    QuantizeDynamic,
    QuantizeMixed,
    QuantizeStatic,
    QuantizeWeights,
    ReplaceActivation,
    ShareWeights,
    Smooth,
    StoreHalf,
    Unfold,
)
from hasten.core.data import View
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Engine, Space, Stage, Step
from hasten.engines import AotInductor, Eager, ExecuTorch, LiteRT, OnnxRuntime, OpenVINO, Program, TorchCompile
from hasten.load.lower import lower
from hasten.train import Distil, FineTune
from networks import NETWORKS, lowered, network

# One row per method. Adding a method is one row here.
STEPS: tuple[Step, ...] = (
    FoldBatchNorm(),
    FoldLinear(),
    FoldBranches(),
    FoldIdle(),
    FoldInput(mean=(0.5,), std=(0.25,)),
    Unfold(),
    FactorizeLinear(multiple=2),
    FactorizeConv(multiple=2),
    FactorizeConv(method="cp", multiple=2),
    DepthwiseSeparable(),
    PruneStructure(multiple=2),
    PruneWeights(epochs=1, schedule="gradual"),
    PruneBlocks(),
    ReplaceActivation(to="hardswish", of=("relu", "gelu", "silu")),
    InsertNorm(),
    FineTune(epochs=1, batch=8),
    Distil(epochs=1, batch=8),
    Distil(match="features", epochs=1, batch=8),
    Distil(match="attention", epochs=1, batch=8),
    QuantizeAware(epochs=1, batch=8),
    ShareWeights(bits=3, epochs=1),
    Equalize(),
    Smooth(),
    PackCodebooks(),
    QuantizeStatic(),
    QuantizeStatic(observer="entropy", rounding="adaptive", bias_correction=True, symmetric=True),
    QuantizeMixed(floats=0.4),
    QuantizeDynamic(),
    QuantizeWeights(),
    QuantizeWeights(bits=4, integer_products=True, symmetric=False),
    StoreHalf(),
)
ENGINES: tuple[Engine, ...] = (
    Eager(),
    OnnxRuntime(),
    OnnxRuntime(threads=1),
    OnnxRuntime(packed=True),
    OpenVINO(),
    OpenVINO(shapes="static"),
    OpenVINO(packed=True),
    OpenVINO(packed=True, shapes="static"),
    Program(),
    Program(weights="safetensors"),
)
SLOW_ENGINES: tuple[Engine, ...] = (TorchCompile(), AotInductor(), LiteRT(), ExecuTorch())  # seconds of compiling at each start, or to pack

NAMES = [pytest.param(name, marks=() if name in ("cnn", "lstm") else pytest.mark.long(share=30)) for name in NETWORKS]


@functools.cache
def given(name: str, kind: Kind) -> Network:
    return lowered(name) if kind == "graph" else network(name)


def context(of: Network, original: Network) -> Context:
    """What a step may see: forty examples that look like the network's own, and no labels."""
    rows = np.arange(40) % len(of.example[0])
    noise = np.random.default_rng(0)
    inputs = tuple(
        (a[rows] + 0.1 * noise.standard_normal(a[rows].shape)).astype(a.dtype) if a.dtype.kind == "f" else a[rows] for a in of.example
    )
    view = View(inputs=inputs)
    return Context(train=view, calibrate=view.take(slice(0, 20)), original=original, loss="original", profile=OnnxRuntime().profile)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("law", testing.STEP_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: type(step).__name__)
def test_every_step_keeps_every_law(step: Step, law: testing.StepLaw, name: str) -> None:
    of = given(name, step.takes)
    law(step, of, context(of, given(name, "module")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_every_engine_keeps_every_law(engine: Engine, name: str) -> None:
    for law in testing.ENGINE_LAWS:
        law(engine, given(name, engine.takes))


@pytest.mark.long
@pytest.mark.parametrize("name", ["cnn", "lstm"])
@pytest.mark.parametrize("engine", SLOW_ENGINES, ids=str)
def test_slow_engines_keep_the_laws_too(engine: Engine, name: str) -> None:
    if why := engine.available():
        pytest.skip(why)
    for law in testing.ENGINE_LAWS:
        law(engine, given(name, engine.takes))


@pytest.mark.parametrize("name", NAMES)
def test_all_steps_compose(name: str, tmp_path: Path) -> None:
    """Fold, prune, fine-tune, quantize, run: it runs, or a step says why not.

    OpenVINO rounds Q/DQ graphs its own way; test_quantize holds its answers against the float graph.
    """
    made = network(name)
    told = context(made, made)
    for step in (FoldBatchNorm(), PruneStructure(), FineTune(epochs=1, batch=8), QuantizeStatic()):
        if step.takes == "graph":
            made = lower(made)
        try:
            made = step.apply(made, told)
        except Unsupported as why:
            assert str(why)
    testing.packs_what_runs_alone(OnnxRuntime(), made)


@dataclass(frozen=True, kw_only=True)
class Faulty:
    """A step with one planted fault."""

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.FOLD
    lossless: ClassVar[bool] = True
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed"})
    reads_profile: ClassVar[bool] = False
    fault: str = "none"

    def apply(self, network: Network, context: Context) -> Network:
        module = copy.deepcopy(network.module)
        layer = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
        if self.fault == "writes":
            next(network.module.parameters()).data.mul_(1.5)
        if self.fault == "hangs an attribute on it":
            network.module.visited = True  # type: ignore[assignment]
        if self.fault == "switches the mode":
            network.module.train()
        if self.fault == "returns the same":
            return network
        if self.fault == "draws":
            layer.weight.data.add_(torch.randn_like(layer.weight) * 1e-6)
        if self.fault == "loses":
            layer.weight.data.mul_(1.01)
        if self.fault == "forgets when saved":
            module = Forgetful(module)
        if self.fault == "fixes the batch":
            return Network(kind="module", body=module, example=network.example, fixed_batch=4)
        if self.fault == "refuses without a reason":
            raise Unsupported("")
        return network.with_body(module)

    @classmethod
    def space(cls, network: Network) -> Space:
        del network
        return {"fault": ("none",)}


class Forgetful(nn.Module):
    """Keeps a weight outside of what is saved."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.gain = inner, 1.0

    def __setstate__(self, state: dict) -> None:  # type: ignore[type-arg]
        super().__setstate__(state)
        self.gain = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.gain


@dataclass(frozen=True, kw_only=True)
class Amnesiac(Faulty):
    """Its JSON does not bring it back."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "fault", self.fault + "!")


@dataclass(frozen=True, kw_only=True)
class Boastful(Faulty):
    """Offers a value that it does not take."""

    def __post_init__(self) -> None:
        if self.fault == "none":
            object.__setattr__(self, "fault", "other")


@pytest.mark.parametrize(
    ("step", "law"),
    [
        (Faulty(fault="writes"), testing.leaves_the_network_alone),
        (Faulty(fault="hangs an attribute on it"), testing.leaves_the_network_alone),
        (Faulty(fault="switches the mode"), testing.leaves_the_network_alone),
        (Faulty(fault="returns the same"), testing.leaves_the_network_alone),
        (Faulty(fault="draws"), testing.same_seed_same_result),
        (Faulty(fault="loses"), testing.lossless_is_lossless),
        (Faulty(fault="refuses without a reason"), testing.lossless_is_lossless),
        (Faulty(fault="forgets when saved"), testing.survives_save_and_load),
        (Faulty(fault="fixes the batch"), testing.lowers),
        (Amnesiac(fault="x"), testing.rebuilds_from_json),
        (Boastful(fault="x"), testing.tells_its_space),
    ],
    ids=lambda value: getattr(value, "fault", None) or value.__name__,
)
def test_each_step_law_catches_its_fault(step: Step, law: testing.StepLaw) -> None:
    of = network("cnn")
    with pytest.raises(AssertionError, match=r"\w"):
        law(step, of, context(of, of))


def test_the_faultless_step_keeps_all_laws() -> None:
    of = network("cnn")
    for law in testing.STEP_LAWS:
        law(Faulty(), of, context(of, of))


@dataclass(frozen=True, kw_only=True)
class BadEngine:
    """An engine with one planted fault."""

    takes: ClassVar[Kind] = "graph"
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed"})
    fault: str = "none"

    @property
    def lossless(self) -> bool:
        return True

    @property
    def profile(self):  # type: ignore[no-untyped-def]
        return OnnxRuntime().profile

    def available(self) -> str | None:
        return None

    def space(self) -> Space:
        return {}

    def pack(self, network: Network, folder: Path) -> None:
        OnnxRuntime(threads=1).pack(network, folder)
        file = folder / "load.py"
        text = file.read_text()
        run = "lambda *inputs: tuple(session.run(None, dict(zip(names, inputs))))"
        assert run in text
        changed = {
            "none": run,
            "is long": run + "\n# one\n# two\n# three\n# four",
            "needs hasten": run + "  # hasten",
            "is inexact": run.replace("tuple(", "tuple(1.01 * o for o in "),
            "mixes examples": run.replace("tuple(", "tuple(o * (1 + 0.1 * (len(inputs[0]) == 1)) for o in "),
            "writes": run,
        }[self.fault]
        file.write_text(text.replace(run, changed))
        if self.fault == "writes":
            network.graph.producer_name = "me"


@pytest.mark.parametrize(
    ("fault", "law"),
    [
        ("is long", testing.packs_what_runs_alone),
        ("needs hasten", testing.packs_what_runs_alone),
        ("is inexact", testing.packs_what_runs_alone),
        ("mixes examples", testing.takes_any_batch),
        ("writes", testing.packing_changes_nothing),
    ],
)
def test_each_engine_law_catches_its_fault(fault: str, law: testing.EngineLaw) -> None:
    of = Network(kind="graph", body=copy.deepcopy(lowered("cnn").body), example=lowered("cnn").example)
    law(BadEngine(), of)
    with pytest.raises(AssertionError, match=r"\w"):
        law(BadEngine(fault=fault), of)
