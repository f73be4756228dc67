"""Batch norms merge into the layer in front of them or behind them."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from hasten.compress.calls import CONVOLUTIONS, altered, reader
from hasten.compress.fold.carry import carries
from hasten.compress.fold.compose import NORMS, TRANSPOSED, affine, after_affine, takes_shift, wide
from hasten.core.errors import Unsupported
from hasten.core.network import Arrays, Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage
from hasten.load.lower import forward, relative_difference

_FAR = 1e-3  # of the largest output
_LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)


@dataclass(frozen=True)
class _Pair:
    """Names of a norm and of the layer that takes it; `behind`: the norm follows the layer."""

    layer: str
    norm: str
    behind: bool


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm:
    """Folds each batch norm into the convolution or linear layer that it follows, or else into the one that it feeds.

    With f = γ/√(σ² + ε) and t = β − μ·f, one number per channel, computed in 64 bits:

    - a norm behind the layer: W' = f·W, b' = f·b + t;
    - a norm in front of it: W'_oi = W_oi·f_i, b'_o = b_o + Σ_i t_i·Σ_k W_oik, also where only average pooling, flattening or dropout
      lies between. A convolution that pads with zeros does not see t in its padding, so there a norm with t ≠ 0 stays, and so it does in
      front of a transposed convolution unless each place lies under all of its kernel (stride 1, and padding that cuts off the edges).

    The norm's place is taken by `nn.Identity` in a module, by nothing in an `fx.GraphModule`; a module keeps its class. Where
    `torch.fx` cannot trace the module, only neighbours in an `nn.Sequential` are folded. A layer or norm whose output is used
    elsewhere, that is called more than once, whose weight is read by other code, or that carries hooks or parametrizations is left
    alone, and so is a norm without running statistics.

    >>> import torch
    >>> from torch import nn
    >>> from hasten.core.data import View
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> x = torch.randn(2, 3, 5, 5).numpy()
    >>> view = View(inputs=(x,))
    >>> network = Network(kind="module", body=net, example=(x,))
    >>> FoldBatchNorm().apply(network, Context(train=view, calibrate=view)).module
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )

    Raises:
        Unsupported: where nothing can be folded.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.FOLD
    lossless: ClassVar[bool] = True
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed"})
    reads_profile: ClassVar[bool] = False

    def apply(self, network: Network, context: Context) -> Network:
        """The network without the norms, in eval mode."""
        del context
        return _without(network)

    @classmethod
    def space(cls, network: Network) -> Space:
        """Nothing to vary. Raises Unsupported on a network without batch norms."""
        if not any(type(m) in NORMS for m in network.module.modules()):
            raise Unsupported("FoldBatchNorm needs a network with batch norms, found none")
        return {}


def without_norms(network: Network) -> Network:
    """The network with its batch norms folded where that can be done, else as it is."""
    try:
        return _without(network)
    except Unsupported:
        return network


def _without(network: Network) -> Network:
    module = copy.deepcopy(network.module).eval()
    pairs = _pairs(copy.deepcopy(module), network.example)
    if not pairs:
        raise Unsupported(
            "FoldBatchNorm needs a batch norm directly behind a convolution or linear layer, or in front of one that pads with no "
            "zeros, found none"
        )
    for pair in pairs:
        _merge(module, pair)
    if isinstance(module, fx.GraphModule):
        _erase(module, {pair.norm for pair in pairs})
    else:
        for pair in pairs:
            module.set_submodule(pair.norm, nn.Identity())
    return _checked(network, network.with_body(module))


def _checked(network: Network, folded: Network) -> Network:
    """The folded network. Raises Unsupported where it gives something else: what code reads can be hidden from a trace."""
    before, after = (forward(n.with_body(copy.deepcopy(n.module)), n.example) for n in (network, folded))
    for old, new in zip(before, after, strict=True):
        if relative_difference(old, new) > _FAR:
            raise Unsupported("FoldBatchNorm needs a network whose calls can be followed, folding this one changed its outputs")
    return folded


def _pairs(probe: nn.Module, example: Arrays) -> list[_Pair]:
    """What can be folded, each norm once. Runs and traces `probe`, whose forward may leave things behind on it."""
    seen = _Seen(probe, example)
    graph = _traced(probe, len(example))
    found = _chained(probe, seen) if graph is None else _wired(probe, graph, seen)
    chosen: dict[str, _Pair] = {}
    for pair in sorted((p for p in found if _foldable(probe, p, seen)), key=lambda p: not p.behind):
        chosen.setdefault(pair.norm, pair)
    return list(chosen.values())


class _Seen:
    """What one forward pass shows: how often each module is called, and how many axes its output has."""

    def __init__(self, module: nn.Module, example: Arrays) -> None:
        self.calls: Counter[nn.Module] = Counter()
        self.axes: dict[nn.Module, int] = {}
        hooks = [m.register_forward_hook(self._note) for m in module.modules() if m is not module]
        try:
            with torch.no_grad():
                module(*(torch.tensor(a) for a in example))
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        del inputs
        self.calls[module] += 1
        if isinstance(output, Tensor):
            self.axes[module] = output.dim()


