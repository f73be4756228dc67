"""Linear layers become two thin ones: singular value decomposition, on its own or weighted by what the layer sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
    carries hooks. Which ranks an engine likes is not measured here: ranks are multiples of `multiple`,
    and a search compares budgets by measured time.

    Args:
        energy: share in (0, 1] of the sum of squared singular values that is kept (with `whiten`, of the output's variance).
        budget: share in (0, 1) of each layer's weights that the factors may have, where neither energy nor rank is given.
        rank: of every chosen layer, as given.
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
        seen = _moments(module, [own[name] for name in chosen], context.calibrate, network.fixed_batch) if self.whiten else {}
        found = False
        for i, (name, layer) in enumerate(chosen.items()):
            context.progress(i / len(chosen), name)
            parts = self._parts(name, layer, seen.get(own[name]))
            if ranks.cheaper(layer, parts, read[name]):
                calls.replace(module, own[name], parts)
                found = True
        if not found:
            raise Unsupported("FactorizeLinear needs a linear layer or a 1×1 convolution whose factors are smaller than it, found none")
        return network.with_body(calls.finish(module))

    @classmethod
    def space(cls, network: Network) -> Space:
        """The budget. Raises Unsupported on a network without linear layers and 1×1 convolutions."""
        if not any(type(m) in _KINDS and is_matrix(m) for m in network.module.modules()):
            raise Unsupported("FactorizeLinear needs a linear layer or a 1×1 convolution, found none")
        return {"budget": (0.5, 0.35, 0.7)}

    def _wide_enough(self, layer: Any) -> bool:
        return self.rank is not None or min(layer.weight.shape[:2]) >= 2 * self.multiple

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
        return min(ranks.down(self.budget * out * inner / (out + inner), self.multiple), len(sizes))


def _moments(module: fx.GraphModule, nodes: list[fx.Node], data: View, fixed: int | None) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """Mean, and the triangle L with L·Lᵀ = covariance + ridge, of what each layer reads."""
    seen = _Seen(module, nodes)
    with torch.no_grad():
        for rows in _batches(data, fixed):
            seen.run(*calls.inputs(module, rows.inputs))
    if nodes and not seen.sums:
        raise Unsupported(f"whiten needs {fixed or 1} rows of calibration data at least, got {len(data)}")
    made = {}
    for node, (count, total, products) in seen.sums.items():
        mean = total / count
        spread = products / count - torch.outer(mean, mean)
        ridge = _RIDGE * spread.diagonal().mean().clamp(min=1e-12)
        root, failed = torch.linalg.cholesky_ex(spread + ridge * torch.eye(len(mean), dtype=torch.float64))
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
            count, total, products = self.sums.get(n, (0, rows.new_zeros(()), rows.new_zeros(())))
            self.sums[n] = (count + len(rows), total + rows.sum(0), products + rows.T @ rows)
        return super().run_node(n)
