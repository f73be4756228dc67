"""Opinions: which methods for which network."""

from __future__ import annotations

from hasten.compress import FoldBatchNorm, QuantizeStatic
from hasten.core.network import Kind
from hasten.core.recipe import Engine
from hasten.engines import Eager, OnnxRuntime, OpenVINO, TorchCompile
from hasten.search.catalogue import Catalogue
from hasten.train import FineTune


def default(kind: Kind) -> Catalogue:
    """Everything that hasten has, for a network of this form.

    A module runs in eager PyTorch today, an ONNX graph in ONNX Runtime: that is what a speed-up is measured against.
    """
    as_given: Engine = Eager() if kind == "module" else OnnxRuntime()
    everywhere: tuple[Engine, ...] = (OnnxRuntime(), OpenVINO())
    engines = (TorchCompile(), *everywhere) if kind == "module" else everywhere
    return Catalogue(as_given=as_given, engines=engines, steps=(FoldBatchNorm, FineTune, QuantizeStatic))
