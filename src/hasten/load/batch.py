"""A graph that was exported for one batch size, rewritten for any.

An export writes the batch size into the sizes of view, expand and zeros. Which entry of such a list is the batch follows from
the shapes around it; running the result shows whether it was read right.
"""

from __future__ import annotations

import copy
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from hasten.load.layers import arguments

_RESHAPES = ("aten.view", "aten.reshape", "aten._unsafe_view")
_EXPANDS = ("aten.expand",)
_MAKES = ("aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.new_zeros", "aten.new_ones", "aten.new_full", "aten.repeat")
_CLOSE = 1e-4


def free_batch(module: fx.GraphModule, batch: int) -> bool:
    """Rewrites `module` in place for any batch size if that gives every example the same result as before; tells whether.

    Inputs are random: normal, or 0 and 1 for integers.
    """
    freed = copy.deepcopy(module)
    _Rewriting(freed, batch).run()
    freed.recompile()
    try:
        same = _same(module, freed, batch)
    except (RuntimeError, IndexError, ValueError, TypeError):
        same = False
    if same:
        module.graph = freed.graph
    return same


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


def _same(before: fx.GraphModule, after: fx.GraphModule, batch: int) -> bool:
    """Whether each example of a larger batch gets from `after` what it gets from `before`."""
    rows = 2 * batch + 1
    inputs = random_inputs(after, rows)
    with torch.no_grad():
        new = _tuple(after(*inputs))
        for start in (0, batch, batch + 1):
            old = _tuple(before(*(x[start : start + batch] for x in inputs)))
            for a, b in zip(old, new, strict=True):
                if a.dim() == 0 or len(b) != rows or not torch.allclose(a, b[start : start + batch], _CLOSE, _CLOSE):
                    return False
    return True


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


class _Rewriting(fx.Interpreter):
    """Runs the graph at another batch size and mends each size list on the way."""

    def __init__(self, module: fx.GraphModule, batch: int) -> None:
        super().__init__(module)
        self.batch = batch
        self.other = 2 * batch + 1
        self.size: fx.Node | None = None
        self.inputs = random_inputs(module, self.other)
        self.changed: dict[fx.Node, int] = {}

    def run(self) -> None:  # type: ignore[override]
        """Stops quietly where a node cannot run: the check that follows decides."""
        first = [n for n in self.module.graph.nodes if n.op == "placeholder"]
        with self.module.graph.inserting_after(first[-1]):
            self.size = self.module.graph.call_function(torch.ops.aten.sym_size.int, (first[0], 0))
        try:
            with torch.no_grad():
                super().run(*self.inputs, enable_io_processing=False)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function":
            self._mend(n)
        return super().run_node(n)

    def _mend(self, node: fx.Node) -> None:
        name = str(getattr(node.target, "overloadpacket", ""))
        if name not in (*_RESHAPES, *_EXPANDS, *_MAKES):
            return
        key = next(k for k in ("size", "shape", "repeats") if k in arguments(node))
        sizes = arguments(node)[key]
        if not all(isinstance(s, int) for s in sizes):
            return
        x = next((a for a in node.args if isinstance(a, fx.Node)), None)
        at = self._entry(name, list(sizes), x)
        if at is None:
            return
        whole = list(sizes)
        whole[at] = self._times(node, sizes[at] // self.batch)
        if key in node.kwargs:
            node.update_kwarg(key, whole)
        else:
            names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
            node.update_arg(names.index(key), whole)

    def _times(self, node: fx.Node, factor: int) -> fx.Node | None:
        assert self.size is not None
        if factor == 1:
            return self.size
        with self.module.graph.inserting_before(node):
            product = self.module.graph.call_function(operator.mul, (self.size, factor))
        self.env[product] = self.other * factor
        return product

    def _entry(self, name: str, sizes: list[int], x: fx.Node | None) -> int | None:
        """Which entry of `sizes` holds the batch; None where none does."""
        if name in _MAKES or x is None:
            return next((i for i, s in enumerate(sizes) if s == self.batch), None)
        old, new = list(x.meta["val"].shape), list(self.env[x].shape)
        grown = next((i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b), None)
        if name in _EXPANDS:
            return self._expanded(sizes, old, grown)
        if grown is None or -1 in sizes and math.prod(sizes[: sizes.index(-1)]) <= math.prod(old[:grown]):
            # The free entry takes the batch up, unless an entry before it must.
            return None
        outer = math.prod(old[:grown])
        ends = [math.prod(sizes[:i]) for i in range(len(sizes))]
        exact = next((i for i, end in enumerate(ends) if end == outer and sizes[i] % self.batch == 0), None)
        inside = next((i for i, s in enumerate(sizes) if ends[i] <= outer < ends[i] * s and s % self.batch == 0), None)
        return inside if exact is None else exact

    def _expanded(self, sizes: list[int], old: list[int], grown: int | None) -> int | None:
        if grown is None:
            return 0 if sizes[0] == self.batch and (len(sizes) > len(old) or old[0] == 1) else None
        at = grown + len(sizes) - len(old)
        return at if sizes[at] == old[grown] else None
