"""Engines: each turns a network into a folder that runs without hasten. The only room that knows a runtime's API."""

from hasten.engines.aot import AotInductor
from hasten.engines.eager import Eager
from hasten.engines.executorch import ExecuTorch
from hasten.engines.inductor import TorchCompile
from hasten.engines.litert import LiteRT
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.engines.openvino import OpenVINO
from hasten.engines.program import Program

__all__ = ["AotInductor", "Eager", "ExecuTorch", "LiteRT", "OnnxRuntime", "OpenVINO", "Program", "TorchCompile"]
