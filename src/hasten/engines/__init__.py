"""Engines: each turns a network into a folder that runs without hasten. The only room that knows a runtime's API."""

from hasten.engines.eager import Eager
from hasten.engines.inductor import TorchCompile
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.engines.openvino import OpenVINO

__all__ = ["Eager", "OnnxRuntime", "OpenVINO", "TorchCompile"]
