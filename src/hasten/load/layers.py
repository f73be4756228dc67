"""Which aten call is which layer: the table behind `lift`.

A reader looks at one call of an exported graph and gives the ordinary module that computes it, or None.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

Gives = Literal["tensor", "first", "lstm", "gru"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A call, read as a module.

    Args:
        kind: class of the module.
        settings: arguments of its constructor.
        inputs: what it is called with.
        weights: its parameters and buffers by name, as nodes of the graph.
        gives: "tensor", or how the call packs its results: "first" (item 0 is the tensor), "lstm" (output, h, c), "gru" (output, h).
        inplace: the call overwrites its input.
    """

    kind: type[nn.Module]
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[Any, ...]
    weights: dict[str, fx.Node] = field(default_factory=dict)
    gives: Gives = "tensor"
    inplace: bool = False


class Call:
    """A call of an aten operator with its arguments by name."""

    def __init__(self, node: fx.Node) -> None:
        self.name = _name(node.target)
        self.given = arguments(node)
        # An operator of several results gives the tensor first.
        self.gives: Gives = "tensor" if len(node.target._schema.returns) == 1 else "first"  # type: ignore[union-attr]

    def __getitem__(self, name: str) -> Any:
        return self.given[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or `default` where the operator has none of that name."""
        return self.given.get(name, default)

    def __contains__(self, name: str) -> bool:
        return name in self.given


def read(node: fx.Node) -> Layer | None:
    """The layer that `node` is, or None where it stays a call."""
    reader = _READERS.get(_name(node.target))
    layer = None if reader is None else reader(Call(node))
    if layer is None or not all(isinstance(w, fx.Node) and w.op == "get_attr" for w in layer.weights.values()):
        return None
    return layer


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an aten operator by name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


def rank(value: object) -> int:
    """Number of axes of the tensor that a node gives."""
    seen = value.meta["val"]  # type: ignore[attr-defined]
    return int((seen[0] if isinstance(seen, (tuple, list)) else seen).dim())


def _name(target: object) -> str:
    """`aten.conv2d` for each of its overloads."""
    return str(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else ""


def _present(**weights: Any) -> dict[str, Any]:
    return {name: node for name, node in weights.items() if node is not None}


def _convolution(a: Call) -> Layer | None:
    weight = a["weight"]
    axes = rank(weight) - 2
    transposed = a.get("transposed", "transpose" in a.name)
    shape, groups = weight.meta["val"].shape, a["groups"]
    before, after = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
    padding = a["padding"]
    settings = {
        "in_channels": int(before),
        "out_channels": int(after),
        "kernel_size": tuple(int(s) for s in shape[2:]),
        "stride": _spread(a["stride"], axes),
        "padding": padding if isinstance(padding, str) else _spread(padding, axes),
        "dilation": _spread(a["dilation"], axes),
        "groups": groups,
        "bias": a["bias"] is not None,
    }
    if transposed:
        settings["output_padding"] = _spread(a["output_padding"], axes)
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return Layer(kind=kinds[axes - 1], settings=settings, inputs=(a["input"],), weights=_present(weight=weight, bias=a["bias"]))


def _spread(value: Any, axes: int) -> tuple[int, ...]:
    """An aten size list: one number stands for every axis."""
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * axes if len(values) == 1 else values)


def _linear(a: Call) -> Layer | None:
    return _matrix(a["input"], a["weight"], a["bias"])


def _matrix(x: Any, weight: Any, bias: Any) -> Layer | None:
    if not isinstance(weight, fx.Node) or rank(weight) != 2:
        return None
    after, before = (int(s) for s in weight.meta["val"].shape)
    settings = {"in_features": before, "out_features": after, "bias": bias is not None}
    return Layer(kind=nn.Linear, settings=settings, inputs=(x,), weights=_present(weight=weight, bias=bias))


def _product(a: Call) -> Layer | None:
    """mm(x, wᵀ) or addmm(b, x, wᵀ): what a decomposition makes of a linear layer."""
    addmm = "self" in a and "mat1" in a
    x, transposed, bias = (a["mat1"], a["mat2"], a["self"]) if addmm else (a["self"], a["mat2"], None)
    if addmm and (a["alpha"] != 1 or a["beta"] != 1 or not isinstance(bias, fx.Node) or rank(bias) != 1):
        return None
    return _matrix(x, _untransposed(transposed), bias)


def _batched(a: Call) -> Layer | None:
    """bmm(x, wᵀ for every row): the same layer on three axes; its bias stays an addition."""
    weight = a["mat2"]
    while isinstance(weight, fx.Node) and _name(weight.target) in ("aten.view", "aten.expand") and rank(weight) == 3:
        if weight.meta["val"].shape[1:] != a["mat2"].meta["val"].shape[1:]:
            return None
        weight = weight.args[0]
    return _matrix(a["self"], _untransposed(weight), None)


def _untransposed(node: Any) -> fx.Node | None:
    if not isinstance(node, fx.Node) or _name(node.target) not in ("aten.t", "aten.permute", "aten.transpose"):
        return None
    a = arguments(node)
    swapped = a.get("dims") in ([1, 0], [-1, 0], [-1, -2]) or {a.get("dim0"), a.get("dim1")} in ({0, 1}, {-1, -2})
    return a["self"] if _name(node.target) == "aten.t" or swapped else None


def _batch_norm(a: Call) -> Layer | None:
    x, weight, bias = a["input"], a["weight"], a["bias"]
    mean, var = a.get("running_mean"), a.get("running_var")
    if (weight is None) != (bias is None) or (mean is None) != (var is None) or (mean is None and weight is None):
        return None
    settings = {
        "num_features": int((mean if weight is None else weight).meta["val"].shape[0]),
        "eps": a["eps"],
        # A momentum of 0 is what a module with momentum None (cumulative average) exports in eval mode.
        "momentum": a["momentum"] or None,
        "affine": weight is not None,
        "track_running_stats": mean is not None,
    }
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(rank(x))
    if kind is None:
        return None
    weights = _present(weight=weight, bias=bias, running_mean=mean, running_var=var)
    return Layer(kind=kind, settings=settings, inputs=(x,), weights=weights, gives=a.gives)


def _layer_norm(a: Call) -> Layer | None:
    weight, bias = a["weight"], a["bias"]
    if weight is None:
        return None
    settings = {"normalized_shape": tuple(a["normalized_shape"]), "eps": a["eps"], "bias": bias is not None}
    weights = _present(weight=weight, bias=bias)
    return Layer(kind=nn.LayerNorm, settings=settings, inputs=(a["input"],), weights=weights, gives=a.gives)


def _rms_norm(a: Call) -> Layer | None:
    if a["weight"] is None:
        return None
    settings = {"normalized_shape": tuple(a["normalized_shape"]), "eps": a["eps"]}
    return Layer(kind=nn.RMSNorm, settings=settings, inputs=(a["input"],), weights={"weight": a["weight"]}, gives=a.gives)


def _group_norm(a: Call) -> Layer | None:
    weight, bias = a["weight"], a["bias"]
    if weight is None or bias is None:
        return None
    groups = a["num_groups"] if "num_groups" in a else a["group"]
    settings = {"num_groups": groups, "num_channels": int(weight.meta["val"].shape[0]), "eps": a["eps"]}
    weights = _present(weight=weight, bias=bias)
    return Layer(kind=nn.GroupNorm, settings=settings, inputs=(a["input"],), weights=weights, gives=a.gives)


def _embedding(a: Call) -> Layer | None:
    words, width = (int(s) for s in a["weight"].meta["val"].shape)
    padding = a["padding_idx"]
    settings = {"num_embeddings": words, "embedding_dim": width, "padding_idx": None if padding < 0 else padding}
    return Layer(kind=nn.Embedding, settings=settings, inputs=(a["indices"],), weights={"weight": a["weight"]})


_RECURRENT: dict[str, tuple[type[nn.RNNBase], int, dict[str, Any]]] = {  # module, gates, further settings
    "aten.lstm": (nn.LSTM, 4, {}),
    "aten.gru": (nn.GRU, 3, {}),
    "aten.rnn_tanh": (nn.RNN, 1, {"nonlinearity": "tanh"}),
    "aten.rnn_relu": (nn.RNN, 1, {"nonlinearity": "relu"}),
}


def _recurrent(a: Call) -> Layer | None:
    """The `.input` overloads; packed sequences stay calls."""
    if "batch_first" not in a:
        return None
    kind, gates, nonlinearity = _RECURRENT[a.name]
    is_lstm = kind is nn.LSTM
    states = a["hx"] if is_lstm else [a["hx"]]
    first, hidden = a["params"][0], a["params"][1]
    features = int(first.meta["val"].shape[1])
    width = int(first.meta["val"].shape[0]) // gates
    projected = int(hidden.meta["val"].shape[1])
    settings = {
        "input_size": features,
        "hidden_size": width,
        "num_layers": a["num_layers"],
        "bias": a["has_biases"],
        "batch_first": a["batch_first"],
        "dropout": a["dropout"],
        "bidirectional": a["bidirectional"],
    } | nonlinearity
    if projected != width:
        settings["proj_size"] = projected
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if a["has_biases"] else [])]
    names += ["weight_hr"] if projected != width else []
    ends = [f"_l{i}{way}" for i in range(a["num_layers"]) for way in ("", "_reverse")[: 1 + a["bidirectional"]]]
    weights = dict(zip((name + end for end in ends for name in names), a["params"], strict=True))
    started = () if all(_is_zero(s) for s in states) else (tuple(states) if is_lstm else states[0],)
    return Layer(kind=kind, settings=settings, inputs=(a["input"], *started), weights=weights, gives="lstm" if is_lstm else "gru")


def _is_zero(node: fx.Node) -> bool:
    name = _name(node.target)
    return name in ("aten.zeros", "aten.new_zeros", "aten.zeros_like") or (name == "aten.full" and arguments(node)["fill_value"] == 0)


def _prelu(a: Call) -> Layer | None:
    slopes = int(a["weight"].meta["val"].numel())
    return Layer(kind=nn.PReLU, settings={"num_parameters": slopes}, inputs=(a["self"],), weights={"weight": a["weight"]})


def _plain(kind: type[nn.Module], **names: str) -> Callable[[Call], Layer]:
    """A layer without weights; `names` maps its settings to aten's words."""

    def reader(a: Call) -> Layer:
        settings = {ours: a[theirs] for ours, theirs in names.items()}
        inplace = a.name.endswith("_")
        return Layer(kind=kind, settings=settings, inputs=(next(iter(a.given.values())),), gives=a.gives, inplace=inplace)

    return reader


def _hardtanh(a: Call) -> Layer:
    if (a["min_val"], a["max_val"]) == (0, 6):
        return _plain(nn.ReLU6)(a)
    return _plain(nn.Hardtanh, min_val="min_val", max_val="max_val")(a)


def _elu(a: Call) -> Layer | None:
    return _plain(nn.ELU, alpha="alpha")(a) if a["scale"] == 1 and a["input_scale"] == 1 else None


def _channel_dropout(a: Call) -> Layer | None:
    kind = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}.get(rank(a["input"]))
    return None if kind is None else _plain(kind, p="p")(a)


