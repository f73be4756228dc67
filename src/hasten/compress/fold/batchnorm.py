"""Batch norms merge into the layer before them."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from hasten.core.errors import Unsupported
from hasten.core.network import Arrays, Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
Pair = tuple[str, str]  # names of a layer and of the norm behind it


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm:
    """Folds each batch norm that directly follows a convolution or a linear layer into that layer.

    W' = W·γ/√(σ² + ε), b' = (b − μ)·γ/√(σ² + ε) + β, computed in 64 bits. The norm's place is taken by `nn.Identity` in a
    module, by nothing in an `fx.GraphModule`; a module keeps its class. Where `torch.fx` cannot trace the module, only
    neighbours in an `nn.Sequential` are folded. A layer whose output is used elsewhere, that is called more than once, whose
    weight is read by other code, or that carries hooks or parametrizations is left alone, and so is a norm without running
    statistics.

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
        module = copy.deepcopy(network.module).eval()
        pairs = _pairs(copy.deepcopy(module), network.example)
        if not pairs:
            raise Unsupported("FoldBatchNorm needs a batch norm directly behind a convolution or linear layer, found none")
        for layer, norm in pairs:
            _merge(module.get_submodule(layer), module.get_submodule(norm))
        if isinstance(module, fx.GraphModule):
            _erase(module, {norm for _, norm in pairs})
        else:
            for _, norm in pairs:
                module.set_submodule(norm, nn.Identity())
        return network.with_body(module)

    @classmethod
    def space(cls, network: Network) -> Space:
        """Nothing to vary. Raises Unsupported on a network without batch norms."""
        if not any(type(m) in _NORMS for m in network.module.modules()):
            raise Unsupported("FoldBatchNorm needs a network with batch norms, found none")
        return {}


def _pairs(probe: nn.Module, example: Arrays) -> list[Pair]:
    """What can be folded. Runs and traces `probe`, whose forward may leave things behind on it."""
    seen = _Seen(probe, example)
    graph = _traced(probe)
    found = _chained(probe, seen) if graph is None else _wired(graph)
    return [pair for pair in found if _foldable(probe, pair, seen)]


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


def _traced(module: nn.Module) -> fx.Graph | None:
    """The graph of the module's calls, or None where its forward depends on values."""
    if isinstance(module, fx.GraphModule):
        return module.graph
    try:
        return fx.Tracer().trace(module)
    except Exception:  # tracing runs the user's forward on stand-ins, which may raise anything
        return None


def _wired(graph: fx.Graph) -> Iterator[Pair]:
    """Layers whose only reader is a norm, both called once, with weights that nothing else reads."""
    calls = Counter(n.target for n in graph.nodes if n.op == "call_module")
    read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
    for norm in graph.nodes:
        layer = norm.all_input_nodes[0] if norm.op == "call_module" and norm.all_input_nodes else None
        if layer is None or layer.op != "call_module" or len(layer.users) > 1 or len(norm.all_input_nodes) > 1:
            continue
        if calls[layer.target] == calls[norm.target] == 1 and not {layer.target, norm.target} & read:
            yield str(layer.target), str(norm.target)


def _chained(module: nn.Module, seen: _Seen) -> Iterator[Pair]:
    """Neighbours in an nn.Sequential that are called as often as it is, so never on their own."""
    for name, part in module.named_modules():
        if type(part) is not nn.Sequential:
            continue
        times = 1 if part is module else seen.calls[part]
        names = [f"{name}.{child}" if name else child for child, _ in part.named_children()]
        for pair in itertools.pairwise(names):
            if times and all(seen.calls[module.get_submodule(n)] == times for n in pair):
                yield pair


def _foldable(module: nn.Module, pair: Pair, seen: _Seen) -> bool:
    layer, norm = (module.get_submodule(name) for name in pair)
    if type(layer) not in _LAYERS or type(norm) not in _NORMS or norm.running_mean is None:
        return False
    if isinstance(layer, nn.Linear) and seen.axes.get(layer) != 2:
        return False  # behind a linear layer the norm's axis is the last one only where there are two
    return not _altered(layer) and not _altered(norm)


def _altered(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or nn.utils.parametrize.is_parametrized(module)


@torch.no_grad()
def _merge(layer: Any, norm: Any) -> None:
    gain = 1.0 if norm.weight is None else norm.weight.double()
    shift = 0.0 if norm.bias is None else norm.bias.double()
    factor = gain / (norm.running_var.double() + norm.eps).sqrt()
    weight, bias = layer.weight.double(), 0.0 if layer.bias is None else layer.bias.double()
    groups = layer.groups if type(layer) in _TRANSPOSED else 1
    if type(layer) in _TRANSPOSED:  # (in, out / groups, …): each group scales its own outputs
        parts = weight.unflatten(0, (groups, -1)) * factor.view(groups, 1, -1, *[1] * (weight.dim() - 2))
        merged = parts.flatten(0, 1)
    else:
        merged = weight * factor.view(-1, *[1] * (weight.dim() - 1))
    kind, learns = layer.weight.dtype, layer.weight.requires_grad
    layer.weight = nn.Parameter(merged.to(kind), requires_grad=learns)
    layer.bias = nn.Parameter(((bias - norm.running_mean.double()) * factor + shift).to(kind), requires_grad=learns)


def _erase(module: fx.GraphModule, norms: set[str]) -> None:
    for node in [n for n in module.graph.nodes if n.op == "call_module" and n.target in norms]:
        node.replace_all_uses_with(node.all_input_nodes[0])
        module.graph.erase_node(node)
    for name in norms:
        module.delete_submodule(name)
    module.graph.lint()
    module.recompile()
