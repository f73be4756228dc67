"""Opening an `.onnx` file without trusting it: checked, its weights read only from its own folder, and held in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model

from hasten.core.errors import ModelRefused, UsageError
from hasten.load.guards import plain_file
from hasten.load.guards.graphs import check_model, tensors
from hasten.load.lower import reason
from hasten.load.padding import keep_zeros

_LIMIT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of a network: shape with None where any size is taken, and numpy dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        axes = ["any" if s is None else str(s) for s in self.shape]
        return f"{self.dtype} ({', '.join(axes)}{',' if len(axes) == 1 else ''})"


def open_graph(path: Path) -> onnx.ModelProto:
    """The model in an `.onnx` file with all its weights inside, so that no engine reads another file for it.

    Raises:
        ModelRefused: if it is damaged, invalid, above 2 GB, names weights outside its own folder, or is refused by `check_model`.
    """
    if path.stat().st_size > _LIMIT:
        raise ModelRefused(f"{path.name} must be below 2 GB, got {path.stat().st_size / 1e9:.1f} GB")
    try:
        graph = onnx.load(path, load_external_data=False)
        check_model(graph)
        outside = _outside(graph, path.parent)
        if graph.ByteSize() + outside > _LIMIT:
            raise ModelRefused(f"{path.name} with its weights must be below 2 GB, got {(graph.ByteSize() + outside) / 1e9:.1f} GB")
        if outside:
            load_external_data_for_model(graph, str(path.parent))
            for tensor in tensors(graph):
                tensor.data_location = TensorProto.DEFAULT
                del tensor.external_data[:]
            check_model(graph)
        onnx.checker.check_model(graph)
        copy = onnx.load_from_string(graph.SerializeToString())
    except ModelRefused:
        raise
    except Exception as why:  # protobuf, the checker and the file system each raise their own
        raise ModelRefused(f"{path.name} is no ONNX model that can be read ({reason(why)}); export it again") from why
    keep_zeros(copy)
    return copy


def graph_inputs(graph: onnx.ModelProto) -> tuple[Input, ...]:
    """The inputs that a caller gives: initializers that are listed as inputs too are left out.

    Raises:
        ModelRefused: if there is none, or one of them is no tensor, or has no shape.
    """
    weights = {i.name for i in graph.graph.initializer}
    found = tuple(_input(i) for i in graph.graph.input if i.name not in weights)
    if not found:
        raise ModelRefused("expected a graph with at least one input, got none")
    return found


def pinned(graph: onnx.ModelProto, pins: Mapping[str, float]) -> onnx.ModelProto:
    """A copy whose inputs of these names hold one value for good; open axes of a pinned input have the size 1.

    Raises:
        UsageError: there is no such input.
    """
    if not pins:
        return graph
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    inputs = {i.name: i for i in copy.graph.input}
    for name, value in pins.items():
        if name not in inputs:
            raise UsageError(f"no input is named {name!r}; the inputs are {', '.join(inputs)}")
        tensor = inputs[name].type.tensor_type
        shape = [max(1, d.dim_value) for d in tensor.shape.dim]
        array = np.full(shape, value, helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        copy.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        copy.graph.input.remove(inputs[name])
    return copy


def _input(value: onnx.ValueInfoProto) -> Input:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape") or not tensor.shape.dim:
        raise ModelRefused(
            f"expected inputs that are tensors with a batch axis, got {value.name}, which is none; "
            f"where it is no data, pin it: --pin {value.name}=NUMBER"
        )
    shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim)
    return Input(name=value.name, shape=shape, dtype=np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)))


def _outside(graph: onnx.ModelProto, folder: Path) -> int:
    """Bytes of the weights that lie in other files, each of them a plain file of the model's own folder that holds them all."""
    files: dict[Path, int] = {}
    total = 0
    for tensor in tensors(graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        info = ExternalDataInfo(tensor)
        file = plain_file(folder, info.location)
        files[file] = file.stat().st_size
        start, length = info.offset or 0, info.length if info.length is not None else files[file]
        if start < 0 or length < 0 or start + length > files[file]:
            raise ModelRefused(f"expected {start + length} bytes of weights in {info.location!r}, got {files[file]}")
        total += length
    if total > sum(files.values()):
        raise ModelRefused(f"the model claims {total} bytes of weights in other files, which hold {sum(files.values())}: not opened")
    return total
