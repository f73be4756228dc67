"""Module → graph: lowering to ONNX, checked by running both."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as tree

from hasten.core.errors import Unsupported
from hasten.core.network import Arrays, Network
from hasten.load.packing import packed_as_padded
from hasten.load.padding import keep_zeros
from hasten.load.recurrence import recurrent_by_shape, translations
from hasten.load.registry import read_once
from hasten.load.spelling import Spelled

if TYPE_CHECKING:
    import onnx

OPSET = 18  # what torch's exporter writes natively; every later one is its conversion
TOLERANCE = 1e-4
_EXPORTER_FOLDS = 8192  # elements
_AVERAGES = frozenset(getattr(torch.ops.aten, f"adaptive_avg_pool{axes}d").default for axes in (1, 2, 3))


def lower(network: Network) -> Network:
    """The network as an ONNX graph of operator set 18 that takes any batch size, or the one that the network is fixed to, and any
    size along its open axes.

    Inputs are called x, or x0, x1, …; outputs y, or y0, y1, …. The weights lie inside the model. The graph is run by ONNX
    Runtime on the example and on another batch size, and must give what the module gives: max |graph − module| ≤
    1e-4 · max |module| for each output. A network that is a graph already is returned as it is, and a module that was imported
    from a graph and not changed since becomes that graph again.

    Raises:
        Unsupported: naming what could not be exported, or the largest difference.
    """
    if network.kind == "graph":
        return network
    if network.source is not None:
        return network.with_body(network.source, kind="graph")
    graph = _export(network)
    for example in examples(network):
        _compare(network, graph, example)
    return network.with_body(graph, kind="graph")


def forward(network: Network, inputs: Arrays) -> Arrays:
    """What the network gives for `inputs`, in this process: torch for a module, ONNX Runtime for a graph. Nested outputs flat."""
    if network.kind == "graph":
        return run_graph(network.graph, inputs)
    with torch.no_grad():
        given = network.module(*(torch.from_numpy(np.ascontiguousarray(a)) for a in inputs))
    return tuple(leaf.numpy() for leaf in tree.tree_leaves(given) if isinstance(leaf, torch.Tensor))


def other_batch(example: Arrays) -> Arrays:
    """The example with one row more: its first row again at the end."""
    return tuple(np.concatenate([a, a[:1]]) for a in example)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing inside prints, logs or warns."""
    before = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def traced(network: Network, shapes: Any, *, strict: bool = False) -> torch.export.ExportedProgram:
    """What torch.export makes of the module.

    `strict` follows its bytecode too, and so leaves a batch open that the code makes a number of, as `len(x)` does.
    """
    with _tracing(), recurrent_by_shape():
        return torch.export.export(network.module, tensors(network, network.example), dynamic_shapes=shapes, strict=strict)


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """What is traced here is written in calls that exporters know."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # whose operator none of them knows
    try:
        with quiet(), torch.no_grad(), Spelled(), packed_as_padded():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def tensors(network: Network, example: Arrays) -> tuple[torch.Tensor, ...]:
    """In the float format of the weights."""
    found = tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in example)
    weights = next((p.dtype for p in network.module.parameters() if p.is_floating_point()), torch.float32)
    return tuple(a.to(weights) if a.is_floating_point() else a for a in found)


def _export(network: Network) -> onnx.ModelProto:
    try:
        graph = _written(network, _straightened(network.module))
        if not network.fixed_batch and _binds(graph):
            with contextlib.suppress(Exception):  # the exporter raises whatever its parts raise
                graph = _written(network, traced(network, dynamic_shapes(network), strict=True))
    except Exception as why:
        raise Unsupported(f"this network cannot be exported to ONNX: {reason(why)}") from why
    if (size := graph.ByteSize()) > 2**31 - 1:
        raise Unsupported(f"the exported ONNX model must stay below 2 GB to hold its weights, got {size / 1e9:.1f} GB")
    # onnxruntime's quantizers stop at shapes that name the batch differently from their own inference.
    del graph.graph.value_info[:]
    return graph


def _binds(graph: onnx.ModelProto) -> bool:
    """Whether an input takes one batch size only."""
    return any(dims[0].dim_value for i in graph.graph.input if (dims := i.type.tensor_type.shape.dim))


def _written(network: Network, body: nn.Module | torch.export.ExportedProgram) -> onnx.ModelProto:
    count, outputs = len(network.example), len(forward(network, network.example))
    with _tracing(), recurrent_by_shape(), read_once(), _Straight():
        program = torch.onnx.export(
            body,
            tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in network.example),
            dynamo=True,
            dynamic_shapes=dynamic_shapes(network),
            opset_version=OPSET,
            custom_translation_table=translations(),
            input_names=_names("x", count),
            output_names=_names("y", outputs),
            verbose=False,
        )
        assert program is not None
        _fold_weights(program.model)
        graph: onnx.ModelProto = program.model_proto
    keep_zeros(graph)
    return graph


class _Straight(TorchFunctionMode):
    """Averages over all positions see their input in the usual layout: of another one the exporter writes what becomes of its strides."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d):
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def _straightened(module: nn.Module) -> nn.Module:
    """The same for a graph of calls, on a copy that shares its weights."""
    if not isinstance(module, fx.GraphModule) or not any(n.target in _AVERAGES for n in module.graph.nodes):
        return module
    found = fx.GraphModule(module, copy.deepcopy(module.graph)).train(module.training)
    for node in [n for n in found.graph.nodes if n.target in _AVERAGES]:
        with found.graph.inserting_before(node):
            node.replace_input_with(node.args[0], found.graph.call_function(torch.ops.aten.contiguous.default, (node.args[0],)))
    found.recompile()
    return found


