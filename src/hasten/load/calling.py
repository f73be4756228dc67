"""A module that is called with keywords, dicts or nested tuples, as one that takes one tensor per input."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as tree

__all__ = ["Arguments", "arranged", "called"]

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


def arranged(module: nn.Module, example: Any, names: Sequence[str] = ()) -> tuple[list[Any], Arguments]:
    """The leaves of an example, and the arguments that the module is called with; each argument may be nested.

    A mapping gives keywords, a tuple or list one argument each, anything else one argument. So does a flat example with `names`
    that `forward` has in another order. A `forward` of one argument that has none of these names gets them in a dict.
    """
    known = _parameters(module)
    args: tuple[Any, ...] = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    kwargs: dict[str, Any] = {}
    reordered = all(n in known for n in names) and list(known)[: len(names)] != list(names)
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    elif len(names) == len(args) == len(tree.tree_leaves(args)) and (reordered or _wants_dict(known, names)):
        args, kwargs = (), dict(zip(names, args, strict=True))
    if kwargs and _wants_dict(known, list(kwargs)):
        args, kwargs = (kwargs,), {}
    return tree.tree_leaves((args, kwargs)), (args, kwargs)


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return {}


def _wants_dict(known: Mapping[str, inspect.Parameter], names: Sequence[str]) -> bool:
    """Whether `forward` has a single argument, and several names that are not its own belong in it."""
    kinds = {p.kind for p in known.values()}
    single = len(known) == 1 and kinds <= {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return single and len(names) > 1 and not set(names) & set(known)
