"""Any model file → Network, and what can be said of it at first sight.

These functions read what strangers wrote and run it: call them in a guarded child process.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.core.errors import DataRefused, ModelRefused, Unsupported, UsageError
from hasten.core.network import Arrays, Network
from hasten.load.archive import open_program
from hasten.load.batch import random_tensor
from hasten.load.graphs import Input, graph_inputs, open_graph
from hasten.load.guards.places import room_for
from hasten.load.lift import lift
from hasten.load.lower import TOLERANCE, forward, other_batch, reason, relative_difference

TAKES = "hasten takes .pt2, .onnx, or an nn.Module from Python"
_HINTS = {
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".ptl", ".torchscript"), "PyTorch"),
    ".safetensors": "safetensors",
    **dict.fromkeys((".keras", ".h5", ".hdf5"), "Keras"),
    **dict.fromkeys((".pb", ".tflite"), "TensorFlow"),
}
_ROWS = 2
_MOST_MADE_UP = 2**24  # elements; a file must not ask for memory by its shapes alone
_SAME = 1e-3


def open_network(path: str | Path, example: Arrays | None = None) -> Network:
    """The network in a `.pt2` or `.onnx` file, with `example` as its example batch, or one made up from the shapes in the file.

    A made-up example is normal noise, and zeros and ones for integers. A network that was exported for one batch size that
    could not be freed has that size as `fixed_batch`, and its example is cut to it. An `.onnx` file becomes a module where the
    importer takes it and gives what ONNX Runtime gives on the example; else it stays a graph, and `notes` says why.

    Raises:
        UsageError: if there is no such file.
        ModelRefused: if it is of another kind, damaged, or does not run; no code from the file runs.
        DataRefused: if the example does not fit the inputs.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    if path.suffix == ".pt2":
        program = open_program(path)
        body: Any = lift(program)
        inputs, sizes = _program_inputs(program)
        fixed = body.meta["fixed_batch"]
        if fixed is None:
            inputs = tuple(replace(i, shape=(None, *i.shape[1:])) for i in inputs)
        network = Network(kind="module", body=body, example=_fitted(inputs, sizes, fixed, example), fixed_batch=fixed)
    elif path.suffix == ".onnx":
        body = open_graph(path)
        inputs = graph_inputs(body)
        firsts = {i.shape[0] for i in inputs}
        fixed = firsts.pop() if len(firsts) == 1 else None
        sizes = tuple(i.shape for i in inputs)
        network = Network(kind="graph", body=body, example=_fitted(inputs, sizes, fixed, example), fixed_batch=fixed)
        return imported(check_forward(network))
    else:
        raise ModelRefused(_another_kind(path))
    return check_forward(network)


def open_in_room(path: str | Path, example: Arrays | None = None) -> Network:
    """`open_network` for a guarded child: with the memory and the time of `room_for`, on one thread.

    Processor time counts on every thread, and threads that wait for each other spin, so on one a second is a second anywhere.
    """
    import onnxruntime  # noqa: F401  what is imported here is no part of what the file takes
    import torch._dynamo

    from hasten.load import importer  # noqa: F401

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with room_for(path, example_bytes=sum(a.nbytes for a in example or ())):
            return open_network(path, example)
    finally:
        torch.set_num_threads(threads)


def imported(network: Network) -> Network:
    """A graph as the module that the importer makes of it, with the graph as its `source`.

    It stays a graph with a note where it cannot be imported, or where an output of the module differs from ONNX Runtime's on the
    example: max |graph − module| ≤ 1e-4 · max |graph|.
    """
    from hasten.load.importer import to_module

    try:
        made = replace(to_module(network), fixed_batch=network.fixed_batch, source=network.graph)
        for given, example in ((network, network.example), (network, other_batch(network.example)))[: 1 if network.fixed_batch else 2]:
            _agree(forward(given, example), forward(made, example))
    except Unsupported as why:
        note = f"it stays an ONNX graph, so only what works on graphs is tried: {why}"
        return replace(network, notes=(*network.notes, note))
    return made


