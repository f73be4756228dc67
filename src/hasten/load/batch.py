"""A graph that was exported for one batch size, rewritten for any.

An export writes the batch size into the sizes of view, expand and zeros. Which entry of such a list is the batch follows from
the shapes around it; running the result shows whether it was read right.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from hasten.load.layers import arguments

Reading = tuple[Any, ...]
Picks = dict[Reading, int]

_RESHAPES = ("aten.view", "aten.reshape", "aten._unsafe_view")
_EXPANDS = ("aten.expand",)
_SHAPED = ("aten.flatten", "aten.unflatten", "aten.squeeze", "aten.unsqueeze")
_MAKES = ("aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.repeat")
_SIZED = (*_RESHAPES, *_EXPANDS, *_MAKES)
_ORDERED = (*_RESHAPES, *_SHAPED)
_CLOSE = 1e-4
_ATTEMPTS = 24


def free_batch(module: fx.GraphModule, batch: int) -> bool:
    """Rewrites `module` in place for any batch size if that gives every example the same result as before; tells whether.

    Inputs are random: normal, or 0 and 1 for integers.
    """
    picks: Picks | None = {}
    for _ in range(_ATTEMPTS):
        graph = fx.Graph()
        graph.output(graph.graph_copy(module.graph, {}))
        rewriting = _Rewriting(fx.GraphModule(module, graph), batch, picks or {})
        if rewriting.succeeds(module):
            graph.eliminate_dead_code()
            module.graph = graph
            return True
        picks = _next(rewriting.met)
        if picks is None:
            return False
    return False


def _next(met: dict[Reading, tuple[int, int]]) -> Picks | None:
    """The next combination of readings: the last one that has another is moved on, those before it stay."""
    kept = list(met.items())
    while kept:
        reading, (pick, options) = kept.pop()
        if pick + 1 < options:
            return {r: p for r, (p, _) in kept} | {reading: pick + 1}
    return None


def random_inputs(module: fx.GraphModule, rows: int | None = None) -> tuple[Tensor, ...]:
    """Inputs of the shapes that the graph was exported with, `rows` of them: normal values, 0 and 1 for integers."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for node in module.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            shape = [_whole(s) for s in value.shape]
            shape[:1] = [rows or shape[0]] if shape else []
            found.append(random_tensor(shape, value.dtype, generator))
    return tuple(found)


