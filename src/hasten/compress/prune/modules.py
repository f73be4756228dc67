"""How each kind of layer hangs together: which of its inputs, weights and outputs share their units.

Shapes: a convolution's weight (out, in / groups, …), a transposed one's (in, out / groups, …), a linear layer's (out, in), a
recurrent layer's (gates · hidden, in).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn

from hasten.compress.prune import recurrent
from hasten.compress.prune.trace import Result, Trace
from hasten.compress.prune.units import Axes, Ids, tie_rows

Rule = Callable[[Trace, fx.Node], Result | None]


def _layer(trace: Trace, node: fx.Node) -> Any:
    return trace.module.get_submodule(str(node.target))


def _linear(trace: Trace, node: fx.Node) -> Axes:
    layer, x = _layer(trace, node), trace.whole(node.args[0])
    weight = trace.parameter(layer.weight, writes=0)
    trace.units.tie(x.plain[-1], weight.plain[1], f"{node.target} reads it, and it cannot shrink")
    if layer.bias is not None:
        trace.units.tie(weight.plain[0], trace.parameter(layer.bias).plain[0], "")
    return Axes.of(trace.shape(node), (*x.plain[:-1], weight.plain[0]))


def _convolution(trace: Trace, node: fx.Node) -> Axes:
    layer, x = _layer(trace, node), trace.whole(node.args[0])
    channels = x.plain[-len(layer.kernel_size) - 1]
    weight, units = trace.parameter(layer.weight, writes=0), trace.units
    after = weight.plain[0]
    why = f"{node.target} reads it, and it cannot shrink"
    if layer.groups == 1:
        units.tie(channels, weight.plain[1], why)
    elif layer.in_channels == layer.groups:  # depthwise: each input with its own outputs
        tie_rows(units, _table(after, layer.groups))
        units.tie(channels, _table(after, layer.groups)[:, 0], why)
    else:
        after = _grouped(trace, layer, channels, weight.plain[1], after)
    if layer.bias is not None:
        units.tie(weight.plain[0], trace.parameter(layer.bias).plain[0], "")
    return _image(trace, node, x, after, len(layer.kernel_size))


def _transposed(trace: Trace, node: fx.Node) -> Axes:
    layer, x = _layer(trace, node), trace.whole(node.args[0])
    channels = x.plain[-len(layer.kernel_size) - 1]
    weight, units = trace.parameter(layer.weight, writes=1 if layer.groups == 1 else 0), trace.units
    units.tie(channels, weight.plain[0], f"{node.target} reads it, and it cannot shrink")
    if layer.groups == 1:
        after = weight.plain[1]
    elif layer.in_channels == layer.groups == layer.out_channels:
        after = weight.plain[0]
    else:
        tie_rows(units, _table(weight.plain[0], layer.groups).T)
        units.fix(weight.plain[1], f"{node.target} gives its outputs in groups")
        after = None
    if layer.bias is not None:
        bias = trace.parameter(layer.bias).plain[0]
        units.tie(after, bias, f"{node.target} gives its outputs in groups")
    return _image(trace, node, x, after, len(layer.kernel_size))


def _table(ids: Ids | None, rows: int) -> Ids:
    assert ids is not None
    return ids.reshape(rows, -1)


def _grouped(trace: Trace, layer: Any, channels: Ids | None, inner: Ids | None, after: Ids | None) -> Ids | None:
    """Every group loses the channels at the same places, so that all stay equally wide."""
    why = "a grouped convolution reads it, and it cannot shrink"
    units = trace.units
    if channels is None:
        units.fix(inner, why)
    else:
        tie_rows(units, _table(channels, layer.groups).T)
        units.tie(_table(channels, layer.groups)[0], inner, why)
    if layer.out_channels == layer.groups:  # one output per group: none can go while the groups stay
        units.fix(after, "each group of a convolution gives a single output")
    else:
        tie_rows(units, _table(after, layer.groups).T)
    return after


def _image(trace: Trace, node: fx.Node, x: Axes, channels: Ids | None, axes: int) -> Axes:
    shape = trace.shape(node)
    for axis in range(-axes, 0):
        trace.units.fix(x.plain[axis], f"{node.target} slides over it")
    plain: list[Ids | None] = [None] * len(shape)
    if len(shape) > axes + 1:
        plain[0] = x.plain[0]
    plain[-axes - 1] = channels
    return Axes.of(shape, plain)


def _batch_norm(trace: Trace, node: fx.Node) -> Axes:
    layer, x = _layer(trace, node), trace.whole(node.args[0])
    stored = [t for t in (layer.weight, layer.bias, layer.running_mean, layer.running_var) if t is not None]
    for tensor in stored:
        trace.units.tie(x.plain[1], trace.parameter(tensor).plain[0], f"{node.target} reads it, and it cannot shrink")
    if layer.weight is not None:
        trace.norm(layer.weight)
    return x


def _layer_norm(trace: Trace, node: fx.Node) -> Axes:
    layer, x = _layer(trace, node), trace.whole(node.args[0])
    count = len(layer.normalized_shape)
    why = f"{node.target} takes its mean"
    trace.hold(x, why, only=tuple(range(len(x.shape) - count, len(x.shape))))
    for tensor in (layer.weight, layer.bias):
        if tensor is not None:
            trace.hold(trace.parameter(tensor), why)
    return x


def _rms_norm(trace: Trace, node: fx.Node) -> Axes:
    """The mean of squares: what is zero may be missing where the layer is told of how many."""
    layer, x = _layer(trace, node), trace.whole(node.args[0])
    for back, ids in enumerate(reversed(trace.parameter(layer.weight).plain), start=1):
        trace.units.tie(x.plain[-back], ids, f"{node.target} reads it, and it cannot shrink")
    return x


def _group_norm(trace: Trace, node: fx.Node) -> Axes:
    """A group goes as a whole: the mean of what is left stays."""
    layer, x = _layer(trace, node), trace.whole(node.args[0])
    why = f"{node.target} reads it, and it cannot shrink"
    for tensor in (layer.weight, layer.bias):
        if tensor is not None:
            trace.units.tie(x.plain[1], trace.parameter(tensor).plain[0], why)
    if x.plain[1] is not None:
        tie_rows(trace.units, _table(x.plain[1], layer.num_groups))
    return x


def _embedding(trace: Trace, node: fx.Node) -> Axes:
    layer = _layer(trace, node)
    weight = trace.parameter(layer.weight, writes=1)
    trace.units.fix(weight.plain[0], f"{node.target} is asked for any of its rows")
    return Axes.of(trace.shape(node), (*trace.of(node.args[0]).plain, weight.plain[1]))


def _prelu(trace: Trace, node: fx.Node) -> Axes:
    layer, x = _layer(trace, node), trace.whole(node.args[0])
    if layer.num_parameters > 1:
        trace.units.tie(x.plain[1], trace.parameter(layer.weight).plain[0], f"{node.target} reads it, and it cannot shrink")
    else:
        trace.parameter(layer.weight)
    return x


def _through(trace: Trace, node: fx.Node) -> Axes:
    return trace.of(node.args[0])


_POINTWISE = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh,
    nn.LeakyReLU, nn.ELU, nn.Softplus,
)  # fmt: skip
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _batch_norm),
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
    **dict.fromkeys(recurrent.KINDS, recurrent.layers),
    nn.PReLU: _prelu,
    **dict.fromkeys(_POINTWISE, _through),
}
