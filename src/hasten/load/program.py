"""Module → exported program, the plain file that PyTorch itself reads."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch.utils import _pytree as tree

from hasten.core.errors import Unsupported
from hasten.core.network import Network
from hasten.load.lower import dynamic_shapes, quiet, reason
from hasten.load.recurrence import recurrent_by_shape


def export_program(network: Network) -> torch.export.ExportedProgram:
    """The module of `network` as a program that takes any batch size, or the one that it is fixed to, and any size along open axes.

    Raises:
        Unsupported: naming why torch.export cannot follow it.
    """
    example = tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in network.example)
    weights = next((p.dtype for p in network.module.parameters() if p.is_floating_point()), torch.float32)
    example = tuple(a.to(weights) if a.is_floating_point() else a for a in example)
    try:
        with quiet(), torch.no_grad(), recurrent_by_shape():
            return _plain(torch.export.export(network.module, example, dynamic_shapes=dynamic_shapes(network)))
    except Exception as why:  # the exporter raises whatever its parts raise
        raise Unsupported(f"torch.export cannot follow this network: {reason(why)}") from why


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
