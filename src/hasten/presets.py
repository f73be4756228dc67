"""Opinions: which methods for which network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from hasten.compress import (
    FactorizeConv,
    FactorizeLinear,
    FoldBatchNorm,
    FoldBranches,
    FoldLinear,
    PruneBlocks,
    PruneStructure,
    QuantizeAware,
    QuantizeDynamic,
    QuantizeMixed,
    QuantizeStatic,
    QuantizeWeights,
    StoreHalf,
)
from hasten.core.network import Kind
from hasten.core.recipe import Engine, Step
from hasten.core.report import Goal
from hasten.engines import Eager, OnnxRuntime, OpenVINO, TorchCompile
from hasten.search.catalogue import Catalogue
from hasten.train import Distil, FineTune

Effort = Literal["quick", "normal", "thorough"]

_QUICK: tuple[type[Step], ...] = (QuantizeStatic, QuantizeDynamic)
_NORMAL: tuple[type[Step], ...] = (
    *_QUICK,
    FoldBatchNorm,
    FoldBranches,
    FoldLinear,
    FineTune,
    QuantizeAware,
    QuantizeMixed,
    PruneStructure,
    PruneBlocks,
)
_THOROUGH: tuple[type[Step], ...] = (*_NORMAL, Distil, FactorizeConv, FactorizeLinear)
_SMALL: tuple[type[Step], ...] = (QuantizeWeights, StoreHalf)
_STEPS: dict[Effort, tuple[type[Step], ...]] = {"quick": _QUICK, "normal": _NORMAL, "thorough": _THOROUGH}
_TRAININGS: dict[Effort, int] = {"quick": 0, "normal": 5, "thorough": 12}
_COMPILING_S = 180.0  # of a run, below which nothing is compiled
# "quick" ends within a minute: the process has to start, and its last round to end.
_LIMITS_S: dict[Effort, float | None] = {"quick": 54.0, "normal": 600.0, "thorough": None}


def time_limit_s(effort: Effort) -> float | None:
    """How long a search of this effort takes where the user does not say."""
    return _LIMITS_S[effort]


def default(
    kind: Kind, effort: Effort = "normal", *, imported: bool = False, goals: Sequence[Goal] = ("latency",), time_s: float = math.inf
) -> Catalogue:
    """What is tried on a network of this form.

    A module runs in eager PyTorch today, an ONNX file in ONNX Runtime, whether it could be imported as a module or stays a
    graph: that is what a speed-up is measured against.
    "quick" races the engines and tries integers. "normal" also folds, prunes units and blocks, and trains what that cost back.
    "thorough" has more ways to change the structure and to train, and trains more often. Where the size counts, files are packed
    and weights stored small as well. Where the whole run has less than three minutes (`time_s`), nothing is compiled: half a minute for
    an engine that seldom wins on a CPU would cost the others their trials.
    """
    as_given: Engine = Eager() if kind == "module" and not imported else OnnxRuntime()
    engines: tuple[Engine, ...] = (OnnxRuntime(), OpenVINO())
    if "size" in goals:
        engines = (*engines, OnnxRuntime(packed=True), OpenVINO(packed=True))
    if kind == "module" and effort != "quick" and time_s >= _COMPILING_S:
        engines = (*engines, TorchCompile())
    steps = _STEPS[effort] + (_SMALL if "size" in goals else ())
    return Catalogue(as_given=as_given, engines=engines, steps=steps, tune=effort != "quick", trainings=_TRAININGS[effort])
