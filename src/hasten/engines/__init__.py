"""Engines: each turns a network into a folder that runs without hasten. The only room that knows a runtime's API."""

from typing import get_args

from hasten.core.recipe import Engine
from hasten.engines.aot import AotInductor
from hasten.engines.eager import Eager
from hasten.engines.executorch import ExecuTorch
from hasten.engines.inductor import TorchCompile
from hasten.engines.litert import LiteRT
from hasten.engines.onnxruntime import OnnxRuntime, Provider
from hasten.engines.openvino import Device, OpenVINO
from hasten.engines.program import Program

__all__ = ["AotInductor", "Eager", "ExecuTorch", "LiteRT", "OnnxRuntime", "OpenVINO", "Program", "TorchCompile"]


def variants() -> list[Engine]:
    """Every engine with its usual settings, then on every provider and device that it has a name for, whether that is here or not."""
    usual: list[Engine] = [AotInductor(), Eager(), ExecuTorch(), LiteRT(), OnnxRuntime(), OpenVINO(), Program(), TorchCompile()]
    providers = [OnnxRuntime(provider=name) for name in get_args(Provider) if name != "cpu"]
    devices = [OpenVINO(device=name, shapes="static" if name == "NPU" else "dynamic") for name in get_args(Device) if name != "CPU"]
    return [*usual, *providers, *devices]
