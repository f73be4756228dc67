"""Module → exported program, the plain file that PyTorch itself reads."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree

from hasten.core.errors import Unsupported
from hasten.core.network import Arrays, Network
from hasten.load.lower import TOLERANCE, dynamic_shapes, examples, quiet, reason, relative_difference, tensors, traced

_CONSTRAINED = "Constraints violated"


def export_program(network: Network) -> torch.export.ExportedProgram:
    """The module of `network` as a program that takes any batch size, or the one that it is fixed to, and any size along open axes.

    Raises:
        Unsupported: naming why torch.export cannot follow it.
    """
    try:
        return _plain(traced(network, dynamic_shapes(network)))
    except Exception as why:  # the exporter raises whatever its parts raise
        if _CONSTRAINED in str(why) and (found := _constrained(network)):
            return _plain(found)
        raise Unsupported(f"torch.export cannot follow this network: {reason(why)}") from why


def _constrained(network: Network) -> torch.export.ExportedProgram | None:
    """The program where the network bounds its batch, as by a slice up to a large number, or makes a number of it, as by `len`.

    None where it takes the example's size alone.
    """
    for named in (False, True):
        with contextlib.suppress(Exception):  # the exporter raises whatever its parts raise
            found = traced(network, dynamic_shapes(network, named=named), strict=named)
            if agrees(found, network, examples(network)):
                return found
    return None


def agrees(program: torch.export.ExportedProgram, network: Network, inputs: Sequence[Arrays]) -> bool:
    """Whether the program takes all these inputs and gives what the module gives."""
    try:
        with quiet(), torch.no_grad():
            run = program.module()
            return all(_alike(network.module(*x), run(*x)) for x in (tensors(network, arrays) for arrays in inputs))
    except Exception:  # its guards, and the module on another size, raise whatever their parts raise
        return False


def _alike(wanted: Any, got: Any) -> bool:
    pairs = [(a, b) for a, b in zip(tree.tree_leaves(wanted), tree.tree_leaves(got), strict=True) if isinstance(a, Tensor)]
    return all(a.shape == b.shape and relative_difference(a.double().numpy(), b.double().numpy()) <= TOLERANCE for a, b in pairs)


_PLAIN = (None, tuple, list, dict, OrderedDict)


def _plain(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with its outputs in a tuple where they are of a class, such as those of `transformers`, that a reader would need."""
    signature = program.module_call_graph[0].signature
    assert signature
    if not _is_plain(signature.out_spec):
        signature.out_spec = tree.tree_structure((0,) * signature.out_spec.num_leaves)
    return program


def _is_plain(spec: tree.TreeSpec) -> bool:
    return spec.type in _PLAIN and all(map(_is_plain, spec.children()))