def _agree(wanted: Arrays, got: Arrays) -> None:
    for i, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype or not relative_difference(a, b) <= TOLERANCE:
            raise Unsupported(f"output {i} of the imported network must equal ONNX Runtime's to {TOLERANCE} of its largest, and does not")


def from_module(module: nn.Module, example: Sequence[Any] | Tensor | np.ndarray[Any, Any]) -> Network:
    """A copy of a user's module in eval mode on the CPU. `example`: a batch, as one array or tensor per input of `forward`.

    Raises:
        ModelRefused: if it cannot be copied, or does not run on the example.
        DataRefused: if an input is no array.
    """
    given = (example,) if isinstance(example, (Tensor, np.ndarray)) else tuple(example)
    try:
        arrays = tuple(a.detach().cpu().numpy() if isinstance(a, Tensor) else np.asarray(a) for a in given)
    except TypeError as why:
        raise DataRefused(f"expected inputs that numpy can hold, got one it cannot ({why}); give float32") from why
    if not arrays or any(a.dtype == object or a.ndim == 0 or len(a) == 0 for a in arrays):
        raise DataRefused(f"expected one array per input with at least one row, got {[a.shape for a in arrays]}")
    try:
        own = copy.deepcopy(module).eval().cpu()
    except Exception as why:  # a user's class can raise anything
        raise ModelRefused(f"{type(module).__name__} cannot be copied: {reason(why)}") from why
    return check_forward(Network(kind="module", body=own, example=arrays))


def check_forward(network: Network) -> Network:
    """Runs the network on its example and on one row more; with `fixed_batch` set where only the example's size works.

    A network whose first rows change with the number of rows counts as one that takes a single size.

    Raises:
        ModelRefused: if it raises, gives NaN, no output, or not one row per example.
    """
    try:
        given = forward(network, network.example)
    except Exception as why:  # a user's class can raise anything
        shapes = ", ".join(str(a.shape) for a in network.example)
        raise ModelRefused(f"the network does not run on inputs of shape {shapes}: {reason(why)}") from why
    rows = len(network.example[0])
    if not given:
        raise ModelRefused("expected a network that gives at least one tensor, got none")
    for i, output in enumerate(given):
        if output.ndim == 0 or len(output) != rows:
            raise ModelRefused(f"output {i} must have one row for each of {rows} examples, got shape {output.shape}")
        if output.dtype.kind == "f" and np.isnan(output).any():
            raise ModelRefused(f"output {i} must be numbers, got NaN on the example")
    if network.fixed_batch is not None or _same_on_more(network, given):
        return network
    return replace(network, fixed_batch=rows)


def summarize(network: Network) -> dict[str, Any]:
    """The network as JSON: kind, inputs, outputs (shape, dtype), layers by type, parameters, fixed_batch, notes."""
    if network.kind == "module":
        leaves = [m for m in network.module.modules() if not any(True for _ in m.children()) and type(m) is not nn.Module]
        layers = Counter(type(m).__name__ for m in leaves)
        parameters = sum(p.numel() for p in network.module.parameters())
        notes = [*network.notes, *getattr(network.module, "meta", {}).get("notes", ())]
    else:
        layers = Counter(node.op_type for node in network.graph.graph.node if node.op_type != "Constant")
        parameters = sum(int(np.prod(i.dims)) for i in network.graph.graph.initializer if i.data_type in (1, 10, 11, 16))
        notes = list(network.notes)
    return {
        "kind": network.kind,
        "inputs": [_said(a, network) for a in network.example],
        "outputs": [_said(a, network) for a in forward(network, network.example)],
        "layers": dict(sorted(layers.items())),
        "parameters": parameters,
        "fixed_batch": network.fixed_batch,
        "notes": notes,
    }


