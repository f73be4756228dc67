"""Follows the units through a lifted network: one pass over its calls, one rule for each kind of call.

What no rule knows keeps its sizes: its inputs are fixed, with its name as the reason. So a network with strange parts is pruned
around them, never through them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from hasten.compress import calls
from hasten.compress.prune.units import Axes, Ids, Units
from hasten.core.network import Arrays

Result = Axes | list[Any]
"""The units of what a call gives: of one tensor, or of each in a tuple (nested; None for what is no tensor)."""


@dataclass(frozen=True)
class Place:
    """An axis of a stored tensor: `path` is its name in the network."""

    path: str
    axis: int


class Trace:
    """The units of every stored tensor and of the result of every call.

    Args:
        module: in lifted form; it is run once on `example`.
        example: one array per input.
    """

    def __init__(self, module: fx.GraphModule, example: Arrays) -> None:
        self.module = module
        self.units = Units()
        self.stored: dict[str, Axes] = {}
        self.writers: list[Place] = []  # output axes of layers: what a saliency looks at first
        self.norms: list[Place] = []  # the scales of batch norms
        self.pieces: list[Ids] = []  # parts of axes that go ways of their own, so that some of each must stay
        self.results: dict[fx.Node, Result | None] = {}
        self._paths = {id(t): name for name, t in _tensors(module).items()}
        self._shapes = {node: _shapes(result) for node, result in calls.results(module, example).items()}
        self._follow()

    def of(self, value: object) -> Axes:
        """The units of a call's argument, a single tensor."""
        assert isinstance(value, fx.Node)
        found = self.results[value]
        assert isinstance(found, Axes)
        return found

    def is_tensor(self, value: object) -> bool:
        """Whether an argument is a single tensor."""
        return isinstance(value, fx.Node) and isinstance(self.results.get(value), Axes)

    def shape(self, node: fx.Node) -> Any:
        """The shape of a call's result on the example, or a list of shapes; None for what is no tensor."""
        return self._shapes[node]

    def whole(self, value: object) -> Axes:
        """The units of an argument with no joint left: whole heads."""
        found = self.of(value).resolved(self.units)
        self.results[value] = found  # type: ignore[index]
        return found

    def parameter(self, tensor: Tensor, *, writes: int | None = None) -> Axes:
        """The units of a stored tensor, fresh where it is met for the first time. `writes`: its output axis."""
        path = self._paths[id(tensor)]
        if path not in self.stored:
            ids = [self.units.new(size) if size > 1 else None for size in tensor.shape]
            self.stored[path] = Axes.of(tuple(tensor.shape), ids)
        place = Place(path, writes) if writes is not None else None
        if place is not None and place not in self.writers:
            self.writers.append(place)
        return self.stored[path]

    def writes(self, value: object, axis: int) -> None:
        """Notes the output axis of a weight that a call reads, where it is a stored tensor."""
        if isinstance(value, fx.Node) and value.op == "get_attr":
            self.parameter(self._attribute(value), writes=axis)

    def norm(self, tensor: Tensor) -> None:
        """Notes the scale of a batch norm."""
        self.norms.append(Place(self._paths[id(tensor)], 0))

    def tie_all(self, ids: list[Ids | None], why: str) -> Ids | None:
        """Ties axes of the same size with each other; gives the first that has units."""
        first = ids[0]
        for other in ids[1:]:
            self.units.tie(first, other, why)
            first = other if first is None else first
        return first

    def hold(self, axes: Axes, why: str, only: tuple[int, ...] | None = None) -> None:
        """Fixes the units of a tensor, on all its axes or on some."""
        if only is None:
            for ids in axes.everything():
                self.units.fix(ids, why)
        else:
            for axis in only:
                self.units.fix(axes.plain[axis], why)

    def name(self, node: fx.Node) -> str:
        """What a message calls a call."""
        if node.op == "call_module":
            return f"{type(self.module.get_submodule(str(node.target))).__name__} {node.target}"
        return f"{getattr(node.target, 'overloadpacket', node.target)} ({node.name})"

    def bare(self, node: fx.Node) -> Result | None:
        """A result none of whose axes may shrink."""
        return _bare(self.shape(node))

    def axes(self) -> Iterator[tuple[Place, Ids]]:
        """Every axis of a stored tensor that has units."""
        for path, axes in self.stored.items():
            yield from ((Place(path, axis), ids) for axis, ids in enumerate(axes.plain) if ids is not None)

    def _follow(self) -> None:
        from hasten.compress.prune import modules, operators

        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                value = self._attribute(node)
                self.results[node] = self._stored(value) if isinstance(value, Tensor) else None
            elif node.op == "call_module":
                rule = modules.RULES.get(type(self.module.get_submodule(str(node.target))))
                self.results[node] = self._unknown(node) if rule is None else rule(self, node)
            elif node.op == "call_function":
                self.results[node] = operators.follow(self, node) or self._unknown(node)
            elif node.op == "placeholder":
                self.results[node] = self.bare(node)
            elif node.op == "output":
                self._held(node, "the network gives it out")

    def _stored(self, value: Tensor) -> Axes:
        """Whole numbers are positions and masks: they stay as they are."""
        return self.parameter(value) if value.is_floating_point() or value.is_complex() else Axes.bare(tuple(value.shape))

    def _attribute(self, node: fx.Node) -> Any:
        return operator.attrgetter(str(node.target))(self.module)

    def _unknown(self, node: fx.Node) -> Result | None:
        self._held(node, f"{self.name(node)} mixes it in a way that is not known")
        return self.bare(node)

    def _held(self, node: fx.Node, why: str) -> None:
        for given in node.all_input_nodes:
            for axes in _flat(self.results[given]):
                self.hold(axes, why)


def _bare(shape: Any) -> Result | None:
    if isinstance(shape, list):
        return [_bare(s) for s in shape]
    return None if shape is None else Axes.bare(shape)


def _flat(result: Result | None) -> list[Axes]:
    if isinstance(result, list):
        return [axes for part in result for axes in _flat(part)]
    return [] if result is None else [result]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every stored tensor by its first name."""
    return {**dict(module.named_buffers()), **dict(module.named_parameters())}


def _shapes(result: Any) -> Any:
    if isinstance(result, Tensor):
        return tuple(result.shape)
    return [_shapes(part) for part in result] if isinstance(result, (tuple, list)) else None