def _traced(module: nn.Module, given: int) -> fx.Graph | None:
    """The graph of the module's calls with so many inputs, or None where its forward depends on values."""
    if isinstance(module, fx.GraphModule):
        return module.graph
    try:
        named = [p for p in inspect.signature(module.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD]
        left_out = {p.name: p.default for p in named[given:]}
        return fx.Tracer().trace(module, concrete_args=left_out or None)
    except Exception:  # tracing runs the user's forward on stand-ins, which may raise anything
        return None


def _wired(module: nn.Module, graph: fx.Graph, seen: _Seen) -> Iterator[_Pair]:
    """Norms and layers that read nothing but each other, both called once, with weights that nothing else reads."""
    calls = Counter(n.target for n in graph.nodes if n.op == "call_module")
    read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}

    def own(node: fx.Node | None) -> bool:
        return node is not None and node.op == "call_module" and calls[node.target] == 1 and str(node.target) not in read

    for norm in graph.nodes:
        if not own(norm) or len(norm.all_input_nodes) != 1 or type(module.get_submodule(norm.target)) not in NORMS:
            continue
        layer = norm.all_input_nodes[0]
        if own(layer) and len(layer.users) == 1:
            yield _Pair(str(layer.target), str(norm.target), behind=True)
        after, axes = reader(norm), seen.axes.get(module.get_submodule(norm.target), 0)
        while after is not None and carries(module, after, axes):
            after = reader(after)
        if after is not None and own(after) and len(after.all_input_nodes) == 1:
            yield _Pair(str(after.target), str(norm.target), behind=False)


def _chained(module: nn.Module, seen: _Seen) -> Iterator[_Pair]:
    """Neighbours in an nn.Sequential that are called as often as it is, so never on their own."""
    for name, part in module.named_modules():
        if type(part) is not nn.Sequential:
            continue
        times = 1 if part is module else seen.calls[part]
        names = [f"{name}.{child}" if name else child for child in part._modules]  # a module may stand in more than one place
        together = [n if times and seen.calls[module.get_submodule(n)] == times else None for n in names]
        yield from _neighbours(together)


def _neighbours(names: Sequence[str | None]) -> Iterator[_Pair]:
    for first, second in itertools.pairwise(names):
        if first is not None and second is not None:
            yield _Pair(first, second, behind=True)
            yield _Pair(second, first, behind=False)


def _foldable(module: nn.Module, pair: _Pair, seen: _Seen) -> bool:
    layer: Any = module.get_submodule(pair.layer)
    norm: Any = module.get_submodule(pair.norm)
    if type(layer) not in _LAYERS or type(norm) not in NORMS or norm.running_mean is None or altered(layer) or altered(norm):
        return False
    if isinstance(layer, nn.Linear) and seen.axes.get(layer) != 2:
        return False  # the norm's axis is the last one, where the layer works, only where there are two
    if pair.behind:
        return True
    if isinstance(layer, nn.Linear):
        return bool(layer.in_features % norm.num_features == 0)
    _, shift = affine(norm)
    return seen.axes.get(layer) == seen.axes.get(norm) and (takes_shift(layer) or not bool(shift.any()))


@torch.no_grad()
def _merge(module: nn.Module, pair: _Pair) -> None:
    layer: Any = module.get_submodule(pair.layer)
    scale, shift = affine(module.get_submodule(pair.norm))
    if pair.behind:
        _scale_outputs(layer, scale, shift)
        return
    if type(layer) is nn.Linear:  # flattened channels lie side by side
        each = layer.in_features // len(scale)
        scale, shift = scale.repeat_interleave(each), shift.repeat_interleave(each)
    made: Any = after_affine(layer, scale, shift)
    layer.weight, layer.bias = made.weight, made.bias


def _scale_outputs(layer: Any, scale: Tensor, shift: Tensor) -> None:
    weight = layer.weight.double()
    groups = layer.groups if type(layer) in TRANSPOSED else 1
    if type(layer) in TRANSPOSED:  # (in, out / groups, …): each group scales its own outputs
        parts = weight.unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
        merged = parts.flatten(0, 1)
    else:
        merged = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    kind, learns = layer.weight.dtype, layer.weight.requires_grad
    layer.weight = nn.Parameter(merged.to(kind), requires_grad=learns)
    layer.bias = nn.Parameter((wide(layer.bias, len(scale)) * scale + shift).to(kind), requires_grad=learns)


def _erase(module: fx.GraphModule, norms: set[str]) -> None:
    for node in [n for n in module.graph.nodes if n.op == "call_module" and n.target in norms]:
        node.replace_all_uses_with(node.all_input_nodes[0])
        module.graph.erase_node(node)
    for name in norms:
        module.delete_submodule(name)
    module.graph.lint()
    module.recompile()
