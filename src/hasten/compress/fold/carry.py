"""Calls that a scale and a shift per channel pass through unchanged: averages, flattening, what is idle in eval mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from hasten.compress.calls import altered

IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ATEN = torch.ops.aten
_MEANS = (
    _ATEN.adaptive_avg_pool1d.default,
    _ATEN.adaptive_avg_pool2d.default,
    _ATEN.adaptive_avg_pool3d.default,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
)


def carries(module: nn.Module, node: fx.Node, axes: int) -> bool:
    """Whether `node` gives scale·y + shift for scale·x + shift, where it gives y for x; x has its channels on axis 1 of `axes`.

    Flattening lays the values of one channel side by side.
    """
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        return _layer_carries(module.get_submodule(str(node.target)))
    if node.op != "call_function":
        return False
    if node.target in _MEANS:
        return True
    if node.target in (_ATEN.flatten.using_ints, torch.flatten):
        return node.args[1:] in ((1,), (1, -1)) and not node.kwargs
    if node.target is _ATEN.mean.dim:
        over: Any = node.args[1]
        return bool(over) and all(d % axes > 1 for d in over) and len(node.args) < 4
    return False


def _layer_carries(layer: nn.Module) -> bool:
    if altered(layer):
        return False
    if type(layer) is nn.Flatten:
        return (layer.start_dim, layer.end_dim) == (1, -1)
    if type(layer) in _AVERAGES:
        padding: Any = layer.padding
        padded = any(padding) if isinstance(padding, tuple) else bool(padding)
        return not padded and (type(layer) is nn.AvgPool1d or layer.divisor_override is None)
    return type(layer) in (*IDLE, *_ADAPTIVE)
