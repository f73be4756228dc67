"""Opinions: which methods for which network."""

from __future__ import annotations

from typing import Literal

from hasten.compress import (
    FactorizeConv,
    FactorizeLinear,
    FoldBatchNorm,
    FoldBranches,
    FoldLinear,
    PruneBlocks,
    PruneStructure,
    QuantizeDynamic,
    QuantizeStatic,
)
from hasten.core.network import Kind
from hasten.core.recipe import Engine, Step
from hasten.engines import Eager, OnnxRuntime, OpenVINO, TorchCompile
from hasten.search.catalogue import Catalogue
from hasten.train import Distil, FineTune

Effort = Literal["normal", "thorough"]

_NORMAL: tuple[type[Step], ...] = (FoldBatchNorm, FoldBranches, FoldLinear, FineTune, QuantizeStatic, QuantizeDynamic)
_THOROUGH: tuple[type[Step], ...] = (*_NORMAL, Distil, PruneStructure, PruneBlocks, FactorizeConv, FactorizeLinear)


def default(kind: Kind, effort: Effort = "normal", *, imported: bool = False) -> Catalogue:
    """What is tried on a network of this form.

    A module runs in eager PyTorch today, an ONNX file in ONNX Runtime, whether it could be imported as a module or stays a
    graph: that is what a speed-up is measured against.
    "normal" folds and chooses number formats, and trains only to win back what these lost. "thorough" also changes the
    structure, which needs training each time.
    """
    as_given: Engine = Eager() if kind == "module" and not imported else OnnxRuntime()
    everywhere: tuple[Engine, ...] = (OnnxRuntime(), OpenVINO())
    engines = (TorchCompile(), *everywhere) if kind == "module" else everywhere
    return Catalogue(as_given=as_given, engines=engines, steps=_THOROUGH if effort == "thorough" else _NORMAL)
