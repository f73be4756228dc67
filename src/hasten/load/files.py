"""Any model file → Network, and what can be said of it at first sight.

These functions read what strangers wrote and run it: call them in a guarded child process.
"""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from hasten.core.errors import DataRefused, ModelRefused, Unsupported, UsageError
from hasten.core.network import Arrays, Network
from hasten.load import calling
from hasten.load.archive import open_program
from hasten.load.fitting import fitted, open_axes, program_inputs
from hasten.load.graphs import graph_inputs, open_graph, pinned
from hasten.load.guards.places import room_for
from hasten.load.kinds import kind_of
from hasten.load.lengths import with_open_lengths
from hasten.load.lift import lift
from hasten.load.lower import TOLERANCE, forward, other_batch, reason, relative_difference, run_graph, shorter
from hasten.load.naming import graph_in_order, module_in_order, said
from hasten.load.plain import copied, settled, unwrapped
from hasten.load.source import Source
from hasten.load.turning import batch_first, in_kept_types, outputs_batch_first, outputs_of_one

_SAME = 1e-3


def open_network(model: str | Path | Source, example: Arrays | None = None, names: Sequence[str] = ()) -> Network:
    """The network that lies at a path, with `example` as its example batch, or one made up from the shapes in the file.

    A made-up example is normal noise, and zeros and ones for integers. A network that was exported for one batch size that
    could not be freed has that size as `fixed_batch`, and its example is cut to it. What comes as an ONNX graph becomes a module
    where the importer takes it and gives what ONNX Runtime gives on the example; else it stays a graph, and `notes` says why.

    Args:
        model: see `Source`; a Python file is the user's own code and is run, no code runs from any other file.
        example: one array per input.
        names: of these arrays. A network of Python code gets them by keyword where its `forward` has such arguments; the inputs of a
            `.pt2` or of a graph are put in their order where they have the same names.

    Raises:
        UsageError: if there is no such file.
        ModelRefused: if it is of another kind, damaged, or does not run.
        BackendMissing: if reading it takes a package that is not here.
        DataRefused: if the example does not fit the inputs.
    """
    source = Source.of(model)
    path = Path(source.path)
    kind = "script" if source.is_script else kind_of(path)
    if source.pins and kind in ("script", "program", "huggingface"):
        raise UsageError(f"inputs of ONNX, TorchScript, Keras and TensorFlow files can be pinned, not those of {source}")
    if kind == "script":
        return _scripted(source, example, names)
    if kind == "huggingface":
        from hasten.load.huggingface import open_folder

        return check_forward(open_folder(path, example, names))
    if kind == "program":
        return check_forward(_lifted(open_program(path), example, names))
    if kind == "torchscript":
        from hasten.load.torchscript import open_script

        return check_forward(_lifted(open_script(path, example, source.pins), example))
    if kind == "onnx":
        return _graph(open_graph(path), source, example, names)
    from hasten.load.frameworks import to_graph

    return _graph(to_graph(path, kind), source, example, names)


def _scripted(source: Source, example: Arrays | None, names: Sequence[str]) -> Network:
    from hasten.load.script import from_script
    from hasten.load.weights import fill, read_weights

    module = from_script(Path(source.path), source.name)
    notes: tuple[str, ...] = (f"no weights were given: those that {source} comes with are taken",)
    if source.weights is not None:
        notes = fill(module, read_weights(Path(source.weights)), Path(source.weights).name)
    if example is None:
        raise DataRefused(f"{source} does not say the sizes of its inputs; give data")
    return replace(from_module(module, example, names), notes=notes)


def _lifted(program: torch.export.ExportedProgram, example: Arrays | None, names: Sequence[str] = ()) -> Network:
    body = lift(program)
    inputs, sizes = program_inputs(program)
    notes: tuple[str, ...] = ()
    if len(inputs) == len(names) and (order := module_in_order(body, names)):
        inputs, sizes = tuple(inputs[at] for at in order), tuple(sizes[at] for at in order)
        notes = (said(names),)
    fixed = body.meta["fixed_batch"]
    if fixed is None:
        inputs = tuple(replace(i, shape=(None, *i.shape[1:])) for i in inputs)
    rows = fitted(inputs, sizes, fixed, example)
    return Network(kind="module", body=body, example=rows, fixed_batch=fixed, open_axes=open_axes(inputs), notes=notes)


