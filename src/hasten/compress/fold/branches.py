"""Parallel branches that are summed become one layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from hasten.compress import calls
from hasten.compress.fold.batchnorm import without_norms
from hasten.compress.fold.compose import NORMS, Geometry, affine, geometry, regrouped, wide
from hasten.compress.layers import lifted
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage

_LAYERS = (nn.Linear, *calls.CONVOLUTIONS)
_ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True, kw_only=True)
class FoldBranches:
    """Sums parallel branches on one input into one layer: k×k + 1×1 convolution + identity, each with or without a batch norm behind
    it (RepVGG), kernels of several shapes (ACNet), several convolutions of one shape (MobileOne), parallel linear layers.

    Σᵢ (fᵢ·(Wᵢ * x + bᵢ) + tᵢ) = (Σᵢ fᵢ·Wᵢ) * x + Σᵢ (fᵢ·bᵢ + tᵢ), where f and t are scale and shift of the norm, every kernel lies
    on the smallest grid that holds all of them, and the identity is a kernel with a 1 at its middle. Computed in 64 bits. The
    network comes back lifted, the sum under the name of the largest of its layers.

    Only branches that read the same value and are read by nothing but the sum are taken, with equal stride, and padding that centres
    their kernels on one another. A sum that would take more multiply-adds or parameters than its branches (1×3 + 3×1) is left alone, and
    so is a layer that is called twice, shares its weights or carries hooks.

    Raises:
        Unsupported: where nothing folds; it names a sum and the two counts.

    Reference: Xiaohan Ding, Xiangyu Zhang, Ningning Ma, Jungong Han, Guiguang Ding, Jian Sun, "RepVGG: Making VGG-style ConvNets
    Great Again", 2021, arXiv 2101.03697.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.FOLD
    lossless: ClassVar[bool] = True
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = False

    def apply(self, network: Network, context: Context) -> Network:
        """The network with one layer for each foldable sum, lifted, in eval mode."""
        del context
        return _joined(network)

    @classmethod
    def space(cls, network: Network) -> Space:
        """Nothing to vary. Raises Unsupported where nothing folds, with the batch norms folded first."""
        _joined(without_norms(network))
        return {}


def _joined(network: Network) -> Network:
    module = lifted(network)
    shapes = calls.shapes(module, network)
    refused: dict[str, None] = {}
    found = False
    while made := next(_sums(module, shapes, refused), None):
        _put(module, *made, shapes)
        found = True
    if not found:
        why = next(iter(refused), "found none")
        raise Unsupported(f"FoldBranches needs a sum of parallel convolutions, linear layers or batch norms on one input: {why}")
    return network.with_body(calls.finish(module))


@dataclass(frozen=True, kw_only=True)
class _Branch:
    """One summand: scale·layer(source) + shift per channel; the identity where there is no layer."""

    leaf: fx.Node
    source: fx.Node
    name: str = ""
    layer: Any = None
    norm: Any = None

    @property
    def outputs(self) -> int:
        if self.layer is not None:
            return len(self.layer.weight)
        return 0 if self.norm is None else self.norm.num_features

    def affine(self, channels: int) -> tuple[Tensor, Tensor]:
        if self.norm is None:
            return torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
        return affine(self.norm)

    def bias(self, channels: int) -> Tensor:
        scale, shift = self.affine(channels)
        return shift + scale * wide(None if self.layer is None else self.layer.bias, channels)

    @property
    def shifts(self) -> bool:
        return self.norm is not None or (self.layer is not None and self.layer.bias is not None)


_Made = tuple[fx.Node, list[_Branch], list[fx.Node], nn.Module]


