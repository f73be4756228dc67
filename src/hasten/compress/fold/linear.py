"""Linear layers and convolutions with nothing between them become one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx, nn

from hasten.compress import calls
from hasten.compress.fold import compose
from hasten.compress.fold.batchnorm import without_norms
from hasten.compress.layers import lifted
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage

_KINDS = (nn.Linear, nn.Embedding, *calls.CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class FoldLinear:
    """Multiplies two layers that follow each other without an activation into one: linear ∘ linear, convolution ∘ convolution
    (1×1 with k×k, depthwise, dilated, strided), linear ∘ embedding.

    y = W₂(W₁x + b₁) + b₂ becomes y = (W₂W₁)x + (W₂b₁ + b₂); kernels of convolutions are convolved with each other; a table of
    embeddings is multiplied once. Computed in 64 bits. The network comes back lifted, the product under the name of the second.

    A product that would take more multiply-adds (at the shape of the example) or more parameters than the two layers is left
    alone, so a depthwise and a pointwise convolution stay two. So is a pair whose product would not be exact: where the second pads
    with zeros, and the first has a bias or a kernel wider than 1 there. The first must have no other reader; a layer that is called
    twice, shares its weights, or carries hooks is left alone.

    Raises:
        Unsupported: where nothing folds; it names a pair and why, or the two counts.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.FOLD
    lossless: ClassVar[bool] = True
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = False

    def apply(self, network: Network, context: Context) -> Network:
        """The network with the products, lifted, in eval mode."""
        del context
        return _multiplied(network)

    @classmethod
    def space(cls, network: Network) -> Space:
        """Nothing to vary. Raises Unsupported where nothing folds, with the batch norms folded first."""
        _multiplied(without_norms(network))
        return {}


def _multiplied(network: Network) -> Network:
    module = lifted(network)
    shapes = calls.shapes(module, network)
    found = False
    while pair := next((p for p in _pairs(module) if not _refusal(module, *p, shapes)), None):
        _fold(module, *pair)
        found = True
    if not found:
        why = next((_refusal(module, *p, shapes) for p in _pairs(module)), "found none")
        raise Unsupported(f"FoldLinear needs two linear layers or convolutions with nothing between them that fold into less: {why}")
    return network.with_body(calls.finish(module))


def _pairs(module: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Calls of two layers, the second the only reader of the first."""
    own = {node: module.get_submodule(name) for name, node in calls.own_layers(module).items()}
    for outer, layer in own.items():
        inner: Any = outer.args[0]
        if inner in own and type(layer) in _KINDS and type(own[inner]) in _KINDS and calls.reader(inner) is outer:
            yield inner, outer


def _refusal(module: fx.GraphModule, inner: fx.Node, outer: fx.Node, shapes: calls.Shapes) -> str | None:
    """Why the pair stays two layers."""
    first, second = (module.get_submodule(str(n.target)) for n in (inner, outer))
    if why := compose.obstacle(first, second):
        return f"{inner.target} and {outer.target} stay apart: {why}"
    parameters, per_output = compose.product_size(first, second)
    work = math.prod(shapes[outer]) * per_output
    before = sum(calls.multiply_adds(layer, shapes[n]) for layer, n in ((first, inner), (second, outer)))
    numbers = calls.numbers(first) + calls.numbers(second)
    if work > before or parameters > numbers:
        return (
            f"{inner.target} and {outer.target} as one would take {work:,} multiply-adds instead of {before:,} "
            f"and {parameters:,} parameters instead of {numbers:,}"
        )
    return None


def _fold(module: fx.GraphModule, inner: fx.Node, outer: fx.Node) -> None:
    made = compose.product(module.get_submodule(str(inner.target)), module.get_submodule(str(outer.target)))
    calls.replace(module, outer, [made])
    calls.bypass(inner)
    module.delete_submodule(str(inner.target))