def _said(array: np.ndarray[Any, Any], network: Network) -> dict[str, Any]:
    return {"shape": [network.fixed_batch or "batch", *array.shape[1:]], "dtype": str(array.dtype)}


def _same_on_more(network: Network, given: Arrays) -> bool:
    rows = len(network.example[0])
    try:
        more = forward(network, other_batch(network.example))
    except Exception:  # any error means that this size does not work
        return False
    return all(len(b) == rows + 1 and relative_difference(a, b[:rows]) <= _SAME for a, b in zip(given, more, strict=True))


def _another_kind(path: Path) -> str:
    kind = _HINTS.get(path.suffix.lower())
    came = f"a {kind} file" if kind else f"a file named *{path.suffix}" if path.suffix else "a file without an ending"
    how = 'in PyTorch write torch.export.save(torch.export.export(model, (x,)), "model.pt2")'
    if kind in ("Keras", "TensorFlow"):
        how = "convert it to .onnx (tf2onnx, or model.export in Keras)"
    return f"{TAKES}, got {path.name}, {came}; {how}"


def _program_inputs(program: torch.export.ExportedProgram) -> tuple[tuple[Input, ...], tuple[tuple[int | None, ...], ...]]:
    """The inputs of a program, None for an axis of any size, and the sizes that it was exported with."""
    wanted = set(program.graph_signature.user_inputs)
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in wanted]
    names = [n.name for n in program.graph.nodes if n.op == "placeholder" and n.name in wanted]
    inputs, sizes = [], []
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, Tensor):
            continue
        shape = tuple(s if isinstance(s, int) else None for s in value.shape)
        dtype = torch.empty(0, dtype=value.dtype)
        if value.dtype == torch.bfloat16:
            raise ModelRefused(f"input {name} must be of a type that numpy has, got bfloat16; export the model in float32")
        inputs.append(Input(name=name, shape=shape, dtype=dtype.numpy().dtype))
        sizes.append(tuple(s if isinstance(s, int) else s.node.hint for s in value.shape))
    return tuple(inputs), tuple(sizes)


def _fitted(inputs: tuple[Input, ...], sizes: tuple[tuple[int | None, ...], ...], fixed: int | None, example: Arrays | None) -> Arrays:
    """The example, or one made up, cut to the batch size that is fixed; refused where it does not fit."""
    if example is None:
        return _made_up(inputs, sizes, fixed)
    expected = "; ".join(str(i) for i in inputs)
    came = "; ".join(f"{a.dtype} {a.shape}" for a in example)
    if len(example) != len(inputs):
        raise DataRefused(f"the network takes {len(inputs)} inputs ({expected}), got {len(example)} ({came})")
    if fixed is not None:
        if len(example[0]) < fixed:
            raise DataRefused(f"the network takes batches of exactly {fixed}, got {len(example[0])} rows; give more, or export it again")
        example = tuple(a[:fixed] for a in example)
    for one, array in zip(inputs, example, strict=True):
        fits = len(array.shape) == len(one.shape) and all(s in (None, a) for s, a in zip(one.shape, array.shape, strict=True))
        if not fits or array.dtype != one.dtype:
            raise DataRefused(f"input {one.name} must be {one}, got {array.dtype} {array.shape}")
    return example


def _made_up(inputs: tuple[Input, ...], sizes: tuple[tuple[int | None, ...], ...], fixed: int | None) -> Arrays:
    generator = torch.Generator().manual_seed(0)
    arrays = []
    for one, size in zip(inputs, sizes, strict=True):
        shape = [fixed or _ROWS, *(int(s) for s in size[1:] if s is not None)]
        if any(s is None for s in size[1:]) or math.prod(shape) > _MOST_MADE_UP:
            raise DataRefused(f"input {one.name} is {one}: sizes that are open or this large must come from data; give some")
        dtype = torch.from_numpy(np.empty(0, one.dtype)).dtype
        arrays.append(random_tensor(shape, dtype, generator).numpy())
    return tuple(arrays)