Reader = Callable[[Call], Layer | None]
_ACTIVATIONS: dict[str, Reader] = {
    "relu": _plain(nn.ReLU),
    "relu6": _plain(nn.ReLU6),
    "hardtanh": _hardtanh,
    "gelu": _plain(nn.GELU, approximate="approximate"),
    "silu": _plain(nn.SiLU),
    "mish": _plain(nn.Mish),
    "hardswish": _plain(nn.Hardswish),
    "hardsigmoid": _plain(nn.Hardsigmoid),
    "sigmoid": _plain(nn.Sigmoid),
    "tanh": _plain(nn.Tanh),
    "leaky_relu": _plain(nn.LeakyReLU, negative_slope="negative_slope"),
    "elu": _elu,
    "softplus": _plain(nn.Softplus, beta="beta", threshold="threshold"),
    **dict.fromkeys(("dropout", "native_dropout"), _plain(nn.Dropout, p="p")),
    "feature_dropout": _channel_dropout,
    "alpha_dropout": _plain(nn.AlphaDropout, p="p"),
}
_WEIGHTED: dict[str, Reader] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
    "linear": _linear,
    **dict.fromkeys(("mm", "addmm"), _product),
    "bmm": _batched,
    **dict.fromkeys(("batch_norm", "native_batch_norm", "cudnn_batch_norm"), _batch_norm),
    **dict.fromkeys(("_native_batch_norm_legit", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("_native_batch_norm_legit_functional", "_batch_norm_with_update_functional"), _batch_norm),
    **dict.fromkeys(("layer_norm", "native_layer_norm"), _layer_norm),
    "rms_norm": _rms_norm,
    **dict.fromkeys(("group_norm", "native_group_norm"), _group_norm),
    "embedding": _embedding,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    "prelu": _prelu,
}
_READERS: dict[str, Reader] = {f"aten.{name}": reader for name, reader in _WEIGHTED.items()} | {
    f"aten.{name}{end}": reader for name, reader in _ACTIVATIONS.items() for end in ("", "_")
}


def unpacked(layer: Layer, user: fx.Node) -> tuple[int, ...] | None:
    """Where the module keeps what `user` takes from the call: () is its result itself, (1, 0) item 0 of item 1; None: nowhere."""
    if user.target is not operator.getitem:
        return None
    index = user.args[1]
    if layer.gives == "first":
        return () if index == 0 else None
    if layer.gives == "lstm":
        return ((0,), (1, 0), (1, 1))[index]  # type: ignore[index]
    return (index,)  # type: ignore[return-value]