def dynamic_shapes(network: Network, *, named: bool = True) -> tuple[Any, ...] | None:
    """What torch.export is told of the axes that stay open: the batch by its name, others as the network itself relates them.

    A batch with a name may have no bounds; without one it gets those that the network sets, down to a single size.
    """
    batch = {} if network.fixed_batch else {0: torch.export.Dim("batch") if named else torch.export.Dim.AUTO}
    open_axes = network.open_axes or ((),) * len(network.example)
    found = tuple({**batch, **dict.fromkeys(axes, torch.export.Dim.AUTO)} for axes in open_axes)
    return found if any(found) else None


def _fold_weights(model: Any) -> None:
    """Computes what depends on weights alone, such as the gates of an LSTM in another order; the exporter leaves large ones."""
    from onnxscript import optimizer

    largest = max((w.const_value.size for w in model.graph.initializers.values() if w.const_value is not None), default=0)
    if largest > _EXPORTER_FOLDS:
        optimizer.optimize_ir(model, num_iterations=1, onnx_shape_inference=False, input_size_limit=largest, output_size_limit=largest)


def _names(letter: str, count: int) -> list[str]:
    return [letter] if count == 1 else [f"{letter}{i}" for i in range(count)]


def reason(why: BaseException) -> str:
    """The first telling line of the innermost error."""
    while why.__cause__ is not None:
        why = why.__cause__
    lines = [line.strip() for line in str(why).splitlines() if line.strip()]
    return f"{type(why).__name__}: {lines[0][:300]}" if lines else type(why).__name__


def examples(network: Network) -> list[Arrays]:
    """What another form of a network is held against it on: its example, one row, one row more and other sizes, as far as they are open."""
    found = [network.example]
    if not network.fixed_batch:
        found += [tuple(a[:1] for a in network.example), other_batch(network.example)]
    return found + ([shorter(network)] if any(network.open_axes) else [])


def shorter(network: Network) -> Arrays:
    """The example with one entry less along every open axis that has more than two."""
    found = []
    for array, axes in zip(network.example, network.open_axes, strict=True):
        for axis in axes:
            array = np.take(array, range(max(array.shape[axis] - 1, min(2, array.shape[axis]))), axis)
        found.append(array)
    return tuple(found)


def _compare(network: Network, graph: onnx.ModelProto, example: Arrays) -> None:
    try:
        expected = forward(network, example)
    except Exception as why:  # a network can raise anything
        raise Unsupported(f"the network does not run on inputs of shape {[a.shape for a in example]}: {reason(why)}") from why
    try:
        given = run_graph(graph, example)
    except Exception as why:  # onnxruntime's errors share no base class
        raise Unsupported(f"ONNX Runtime cannot run the exported network on {len(example[0])} rows: {reason(why)}") from why
    for i, (a, b) in enumerate(zip(expected, given, strict=True)):
        if a.shape != b.shape:
            raise Unsupported(f"output {i} of the exported graph must have the module's shape {a.shape}, got {b.shape}")
        difference = relative_difference(a, b)
        tolerance = max(TOLERANCE, float(np.finfo(a.dtype).eps)) if a.dtype.kind == "f" else TOLERANCE
        if not difference <= tolerance:
            raise Unsupported(
                f"output {i} of the exported graph must equal the module's to {tolerance:.2g}, differs by {difference:.3g} of its largest"
            )


def relative_difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """max |a − b| / max |a|; 0 where both are empty or equal."""
    if a.size == 0 or np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
        return 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    same = ~np.isfinite(a) & ((a == b) | (np.isnan(a) & np.isnan(b)))
    a, b = np.where(same, 0.0, a), np.where(same, 0.0, b)
    return float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-30))


def run_graph(graph: onnx.ModelProto, inputs: Arrays, *, as_written: bool = False) -> Arrays:
    """What ONNX Runtime gives for `inputs`, in this process; `as_written`, node by node, where it would fuse them otherwise."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return tuple(session.run(None, dict(zip(names, inputs, strict=True))))
