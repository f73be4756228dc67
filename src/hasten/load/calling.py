"""A module that is called with keywords, dicts or nested tuples, as one that takes one tensor per input."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as tree

__all__ = ["Arguments", "by_keyword", "called", "flat"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def called(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module:
    """A network with one tensor per input, which calls `module` with them in the places of the leaves of `args` and `kwargs`.

    The module itself where each argument is one leaf already and none has a name. Else a graph of one call: no class of ours, so
    what is packed runs without hasten.
    """
    if not kwargs and not any(isinstance(a, (Mapping, tuple, list)) for a in args):
        return module
    graph = fx.Graph()
    leaves, spec = tree.tree_flatten((tuple(args), dict(kwargs)))
    inputs = [graph.placeholder(f"x{i}") for i in range(len(leaves))]
    again_args, again_kwargs = tree.tree_unflatten(inputs, spec)
    graph.output(graph.call_module("network", again_args, again_kwargs))
    root = nn.Module()
    root.add_module("network", module)
    return fx.GraphModule(root, graph, "Called").eval()


def flat(example: Any) -> tuple[list[Any], Arguments]:
    """The leaves of an example, and the arguments that a module is called with.

    A mapping gives keywords, a tuple or list one argument each, anything else one argument; each may be nested.
    """
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    else:
        args, kwargs = (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}
    return tree.tree_leaves((args, kwargs)), (args, kwargs)


def by_keyword(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether `forward` has an argument of each of these names, and they do not simply stand in its order."""
    try:
        known = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return False
    return all(n in known for n in names) and known[: len(names)] != list(names)