def _graph(body: onnx.ModelProto, source: Source, example: Arrays | None, names: Sequence[str]) -> Network:
    body, notes = batch_first(pinned(body, source.pins))
    notes += graph_in_order(body, names)
    body, cast = in_kept_types(body)
    notes += cast
    inputs = graph_inputs(body)
    firsts = {i.shape[0] for i in inputs}
    fixed = firsts.pop() if len(firsts) == 1 else None
    rows = fitted(inputs, tuple(i.shape for i in inputs), fixed, example)
    if fixed in (None, 1):
        body, more = _tried(body, rows, one=fixed == 1)
        notes += more
    network = Network(kind="graph", body=body, example=rows, fixed_batch=fixed, open_axes=open_axes(inputs), notes=notes)
    try:
        network = check_forward(network)
    except ModelRefused:
        if fixed is not None:
            raise
        rows = tuple(a[:1] for a in rows)
        body, more = _tried(body, rows, one=True)
        said = "the file leaves its batch open and takes one example only"
        network = check_forward(replace(network, body=body, example=rows, fixed_batch=1, notes=(*notes, said, *more)))
    found = imported(network)
    if found.kind == "module" or not any(network.open_axes):
        return found
    return _narrowed(network) or found


def _narrowed(network: Network) -> Network | None:
    """The network imported for the sizes of its example alone, or None: a condition or a size may hang on what the file leaves open."""
    graph = onnx.ModelProto()
    graph.CopyFrom(network.graph)
    weights = {i.name for i in graph.graph.initializer}
    taken = [i for i in graph.graph.input if i.name not in weights]
    for value, array, axes in zip(taken, network.example, network.open_axes, strict=True):
        for axis in axes:
            value.type.tensor_type.shape.dim[axis].dim_value = array.shape[axis]
    found = imported(replace(network, body=graph, open_axes=()))
    if found.kind == "graph":
        return None
    sizes = "; ".join(str(a.shape[1:]) for a in network.example)
    return replace(
        found, notes=(*found.notes, f"the file takes other sizes as well; here it is for {sizes} alone, else it could not be imported")
    )