def _sums(module: fx.GraphModule, shapes: calls.Shapes, refused: dict[str, None]) -> Iterator[_Made]:
    """Each foldable sum: its last addition, the branches that become one, the other summands, and the layer."""
    own = {node: module.get_submodule(name) for name, node in calls.own_layers(module).items()}
    for root in module.graph.nodes:
        after = calls.reader(root)
        if not _is_sum(root) or (after is not None and _is_sum(after)):
            continue
        leaves = list(_leaves(root))
        same = [n for n in leaves if shapes.get(n) == shapes[root]]
        for group in _groups([_branch(n, own, shapes) for n in same], shapes):
            made = _merged(group)
            if why := _dearer(group, made, shapes[root]):
                refused.setdefault(why)
                continue
            taken = {b.leaf for b in group}
            yield root, group, [n for n in leaves if n not in taken], made


def _is_sum(node: fx.Node) -> bool:
    return node.target is _ADD and len(node.args) == 2 and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)


def _leaves(node: fx.Node) -> Iterator[fx.Node]:
    for summand in node.all_input_nodes if len(node.all_input_nodes) == 2 else node.args:
        assert isinstance(summand, fx.Node)
        if _is_sum(summand) and len(summand.users) == 1:
            yield from _leaves(summand)
        else:
            yield summand


def _branch(leaf: fx.Node, own: dict[fx.Node, nn.Module], shapes: calls.Shapes) -> _Branch:
    norm: Any = own.get(leaf)
    alone = len(leaf.users) == 1
    if alone and type(norm) in _LAYERS:
        return _Branch(leaf=leaf, source=leaf.all_input_nodes[0], name=str(leaf.target), layer=norm)
    if not alone or type(norm) not in NORMS or norm.running_mean is None:
        return _Branch(leaf=leaf, source=leaf)
    before = leaf.all_input_nodes[0]
    layer = own.get(before) if len(before.users) == 1 else None
    if type(layer) in _LAYERS and (type(layer) is not nn.Linear or len(shapes[leaf]) == 2):
        return _Branch(leaf=leaf, source=before.all_input_nodes[0], name=str(before.target), layer=layer, norm=norm)
    return _Branch(leaf=leaf, source=before, norm=norm)


def _groups(branches: Sequence[_Branch], shapes: calls.Shapes) -> Iterator[list[_Branch]]:
    """Branches that one layer can hold: two or more, one of them with a layer."""
    places: dict[Any, list[_Branch]] = {}
    for branch in branches:
        if branch.layer is not None and (place := _place(branch.layer)) is not None:
            places.setdefault((branch.source, place), []).append(branch)
    for (source, place), group in places.items():
        plain = [b for b in branches if b.layer is None and b.source is source]
        if place in ((), *(((1, 0),) * axes for axes in (1, 2, 3))):  # stride 1, as large as the input
            fits = group[0].layer.weight.shape[1] * (1 if place == () else group[0].layer.groups) == group[0].outputs
            # The norm's axis is the last one, where linear layers work, only where there are two.
            group += [b for b in plain if fits and (place or b.norm is None or len(shapes[b.leaf]) == 2)]
        if len(group) > 1:
            yield group


def _place(layer: Any) -> tuple[tuple[int, int], ...] | None:
    """Per axis the stride, and by how much the output is larger than the input: what layers must have in common to be summed."""
    if type(layer) is nn.Linear:
        return ()
    seen = geometry(layer)
    if seen is None or (any(seen.padding) and not seen.zeros):
        return None
    axes = zip(seen.stride, seen.padding, seen.kernel, seen.dilation, strict=True)
    return tuple((s, 2 * p - (k - 1) * d) for s, p, k, d in axes)


