"""How each aten operator hangs together: what its arguments and its result share.

A pointwise operator ties what meets; a contraction ties what is summed over; a view carries the units along; an operator that
takes a mean or a maximum over an axis fixes that axis, because what is left out would change the result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from hasten.compress.prune import moves, products, recurrent
from hasten.compress.prune.trace import Result, Trace
from hasten.compress.prune.units import Axes, Ids, Joint, reshaped
from hasten.load.layers import arguments

Rule = Callable[[Trace, fx.Node], Result | None]


def follow(trace: Trace, node: fx.Node) -> Result | None:
    """The units of the result of a call, or None where no rule knows it."""
    if node.target is operator.getitem:
        return _item(trace, node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = str(node.target.overloadpacket).removeprefix("aten.").rstrip("_")  # in place or not
    if name in FILLED:
        return _filled(trace, node)
    if not any(trace.results.get(given) is not None for given in node.all_input_nodes):
        return trace.bare(node)  # made from nothing but numbers
    if torch.Tag.pointwise in node.target.tags:
        return _pointwise(trace, node)
    rule = _RULES.get(name)
    return None if rule is None else rule(trace, node)


def _item(trace: Trace, node: fx.Node) -> Result | None:
    held = trace.results[node.args[0]]  # type: ignore[index]
    return held[node.args[1]] if isinstance(held, list) else None  # type: ignore[index]


def _pointwise(trace: Trace, node: fx.Node) -> Result | None:
    """Broadcasting: axes that meet are tied; an axis of size 1 meets nothing."""
    given = [n for n in node.all_input_nodes if trace.is_tensor(n)]
    shape = trace.shape(node)
    if not given or not isinstance(shape, tuple):
        return None
    joint = _one_joint(trace, given, shape)
    axes = [trace.of(n) for n in given] if joint else [trace.whole(n) for n in given]
    why = f"{trace.name(node)} joins it with what cannot shrink"
    plain: list[Ids | None] = []
    for back in range(len(shape), 0, -1):
        meeting = [a.plain[-back] for a in axes if len(a.shape) >= back and a.shape[-back] == shape[-back]]
        busy = joint is not None and len(shape) - back in joint.axes
        plain.append(None if busy or shape[-back] == 1 else trace.tie_all(meeting, why))
    made = Axes.of(shape, plain)
    return Axes(made.shape, made.plain, joint)


def _one_joint(trace: Trace, given: list[fx.Node], shape: tuple[int, ...]) -> Joint | None:
    """The joint that a pointwise call carries on: nothing else may have a say on its axes."""
    holders = [n for n in given if trace.of(n).joint is not None]
    if len(holders) != 1 or trace.of(holders[0]).shape != shape:
        return None
    joint = trace.of(holders[0]).joint
    assert joint is not None
    for other in (trace.of(n).shape for n in given if n is not holders[0]):
        if any(len(shape) - axis <= len(other) and other[axis - len(shape)] != 1 for axis in joint.axes):
            return None
    return joint


def _same(trace: Trace, node: fx.Node) -> Axes:
    return trace.of(node.args[0])


def _view(trace: Trace, node: fx.Node) -> Axes:
    return reshaped(trace.of(node.args[0]), trace.shape(node), trace.units)


def _permute(trace: Trace, node: fx.Node) -> Axes:
    given = arguments(node)
    x = trace.of(node.args[0])
    return _permuted(x, [d % len(x.shape) for d in given["dims"]])


def _transpose(trace: Trace, node: fx.Node) -> Axes:
    given = arguments(node)
    x = trace.of(node.args[0])
    order = list(range(len(x.shape)))
    a, b = (given.get("dim0", -1), given.get("dim1", -2)) if len(order) > 1 else (0, 0)
    order[a], order[b] = order[b], order[a]
    return _permuted(x, order)


def _permuted(x: Axes, order: list[int]) -> Axes:
    joint = x.joint
    if joint is not None:
        places = [order.index(axis) for axis in joint.axes]
        turn = np.argsort(places)
        joint = Joint(axes=tuple(sorted(places)), ids=joint.ids.transpose(turn), last=order.index(joint.last))
    return Axes(tuple(x.shape[i] for i in order), tuple(x.plain[i] for i in order), joint)


def _expand(trace: Trace, node: fx.Node) -> Axes:
    x, shape = trace.whole(node.args[0]), trace.shape(node)
    old, ids = (1,) * (len(shape) - len(x.shape)) + x.shape, (None,) * (len(shape) - len(x.shape)) + x.plain
    other = arguments(node).get("other")  # expand_as
    spread = trace.whole(other).plain if other is not None else (None,) * len(shape)
    return Axes.of(shape, [u if a == b else over for u, over, a, b in zip(ids, spread, old, shape, strict=True)])


def _repeat(trace: Trace, node: fx.Node) -> Axes:
    x, shape = trace.whole(node.args[0]), trace.shape(node)
    ids = (None,) * (len(shape) - len(x.shape)) + x.plain
    return Axes.of(shape, [None if u is None else np.tile(u, size // len(u)) for u, size in zip(ids, shape, strict=True)])


def _concatenate(trace: Trace, node: fx.Node) -> Axes:
    given = arguments(node)
    parts = [trace.whole(n) for n in given["tensors"]]
    shape = trace.shape(node)
    dim = given["dim"] % len(shape)
    parts = [p for p in parts if len(p.shape) == len(shape)]  # an empty one-axis tensor may stand among them
    why = f"{trace.name(node)} joins it with what cannot shrink"
    plain = [None if axis == dim else trace.tie_all([p.plain[axis] for p in parts], why) for axis in range(len(shape))]
    if any(p.plain[dim] is not None for p in parts):
        plain[dim] = np.concatenate([_ids(trace, p, dim) for p in parts])
    return Axes.of(shape, plain)


def _ids(trace: Trace, part: Axes, dim: int) -> Ids:
    """The units along an axis; fixed ones where it has none."""
    ids = part.plain[dim]
    if ids is None:
        ids = trace.units.new(part.shape[dim])
        trace.units.fix(ids, "its size is given")
    return ids


def _stack(trace: Trace, node: fx.Node) -> Axes:
    given = arguments(node)
    parts = [trace.whole(n) for n in given["tensors"]]
    shape = trace.shape(node)
    dim = given["dim"] % len(shape)
    why = f"{trace.name(node)} joins it with what cannot shrink"
    plain = [trace.tie_all([p.plain[axis] for p in parts], why) for axis in range(len(shape) - 1)]
    return Axes.of(shape, (*plain[:dim], None, *plain[dim:]))


def _split(trace: Trace, node: fx.Node) -> list[Result]:
    given = arguments(node)
    x, shapes = trace.whole(node.args[0]), trace.shape(node)
    made: list[Result] = []
    dim, start = given["dim"] % len(x.shape), 0
    for shape in shapes:
        plain = list(x.plain)
        end = start + shape[dim]
        ids = x.plain[dim]
        if ids is not None:
            plain[dim] = ids[start:end]
            trace.pieces.append(ids[start:end])
        made.append(Axes.of(shape, plain))
        start = end
    return made


def _slice(trace: Trace, node: fx.Node) -> Axes:
    given = arguments(node)
    x = trace.of(node.args[0])
    dim = given["dim"] % len(x.shape)
    if x.joint is not None and dim in x.joint.axes:
        x = trace.whole(node.args[0])
    ids = x.plain[dim]
    if ids is None:
        return Axes(trace.shape(node), x.plain, x.joint)
    bounds = [given["start"], given["end"]]
    if given["step"] != 1 or any(isinstance(b, fx.Node) for b in bounds):
        trace.units.fix(ids, f"{trace.name(node)} takes a part of it")
        return Axes.of(trace.shape(node), [None if a == dim else u for a, u in enumerate(x.plain)])
    trace.pieces.append(ids[bounds[0] : bounds[1]])
    plain = [trace.pieces[-1] if a == dim else u for a, u in enumerate(x.plain)]
    return Axes(trace.shape(node), Axes.of(trace.shape(node), plain).plain, x.joint)


def _select(trace: Trace, node: fx.Node) -> Axes:
    given = arguments(node)
    x, index = trace.of(node.args[0]), given["index"]
    return _without(trace, node, given["dim"] % len(x.shape), index if isinstance(index, int) else None)


def _unbind(trace: Trace, node: fx.Node) -> list[Result]:
    given = arguments(node)
    dim = given["dim"] % len(trace.of(node.args[0]).shape)
    return [_without(trace, node, dim, index) for index in range(len(trace.shape(node)))]


def _without(trace: Trace, node: fx.Node, dim: int, index: int | None) -> Axes:
    """What one position along an axis leaves. A joint loses that axis: query, key and value out of one."""
    x = trace.of(node.args[0])
    trace.units.fix(x.plain[dim], f"{trace.name(node)} takes one of it")
    joint = x.joint
    if joint is not None and dim in joint.axes and (index is None or dim == joint.last):
        x, joint = trace.whole(node.args[0]), None
        trace.units.fix(x.plain[dim], f"{trace.name(node)} takes one of it")
    shape = tuple(s for a, s in enumerate(x.shape) if a != dim)
    plain = tuple(u for a, u in enumerate(x.plain) if a != dim)
    if joint is None:
        return Axes.of(shape, plain)
    axes = tuple(a - (a > dim) for a in joint.axes if a != dim)
    ids = joint.ids if index is None or dim not in joint.axes else np.asarray(joint.ids.take(index, joint.axes.index(dim)))
    if len(axes) == 1:
        return Axes.of(shape, [ids if a == axes[0] else u for a, u in enumerate(plain)])
    return Axes(shape, plain, Joint(axes=axes, ids=ids, last=joint.last - (joint.last > dim)))


def _total(trace: Trace, node: fx.Node) -> Result | None:
    """A sum over an axis: what is zero may be missing, and a mean is told of how many. Each result has the axes that are left."""
    given, x, shape = arguments(node), trace.whole(node.args[0]), trace.shape(node)
    over = reduced(given.get("dim"), len(x.shape))
    left = [None if a in over else u for a, u in enumerate(x.plain) if given.get("keepdim") or a not in over]
    return Axes.of(shape, left) if isinstance(shape, tuple) else [Axes.of(one, left) for one in shape]


def sums_over(trace: Trace, node: fx.Node) -> list[int]:
    """The axes of its first argument that a call sums over, in a way that does not see zeros; none for other calls."""
    if node.op == "call_module":
        layer: Any = trace.module.get_submodule(str(node.target))
        return list(range(-len(layer.normalized_shape), 0)) if type(layer) is nn.RMSNorm else []
    name = str(getattr(node.target, "overloadpacket", "")).removeprefix("aten.")
    if name not in ("sum", "mean", "norm", "linalg_vector_norm"):
        return []
    return reduced(arguments(node).get("dim"), len(trace.of(node.args[0]).shape))


def reduced(dims: Any, axes: int) -> list[int]:
    """The axes that a reduction runs over; all where none is named."""
    named = list(dims) if isinstance(dims, (list, tuple)) else [] if dims is None else [dims]
    return [d % axes for d in named] or list(range(axes))


def _statistic(trace: Trace, node: fx.Node) -> Result | None:
    """A maximum, a variance, …: the axes that it runs over must stay, the others go through."""
    x = trace.whole(node.args[0])
    trace.hold(x, f"{trace.name(node)} runs over it", only=tuple(reduced(arguments(node).get("dim"), len(x.shape))))
    return _total(trace, node)


def _filled(trace: Trace, node: fx.Node) -> Result | None:
    """A tensor of one value may be as wide as what it meets; of another tensor it takes the type and nothing else."""
    shape, written = trace.shape(node), arguments(node)["size"]
    ids = [trace.units.new(size) if isinstance(size, int) and size > 1 else None for size in written]
    return Axes.of(shape, ids) if len(ids) == len(shape) else trace.bare(node)


def _length(trace: Trace, node: fx.Node) -> Result | None:
    """The length of a vector does not see zeros, unless it is that of its smallest element."""
    given = arguments(node)
    order = given.get("p", given.get("ord"))
    return _statistic(trace, node) if isinstance(order, (int, float)) and order < 0 else _total(trace, node)


def _along(trace: Trace, node: fx.Node) -> Axes:
    """Softmax and its like: every axis goes through, the one that it runs along must stay."""
    given = arguments(node)
    x = trace.whole(node.args[0])
    trace.hold(x, f"{trace.name(node)} runs along it", only=(given["dim"] % len(x.shape),))
    return x


def _spatial(trace: Trace, node: fx.Node) -> Result | None:
    """Pooling and resizing: batch and channels go through, the other axes must stay."""
    x, shape = trace.whole(node.args[0]), trace.shape(node)
    shapes = shape if isinstance(shape, list) else [shape]
    moved = [a for a in range(len(x.shape)) if a >= 2 or x.shape[a] != shapes[0][a]]
    trace.hold(x, f"{trace.name(node)} slides over it", only=tuple(moved))
    made: list[Result] = [Axes.of(s, [None if a in moved else u for a, u in enumerate(x.plain)]) for s in shapes]
    return made if isinstance(shape, list) else made[0]


def _pad(trace: Trace, node: fx.Node) -> Axes:
    given = arguments(node)
    x, shape = trace.whole(node.args[0]), trace.shape(node)
    pads = list(given["pad"])
    plain: list[Ids | None] = list(x.plain)
    for axis in range(len(shape)):
        back = len(shape) - 1 - axis
        before, after = (pads[2 * back], pads[2 * back + 1]) if 2 * back + 1 < len(pads) else (0, 0)
        if plain[axis] is None or before == after == 0:
            continue
        if before < 0 or after < 0:
            trace.units.fix(plain[axis], f"{trace.name(node)} cuts it")
            plain[axis] = None
            continue
        new = trace.units.new(before + after)
        trace.units.fix(new, f"{trace.name(node)} puts zeros there")
        plain[axis] = np.concatenate([new[:before], x.plain[axis], new[before:]])
    return Axes.of(shape, plain)


def _looked_up(trace: Trace, node: fx.Node) -> Axes | None:
    """index: rows of a table by number, the other axes go through."""
    given = arguments(node)
    x, indices = trace.whole(node.args[0]), given["indices"]
    if not indices or any(i is None for i in indices) or any(trace.is_tensor(i) and trace.of(i).everything() for i in indices):
        return None
    trace.hold(x, f"{trace.name(node)} looks up any of it", only=tuple(range(len(indices))))
    shape, rest = trace.shape(node), x.plain[len(indices) :]
    return Axes.of(shape, (*[None] * (len(shape) - len(rest)), *rest))


def _instance_norm(trace: Trace, node: fx.Node) -> Axes:
    """Each channel has a mean of its own, so channels go through."""
    given = arguments(node)
    x = trace.whole(given["input"])
    trace.hold(x, f"{trace.name(node)} takes its mean", only=tuple(range(2, len(x.shape))))
    for stored in (given.get(name) for name in ("weight", "bias", "running_mean", "running_var")):
        if trace.is_tensor(stored):
            trace.units.tie(x.plain[1], trace.whole(stored).plain[0], f"{trace.name(node)} reads it, and it cannot shrink")
    return x


_STATISTICS = (
    "amax", "amin", "var", "std", "max", "min", "argmax", "argmin", "prod", "any", "all", "logsumexp",
)  # fmt: skip
FILLED = tuple(f"{new}{kind}" for new in ("", "new_") for kind in ("zeros", "ones", "full"))
_POOLS = tuple(f"{kind}{axes}d" for kind in ("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool") for axes in (1, 2, 3))
_RESIZES = tuple(
    f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "bilinear2d", "linear1d", "bicubic2d", "trilinear3d")
)
_PADS = tuple(f"{kind}_pad{axes}d" for kind in ("reflection", "replication") for axes in (1, 2, 3))
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("clone", "contiguous", "detach", "alias", "to", "_to_copy", "type_as", "lift_fresh_copy"), _same),
    **dict.fromkeys(("zeros_like", "ones_like", "full_like"), _same),
    **dict.fromkeys(("dropout", "native_dropout", "feature_dropout"), _same),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"), _view),
    "permute": _permute,
    **dict.fromkeys(("transpose", "swapaxes", "t", "numpy_T"), _transpose),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "repeat": _repeat,
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenate),
    "stack": _stack,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    **dict.fromkeys(("sum", "mean"), _total),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _length),
    **dict.fromkeys(_STATISTICS, _statistic),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum"), _along),
    **dict.fromkeys(("roll", "flip"), moves.turned),
    "index_select": moves.picked,
    "index": _looked_up,
    "where": _pointwise,
    **dict.fromkeys((*_POOLS, *_RESIZES, *_PADS, "max_pool2d_with_indices"), _spatial),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("matmul", "bmm", "mm"), products.product),
    "scaled_dot_product_attention": products.attention,
    "linear": products.linear,
    "addmm": products.addmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), products.convolution),
    "einsum": products.einsum,
    "glu": moves.gated,
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), moves.pixels),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), moves.shuffled),
    "repeat_interleave": moves.repeated,
    "instance_norm": _instance_norm,
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), recurrent.cell),
}  # fmt: skip