def _tried(body: onnx.ModelProto, rows: Arrays, *, one: bool) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Outputs turned where running shows that their batch is another axis, or none; a graph that does not run is told of later."""
    try:
        return outputs_of_one(body, rows) if one else outputs_batch_first(body, rows, other_batch(rows))
    except Exception:  # onnxruntime's errors share no base class
        return body, ()


def open_in_room(model: str | Path | Source, example: Arrays | None = None, names: Sequence[str] = ()) -> Network:
    """`open_network` for a guarded child: with the memory and the time of `room_for`, on one thread.

    Processor time counts on every thread, and threads that wait for each other spin, so on one a second is a second anywhere.
    A Python file is the user's own code and may take what the child may.
    """
    import onnxruntime  # noqa: F401  what is imported here is no part of what the file takes
    import torch._dynamo

    from hasten.load import importer  # noqa: F401

    source = Source.of(model)
    if source.is_script:
        return open_network(source, example, names)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with room_for(*source.files(), example_bytes=sum(a.nbytes for a in example or ())):
            return open_network(source, example, names)
    finally:
        torch.set_num_threads(threads)


def imported(network: Network) -> Network:
    """A graph as the module that the importer makes of it, with the graph as its `source`.

    It stays a graph with a note where it cannot be imported, or where the module fails or an output of it differs from ONNX Runtime's on
    the example, on one row more, or on other sizes along open axes: max |graph − module| ≤ 1e-4 · max |graph|. What ONNX Runtime makes of
    integers may differ from what the file says (its kernels round the other way now and then, and saturate on processors without 8-bit
    dot products); there the graph is run as it is written, and a note tells the difference.
    """
    from hasten.load.importer import to_module

    sizes = [network.example] if network.fixed_batch else [network.example, other_batch(network.example)]
    sizes += [shorter(network)] if any(network.open_axes) else []
    try:
        made = replace(to_module(network), fixed_batch=network.fixed_batch, source=network.graph, notes=network.notes)
        apart = max(_difference(network, made, example) for example in sizes)
    except Unsupported as why:
        note = f"it stays an ONNX graph, so only what works on graphs is tried: {why}"
        return replace(network, notes=(*network.notes, note))
    if apart <= TOLERANCE:
        return made
    said = f"imported as the file is written; ONNX Runtime's own kernels differ by {apart:.2g} of the largest output"
    return replace(made, notes=(*made.notes, said))


def _difference(network: Network, made: Network, example: Arrays) -> float:
    """The largest difference from the graph as ONNX Runtime likes to run it. Raises Unsupported where it is none of running it so."""
    wanted = forward(network, example)
    try:
        got = forward(made, example)
    except Exception as why:  # what torch raises is of any class
        raise Unsupported(f"the imported network does not run on inputs of shape {[a.shape for a in example]}: {reason(why)}") from why
    apart = _apart(wanted, got)
    if max(apart) <= TOLERANCE:
        return max(apart)
    try:
        written = _apart(run_graph(network.graph, example, as_written=True), got)
    except Exception:  # onnxruntime's errors share no base class; a few operators have optimized kernels only
        written = apart
    for i, difference in enumerate(written):
        if difference > TOLERANCE:
            raise Unsupported(f"output {i} of the imported network must equal ONNX Runtime's to {TOLERANCE} of its largest, and does not")
    return max(apart)


def _apart(wanted: Arrays, got: Arrays) -> list[float]:
    """The relative difference of each output, infinite where one is of another shape or type or NaN."""
    if len(wanted) != len(got):
        return [math.inf]
    same = [a.shape == b.shape and a.dtype == b.dtype for a, b in zip(wanted, got, strict=True)]
    found = [relative_difference(a, b) if alike else math.inf for a, b, alike in zip(wanted, got, same, strict=True)]
    return [math.inf if math.isnan(d) else d for d in found]


def from_module(module: nn.Module, example: Any, names: Sequence[str] = ()) -> Network:
    """A copy of a user's module in eval mode on the CPU. The length of token ids is left open where it takes others; see `lengths`.

    What only wraps a network (torch.compile, DataParallel, an average of weights) is taken off, and a ScriptModule is opened like its
    file. Weights that are computed from others (weight norm, spectral norm, parametrizations) become plain ones and bfloat16 becomes
    float32; a note says so.

    Args:
        module: is left alone.
        example: a batch: an array or tensor; a tuple or list with one argument of `forward` each; a mapping with its
            keywords. Arguments may be dicts, tuples and lists themselves; their leaves are the inputs of the network, in order.
        names: of the leaves of a flat example. They are given by keyword where `forward` has such arguments.

    Raises:
        ModelRefused: if it cannot be copied, or does not run on the example.
        DataRefused: if an input is no array.
    """
    module = unwrapped(module)
    leaves, (args, kwargs) = calling.arranged(module, example, names)
    try:
        arrays = tuple(a.detach().cpu().numpy() if isinstance(a, Tensor) else np.asarray(a) for a in leaves)
    except TypeError as why:
        raise DataRefused(f"expected inputs that numpy can hold, got one it cannot ({why}); give float32") from why
    if not arrays or any(a.dtype == object or a.ndim == 0 or len(a) == 0 for a in arrays):
        raise DataRefused(f"expected one array per input with at least one row, got {[a.shape for a in arrays]}")
    if isinstance(module, torch.jit.ScriptModule):
        return _from_script(module, arrays)
    try:
        own, notes = settled(copied(module).cpu())
    except Exception as why:  # a user's class can raise anything
        raise ModelRefused(f"{type(module).__name__} cannot be copied: {reason(why)}") from why
    network = Network(kind="module", body=calling.called(own, args, kwargs), example=arrays, notes=notes)
    return with_open_lengths(check_forward(network))


def _from_script(module: torch.jit.ScriptModule, example: Arrays) -> Network:
    from hasten.load.torchscript import open_script

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{module.original_name}.pt"
        module.save(str(path))
        return check_forward(_lifted(open_script(path, example), example))


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
            turned = f"; they seem to lie on axis {output.shape.index(rows)}, put them first" if rows in output.shape[1:] else ""
            raise ModelRefused(f"output {i} must have one row for each of {rows} examples, got shape {output.shape}{turned}")
        if output.dtype.kind == "f" and np.isnan(output).any():
            raise ModelRefused(f"output {i} must be numbers, got NaN on the example")
    if any(network.open_axes) and not _runs(network, shorter(network)):
        network = replace(
            network, open_axes=(), notes=(*network.notes, "it says that it takes other sizes, and runs on the example's only")
        )
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


def _runs(network: Network, example: Arrays) -> bool:
    try:
        forward(network, example)
    except Exception:  # any error means that this size does not work
        return False
    return True


def _same_on_more(network: Network, given: Arrays) -> bool:
    rows = len(network.example[0])
    try:
        more = forward(network, other_batch(network.example))
    except Exception:  # any error means that this size does not work
        return False
    still = [i for i, (a, b) in enumerate(zip(given, more, strict=True)) if len(a) == len(b)]
    if still and len(still) < len(given):  # as the states of stacked layers that an LSTM gives out
        raise ModelRefused(
            f"output {still[0]} has {rows} rows for {rows} examples and for {rows + 1}: its first axis is not that of the examples; "
            "give it out with the examples first, or leave it out"
        )
    return all(len(b) == rows + 1 and relative_difference(a, b[:rows]) <= _SAME for a, b in zip(given, more, strict=True))