def _merged(group: Sequence[_Branch]) -> nn.Module:
    largest = _largest(group).layer
    channels = len(largest.weight)
    bias = sum((b.bias(channels) for b in group), torch.zeros(channels, dtype=torch.float64)) if any(b.shifts for b in group) else None
    if type(largest) is nn.Linear:
        weight = torch.zeros(largest.weight.shape, dtype=torch.float64)
        for b in group:
            # Only linear layers with two axes have a norm behind them.
            weight += b.affine(channels)[0][:, None] * (
                torch.eye(channels, dtype=torch.float64) if b.layer is None else wide(b.layer.weight)
            )
        return calls.linear(weight, bias, like=largest)
    groups = math.gcd(*(b.layer.groups for b in group if b.layer is not None))
    seen = [g for b in group if b.layer is not None and (g := geometry(b.layer)) is not None]
    if any(b.layer is None for b in group):
        one, zero = (1,) * len(seen[0].kernel), (0,) * len(seen[0].kernel)
        seen.append(Geometry(kernel=one, stride=one, padding=zero, dilation=one, zeros=True))
    grid = _grid(seen)
    inner = largest.in_channels // groups
    weight = torch.zeros(channels, inner, *grid.kernel, dtype=torch.float64)
    for b in group:
        scale = b.affine(channels)[0].view(-1, *[1] * (weight.dim() - 1))
        if b.layer is None:
            at = tuple(p // d for p, d in zip(grid.padding, grid.dilation, strict=True))
            rows = torch.arange(channels)
            weight[(rows, rows % inner, *at)] += scale.flatten()
        else:
            weight[_cells(b.layer, grid)] += scale * regrouped(wide(b.layer.weight), b.layer.groups, groups)
    return calls.convolution(weight, bias, like=largest, groups=groups, **grid.settings)


def _largest(group: Sequence[_Branch]) -> _Branch:
    return max((b for b in group if b.layer is not None), key=lambda b: b.layer.weight.numel())


def _grid(seen: Sequence[Geometry]) -> Geometry:
    """The coarsest grid on which all kernels lie."""
    kernel, padding, dilation = [], [], []
    for axis in range(len(seen[0].kernel)):
        widest = max(g.padding[axis] for g in seen)
        reach = max((g.kernel[axis] - 1) * g.dilation[axis] + widest - g.padding[axis] for g in seen)
        steps = [g.dilation[axis] for g in seen if g.kernel[axis] > 1] + [widest - g.padding[axis] for g in seen]
        apart = math.gcd(*steps) or 1
        kernel.append(reach // apart + 1)
        padding.append(widest)
        dilation.append(apart)
    return Geometry(kernel=tuple(kernel), padding=tuple(padding), dilation=tuple(dilation), stride=seen[0].stride, zeros=True)


def _cells(layer: Any, grid: Geometry) -> tuple[slice, ...]:
    """Where the taps of a kernel lie on the grid."""
    seen = geometry(layer)
    assert seen is not None
    cells = []
    for k, p, d, widest, apart in zip(seen.kernel, seen.padding, seen.dilation, grid.padding, grid.dilation, strict=True):
        start, step = (widest - p) // apart, max(d // apart, 1)
        cells.append(slice(start, start + (k - 1) * step + 1, step))
    return (slice(None), slice(None), *cells)


def _dearer(group: Sequence[_Branch], made: nn.Module, output: tuple[int, ...]) -> str | None:
    layers = [b.layer for b in group if b.layer is not None]
    before = sum(calls.multiply_adds(layer, output) for layer in layers)
    numbers = sum(calls.numbers(layer) for layer in layers) + sum(2 * b.norm.num_features for b in group if b.norm is not None)
    work, parameters = calls.multiply_adds(made, output), calls.numbers(made)
    if work <= before and parameters <= numbers:
        return None
    names = " + ".join(b.name or "identity" for b in group)
    return f"{names} as one would take {work:,} multiply-adds instead of {before:,} and {parameters:,} parameters instead of {numbers:,}"


def _put(
    module: fx.GraphModule, root: fx.Node, group: Sequence[_Branch], others: Sequence[fx.Node], made: nn.Module, shapes: calls.Shapes
) -> None:
    name = _largest(group).name
    with module.graph.inserting_before(root):
        total = module.graph.call_module(name, (group[0].source,))
        shapes[total] = shapes[root]
        for other in others:
            total = module.graph.call_function(_ADD, (total, other))
            shapes[total] = shapes[root]
    root.replace_all_uses_with(total)
    module.graph.eliminate_dead_code()
    module.set_submodule(name, made)