def random_tensor(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal values, or 0 and 1 for integers."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=dtype, generator=generator)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _whole(size: int | torch.SymInt) -> int:
    """A size as a number: what it was in the export."""
    return size if isinstance(size, int) else int(size.node.hint if size.node.hint is not None else 2)


def _same(before: fx.GraphModule, after: fx.GraphModule, inputs: tuple[Tensor, ...], batch: int) -> bool:
    """Whether each example of a larger batch gets from `after` what it gets from `before`."""
    rows = len(inputs[0])
    new = _tuple(after(*inputs))
    for start in (0, batch, rows - batch):
        old = _tuple(before(*(x[start : start + batch] for x in inputs)))
        for a, b in zip(old, new, strict=True):
            if b.dim() == 0 or len(b) != rows or not torch.allclose(a, b[start : start + batch], _CLOSE, _CLOSE):
                return False
    return True


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


class _Rewriting(fx.Interpreter):
    """Runs the graph at another batch size and mends each size list on the way.

    An axis that grows with the batch is before × batch × behind elements long; `behind` is kept for each node. Operators that
    keep the order of elements move the batch to the axis where as many elements lie behind it as before.
    """

    def __init__(self, module: fx.GraphModule, batch: int, picks: Picks) -> None:
        super().__init__(module)
        self.rewritten = module
        self.batch = batch
        self.picks = picks
        self.met: dict[Reading, tuple[int, int]] = {}
        self.other = 2 * batch + 1
        self.inputs = random_inputs(module, self.other)
        self.behind: dict[fx.Node, int] = {}
        first = [n for n in module.graph.nodes if n.op == "placeholder"]
        with module.graph.inserting_after(first[-1]):
            self.size = module.graph.call_function(torch.ops.aten.sym_size.int, (first[0], 0))

    def succeeds(self, before: fx.GraphModule) -> bool:
        """Rewrites, and runs the result against `before`."""
        try:
            with torch.no_grad():
                self.run(*self.inputs, enable_io_processing=False)
                self.rewritten.recompile()
                return _same(before, self.rewritten, self.inputs, self.batch)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False

    def run_node(self, n: fx.Node) -> Any:
        name = str(getattr(n.target, "overloadpacket", n.target))
        if name in _SIZED:
            self._mend(n, name)
        result = super().run_node(n)
        source = next((a for a in n.all_input_nodes if self._grown(a) is not None), None)
        if source is not None:
            self.behind[n] = self.behind.get(source, 1)
            at = _grown(n.meta.get("val"), result)
            if name in _ORDERED and at is not None:
                self.behind[n] = self._inner(source) // math.prod(n.meta["val"].shape[at + 1 :])
        return result

    def _grown(self, node: fx.Node) -> int | None:
        return _grown(node.meta.get("val"), self.env.get(node))

    def _inner(self, node: fx.Node) -> int:
        """How many elements of one example lie behind the batch, in the order of the elements."""
        at = self._grown(node)
        assert at is not None
        return self.behind.get(node, 1) * int(math.prod(node.meta["val"].shape[at + 1 :]))

    def _mend(self, node: fx.Node, name: str) -> None:
        given = arguments(node)
        key = next(k for k in ("size", "shape", "repeats") if k in given)
        sizes = list(given[key])
        if not all(isinstance(s, int) for s in sizes):
            return
        at = self._entry(name, sizes, next(iter(node.all_input_nodes), None))
        if at is None or sizes[at] == -1:
            return
        sizes[at] = self._times(node, sizes[at] // self.batch)
        if key in node.kwargs:
            node.update_kwarg(key, sizes)
        else:
            names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
            node.update_arg(names.index(key), sizes)

    def _times(self, node: fx.Node, factor: int) -> fx.Node:
        if factor == 1:
            return self.size
        with self.rewritten.graph.inserting_before(node):
            product = self.rewritten.graph.call_function(operator.mul, (self.size, factor))
        self.env[product] = self.other * factor
        return product

    def _entry(self, name: str, sizes: list[int], x: fx.Node | None) -> int | None:
        """Which entry of `sizes` holds the batch; None where none does."""
        if name in _MAKES or x is None:
            return next((i for i, s in enumerate(sizes) if s == self.batch), None)
        grown, old = self._grown(x), list(x.meta["val"].shape)
        if name in _EXPANDS:
            new = len(sizes) - len(old)
            if grown is None:
                return 0 if sizes[0] == self.batch and (new > 0 or old[0] == 1) else None
            return grown + new if sizes[grown + new] == old[grown] else None
        return None if grown is None else self._holder(sizes, math.prod(old), self._inner(x))

    def _holder(self, sizes: list[int], numel: int, inner: int) -> int | None:
        free = numel // abs(math.prod(sizes)) if -1 in sizes else 1
        whole = [free if s == -1 else s for s in sizes]
        after = [math.prod(whole[i + 1 :]) for i in range(len(whole))]
        holders = [i for i, s in enumerate(whole) if after[i] <= inner and inner * self.batch <= s * after[i] and s % self.batch == 0]
        holders.sort(key=lambda i: whole[i] != self.batch or after[i] != inner)
        if len(holders) < 2:
            return holders[0] if holders else None
        reading = (tuple(whole), inner)
        pick = self.picks.get(reading, 0)
        self.met[reading] = (pick, len(holders))
        return holders[pick]


def _grown(old: Any, new: Any) -> int | None:
    """The axis that differs between a tensor of the export and the one computed now."""
    if not isinstance(old, Tensor) or not isinstance(new, Tensor) or old.dim() != new.dim():
        return None
    return next((i for i, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)) if a != b), None)
