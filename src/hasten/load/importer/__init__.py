"""An ONNX graph becomes a network of ordinary modules: the importer.

Every operator is one function of a table (`table.py`). The graph is followed once on the example, which fixes the constants and
the weights, and once by torch.export, whose program is lifted like any other: so a step sees the same thing whatever the door.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import fx

from hasten.core.errors import HastenError, ModelRefused, Unsupported
from hasten.core.network import Arrays, Network
from hasten.load.importer import (  # noqa: F401  each file enters its operators into the table
    arithmetic,
    control,
    convolution,
    integers,
    norms,
    quantized,
    recurrent,
    reduction,
    shapes,
    signals,
    types,
)
from hasten.load.importer.interpret import Followed
from hasten.load.importer.nodes import read_model
from hasten.load.importer.table import to_tensor
from hasten.load.lift import lift
from hasten.load.lower import quiet, reason
from hasten.load.recurrence import recurrent_by_shape

__all__ = ["import_graph", "to_module"]


def to_module(network: Network) -> Network:
    """The graph of `network` as a torch module in lifted form, with the same inputs.

    Raises:
        Unsupported: naming the node and the operator that cannot be imported.
    """
    body = import_graph(network.graph, network.example)
    fixed = body.meta["fixed_batch"]
    return Network(kind="module", body=body, example=network.example, fixed_batch=fixed, open_axes=network.open_axes)


def import_graph(graph: onnx.ModelProto, example: Arrays) -> fx.GraphModule:
    """The graph as an `fx.GraphModule` in eval mode whose layers are ordinary modules. Axes that the file leaves open stay open.

    Args:
        example: one array per input; its batch has at least two rows where the file takes any number.

    Raises:
        Unsupported: naming the node and the operator that cannot be imported.
    """
    body, functions = read_model(graph)
    followed = Followed(body, functions).eval()
    tensors = tuple(to_tensor(np.array(a)) for a in example)
    try:
        with quiet(), torch.no_grad():
            followed(*tensors)
            open_axes = _open_axes(graph, tensors)
            with recurrent_by_shape():
                program = torch.export.export(followed, tensors, dynamic_shapes=(open_axes,) if open_axes else None, strict=False)
            return lift(program)
    except HastenError as why:
        raise Unsupported(str(why)) from why if isinstance(why, ModelRefused) else None
    except Exception as why:  # the exporter raises whatever its parts raise
        raise Unsupported(f"torch.export cannot follow this graph: {reason(why)}") from why


def _open_axes(graph: onnx.ModelProto, tensors: Sequence[torch.Tensor]) -> tuple[dict[int, Any], ...] | None:
    """Which axes of each input the file leaves open. One row is no example of any number of rows."""
    weights = {i.name for i in graph.graph.initializer}
    sizes = [i.type.tensor_type.shape.dim for i in graph.graph.input if i.name not in weights]
    axes = tuple(
        {a: torch.export.Dim.AUTO for a, size in enumerate(shape) if size.dim_value <= 0 and tensor.shape[a] > 1}
        for shape, tensor in zip(sizes, tensors, strict=True)
    )
    return axes if any(axes) else None
