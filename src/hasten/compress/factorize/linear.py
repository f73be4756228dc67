"""Linear layers become two thin ones: singular value decomposition, on its own or weighted by what the layer sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from hasten.compress import calls, layers
from hasten.compress.factorize import ranks
from hasten.compress.fold.compose import wide
from hasten.compress.fold.unfold import is_matrix, matrix, two_layers
from hasten.core.data import View
from hasten.core.errors import Unsupported
from hasten.core.network import Kind, Network
from hasten.core.recipe import Aim, Context, Space, Stage

_KINDS = (nn.Linear, *calls.CONVOLUTIONS)
_RIDGE = 1e-3  # of the mean variance: directions that the calibration data never show still count a little
_ROWS = 64
_WIDEST = 8192  # values that a layer reads, for its inputs to be whitened
_BYTES = 1 << 30  # of covariances at one time


@dataclass(frozen=True, kw_only=True)
class FactorizeLinear:
    """Replaces each linear layer and each 1×1 convolution by two thinner ones, W ≈ U·V of rank r.

    The best product in the sense of ‖W − UV‖² comes from the r largest singular values of W. With `whiten` it is best for the inputs
    that the layer sees instead: with mean μ and covariance C = L·Lᵀ of its inputs over the calibration data, the singular value
    decomposition W·L = P·S·Qᵀ gives U = P_r·√S_r, V = √S_r·Q_rᵀ·L⁻¹, which minimise E‖(W − UV)(x − μ)‖²; the bias takes up
    (W − UV)μ, so that the mean output stays. Computed in 64 bits. The network comes back lifted; the factors of the layer `name` are
    called `name.0` and `name.1`.

    A layer whose factors would have no fewer parameters or take more multiply-adds is left alone, and so is one with a side
    below 2·`multiple` (a head of ten classes bears no rank of four; `rank` takes it), or that is called twice, shares its weights or
    carries hooks. Where a layer reads more than 8,192 values the covariance is not taken, which would fill 0.5 GB and more: its factors are
    those of W itself.

    Ranks are multiples of `multiple`. By time they are chosen with `faster`: the layer and its factors at four ranks are run in PyTorch on
    one row of the example, and the largest rank that is fast enough is taken; a layer that no rank makes fast enough stays, and
    `progress` names it. Such a choice may differ from machine to machine and from day to day, and an engine may like other ranks
    better; a search compares budgets by the time of the whole network in the engine.

    Args:
        energy: share in (0, 1] of the sum of squared singular values that is kept (with `whiten`, of the output's variance).
        budget: share in (0, 1) of each layer's weights that the factors may have, where neither energy nor rank is given.
        rank: of every chosen layer, as given.
        faster: share in (0, 1) of the layer's own measured time that the factors may take, in the place of the others.
        multiple: ranks by energy are rounded up to a multiple of this, ranks by budget down, where they are that large.
        whiten: weights the directions by what the layer sees of the calibration data.
        only: patterns of layer names to take; all where it is empty.
        keep: patterns of layer names to leave out.

    Raises:
        UsageError: where a pattern meets no layer.
        Unsupported: where nothing gets smaller; where `rank` is above the full rank of a layer.

    Reference: Emily Denton, Wojciech Zaremba, Joan Bruna, Yann LeCun, Rob Fergus, "Exploiting Linear Structure Within Convolutional
    Networks for Efficient Evaluation", 2014, arXiv 1404.0736; for `whiten`, Xin Wang, Yu Zheng, Zhongwei Wan, Mi Zhang, "SVD-LLM:
    Truncation-aware Singular Value Decomposition for Large Language Model Compression", 2024, arXiv 2403.07378.
    """

    takes: ClassVar[Kind] = "module"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    lossless: ClassVar[bool] = False
    aims: ClassVar[frozenset[Aim]] = frozenset({"speed", "size"})
    reads_profile: ClassVar[bool] = False

    energy: float | None = None
    budget: float = 0.5
    rank: int | None = None
    faster: float | None = None
    multiple: int = 8
    whiten: bool = True
    only: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranks.check(self)

    def apply(self, network: Network, context: Context) -> Network:
        """The network with thin layers, lifted, in eval mode."""
        module = layers.lifted(network)
        own = calls.own_layers(module)
        read = calls.read_shapes(own, calls.shapes(module, network))
        known = layers.named(module, _KINDS, only=self.only, keep=self.keep)
        chosen = {name: layer for name, layer in known.items() if name in own and is_matrix(layer) and self._wide_enough(layer)}
        made: dict[str, list[nn.Module]] = {}
        slow: list[str] = []
        for names in _turns(chosen) if self.whiten else [list(chosen)]:
            nodes = [own[n] for n in names if self.whiten and _spans(chosen[n])]
            seen = _moments(module, nodes, context.calibrate, network.fixed_batch) if nodes else {}
            for name in names:
                context.progress((len(made) + len(slow)) / len(chosen), name)
                step = self._timed(chosen[name], read[name])
                if step is not None:
                    made[name] = step._parts(name, chosen[name], seen.get(own[name]))
                    continue
                slow.append(name)
                context.progress((len(made) + len(slow)) / len(chosen), ranks.stays(name, self.faster))
        made = {name: parts for name, parts in made.items() if ranks.cheaper(chosen[name], parts, read[name])}
        for name, parts in made.items():
            calls.replace(module, own[name], parts)
        if not made:
            wanted = "FactorizeLinear needs a linear layer or a 1×1 convolution whose factors are smaller than it, found none"
            raise Unsupported(wanted + ranks.too_slow(slow, self.faster))
        return network.with_body(calls.finish(module))

    @classmethod
    def space(cls, network: Network) -> Space:
        """The budget. Raises Unsupported on a network without linear layers and 1×1 convolutions."""
        if not any(type(m) in _KINDS and is_matrix(m) for m in network.module.modules()):
            raise Unsupported("FactorizeLinear needs a linear layer or a 1×1 convolution, found none")
        return {"budget": (0.5, 0.35, 0.7)}

    def _wide_enough(self, layer: Any) -> bool:
        return self.rank is not None or min(layer.weight.shape[:2]) >= 2 * self.multiple

    def _timed(self, layer: Any, shape: tuple[int, ...]) -> FactorizeLinear | None:
        """The step with the budget that `faster` chooses for this layer; None where none is fast enough."""
        if self.faster is None:
            return self
        out, inner = layer.weight.shape[:2]

        def chain(budget: float) -> list[nn.Module]:
            r = _rank_within(budget, out, inner, self.multiple)
            return two_layers(layer, torch.zeros(r, inner), torch.zeros(out, r))

        budget = ranks.within(layer, chain, shape, self.faster)
        return None if budget is None else replace(self, budget=budget, faster=None)

    def _parts(self, name: str, layer: Any, seen: tuple[Tensor, Tensor] | None) -> list[nn.Module]:
        whole = matrix(layer)
        mean, root = (whole.new_zeros(whole.shape[1]), None) if seen is None else seen
        left, sizes, right = torch.linalg.svd(whole if root is None else whole @ root, full_matrices=False)
        r = self._rank(name, sizes, *whole.shape)
        inner = sizes[:r].sqrt()[:, None] * right[:r]
        if root is not None:  # inner · L⁻¹, from the right
            inner = torch.linalg.solve_triangular(root, inner, upper=False, left=False)
        outer = left[:, :r] * sizes[:r].sqrt()
        parts = two_layers(layer, inner, outer)
        if root is not None:
            last: Any = parts[1]
            bias = wide(layer.bias, len(whole)) + (whole - outer @ inner) @ mean
            last.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
        return parts

    def _rank(self, name: str, sizes: Tensor, out: int, inner: int) -> int:
        if self.rank is not None:
            return ranks.below(name, self.rank, len(sizes))
        if self.energy is not None:
            return ranks.by_energy(sizes, self.energy, self.multiple)
        return _rank_within(self.budget, out, inner, self.multiple)


def _rank_within(budget: float, out: int, inner: int, multiple: int) -> int:
    return min(ranks.down(budget * out * inner / (out + inner), multiple), out, inner)


def _spans(layer: Any) -> bool:
    """Whether the layer reads so few values that their covariance is taken."""
    return bool(layer.weight.shape[1] <= _WIDEST)


def _turns(chosen: Mapping[str, Any]) -> Iterator[list[str]]:
    """The names in turns: the covariances of one fit into memory together."""
    turn: list[str] = []
    held = 0
    for name, layer in chosen.items():
        needed = 8 * layer.weight.shape[1] ** 2 if _spans(layer) else 0
        if turn and held + needed > _BYTES:
            yield turn
            turn, held = [], 0
        turn.append(name)
        held += needed
    yield turn


def _moments(module: fx.GraphModule, nodes: list[fx.Node], data: View, fixed: int | None) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """Mean, and the triangle L with L·Lᵀ = covariance + ridge, of what each layer reads."""
    seen = _Seen(module, nodes)
    with torch.no_grad():
        for rows in _batches(data, fixed):
            seen.run(*calls.inputs(module, rows.inputs))
    if not seen.sums:
        raise Unsupported(f"whiten needs {fixed or 1} rows of calibration data at least, got {len(data)}")
    made = {}
    for node in list(seen.sums):  # one at a time, and in place: a wide layer's matrix is large
        count, total, products = seen.sums.pop(node)
        mean = total / count
        spread = products.div_(count).addr_(mean, mean, alpha=-1)
        spread.diagonal().add_(_RIDGE * spread.diagonal().mean().clamp(min=1e-12))
        root, failed = torch.linalg.cholesky_ex(spread)
        if int(failed):
            raise Unsupported(f"whiten needs finite values in front of {node.target} on the calibration data, got others")
        made[node] = (mean, root)
    return made


def _batches(data: View, fixed: int | None) -> Iterator[View]:
    return (rows for rows in data.batches(fixed or _ROWS) if fixed in (None, len(rows)))


class _Seen(fx.Interpreter):
    """Counts, sums and sums of products of what some layers read."""

    def __init__(self, module: fx.GraphModule, nodes: list[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = set(nodes)
        self.sums: dict[fx.Node, tuple[int, Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n in self.wanted:
            (x,), _ = self.fetch_args_kwargs_from_env(n)
            layer: Any = self.submodules[str(n.target)]
            x = x.movedim(1 - layer.weight.dim(), -1) if type(layer) is not nn.Linear else x
            rows = x.reshape(-1, x.shape[-1]).double()
            width = rows.shape[1]
            count, total, products = self.sums.get(n) or (0, rows.new_zeros(width), rows.new_zeros(width, width))
            self.sums[n] = (count + len(rows), total + rows.sum(0), products.addmm_(rows.T, rows))
        return super().run_node(n)
