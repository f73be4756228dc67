"""Where the time of a call goes, measured by ONNX Runtime's profiler and brought back to the layers of the graph.

The profiler tells times per node of the graph as the engine rewrote it: fused, renamed, in other layouts. A node of that graph is
anchored at the node of the given graph whose output it computes; nodes that left no trace were fused into a neighbour. The
profiler's own cost, about the same for every node, is found by timing the call without it, and taken off.
"""

from __future__ import annotations

import ast
import json
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.core.child import Child
from hasten.core.errors import Unsupported
from hasten.core.network import Arrays, Network
from hasten.engines import settings
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.measure import counts, layers
from hasten.measure.layers import Ceiling, Layer, LayerTimes

if TYPE_CHECKING:
    import onnx

_DEADLINE_S = 300.0
_BLOCK_S = 0.3
_WARM_UP = 3
_TICK_MS = 0.5e-3  # the profiler cuts every duration to whole microseconds: half of one is lost on the average
_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter writes down the modules that a node came from
# What is no work of its own where it moves nothing, and what a fusion swallows together with the node in front of it.
_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape"})
_FOLLOWERS = frozenset({"Add", "Mul", "Relu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "LeakyRelu", "Tanh", "Gelu", "Elu"})
_SIDE = 384  # of the matrices that the ceilings are measured with: their product ends before another process gets the core


def layer_times(network: Network, inputs: Arrays | None = None, *, batch: int = 1, threads: int = 0) -> LayerTimes:
    """The time of one call in ONNX Runtime, layer by layer, beside the least that this machine allows for each.

    Measured in a process of its own: the median of the calls without a profiler, and of each layer with it, in turns.

    Args:
        network: a graph. Nodes without a name, or with that of another, are called by operator and place.
        inputs: real inputs, one array per input; the network's example without them. Rows are repeated up to `batch`.
        batch: rows of a call; a network that is fixed to a batch size is measured at that one.
        threads: of one operator; 0 for all cores.

    Raises:
        Unsupported: where ONNX Runtime does not run the graph.
        ChildFailed: where it crashes or hangs.
    """
    engine = OnnxRuntime(threads=threads)
    rows = network.fixed_batch or batch
    given = [np.ascontiguousarray(a[np.arange(rows) % len(a)]) for a in inputs or network.example]
    with tempfile.TemporaryDirectory(prefix="hasten-") as folder, Child() as child:
        engine.pack(network, Path(folder))
        found = child.call(
            "hasten.engines.profiling:_measure", *given, folder=folder, threads=settings.resolve(threads), deadline_s=_DEADLINE_S
        ).value
    return LayerTimes.from_json(found)


def _measure(*inputs: np.ndarray[Any, Any], folder: str, threads: int) -> dict[str, Any]:
    """In a child."""
    import onnx
    import torch

    torch.set_num_threads(threads)
    model = onnx.load(Path(folder) / "model.onnx")
    _name(model)
    sizes, macs = counts.tensors(model, inputs), counts.node_macs(model, inputs)
    if sizes is None:
        raise Unsupported("ONNX Runtime does not run this graph on its example")
    onnx.save(model, Path(folder) / "model.onnx")
    call_ms, profiled, calls = _race(Path(folder), inputs, threads)
    optimized = onnx.load(Path(folder) / "optimized.onnx")
    groups = _groups(model.graph, optimized.graph)
    spent: dict[int, float] = defaultdict(float)
    costs, cost = layers.without_profiler(np.array([ms for _, ms in profiled]), call_ms)
    home = {node.name: anchor for node, anchor in zip(optimized.graph.node, _anchors(model.graph, optimized.graph), strict=True)}
    for (name, _), ms in zip(profiled, costs, strict=True):
        spent[home[name]] += float(ms)
    ceiling = _ceiling(_footprint(model.graph, sizes), threads)
    integers = {home[n.name] for n in optimized.graph.node if _on_integers(n.op_type)}
    rows = [
        _layer(model, groups[anchor], ms, call_ms, sizes, macs, ceiling, anchor in integers)  # in the order of the given graph
        for anchor, ms in sorted(spent.items())
    ]
    return LayerTimes(
        engine="OnnxRuntime" + ("" if threads == settings.resolve(0) else f"(threads={threads})"),
        threads=threads,
        batch=len(inputs[0]),
        call_ms=call_ms,
        rest_ms=max(0.0, call_ms - sum(spent.values())),
        calls=calls,
        profiler_ms=cost,
        ceiling=ceiling,
        layers=tuple(rows),
    ).to_json()


def _name(model: onnx.ModelProto) -> None:
    """Gives every node a name of its own."""
    taken: set[str] = set()
    for place, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{place}"
        taken.add(node.name)


def _race(folder: Path, inputs: Arrays, threads: int) -> tuple[float, list[tuple[str, float]], int]:
    """Blocks of calls with and without the profiler in turns; the median call without, and the time of each node with it."""
    plain, watched = (_session(folder, threads, profile=profile) for profile in (False, True))
    given = dict(zip([i.name for i in plain.get_inputs()], inputs, strict=True))
    for session in (plain, watched):
        _block(session, given, _WARM_UP)
    calls = int(np.clip(_BLOCK_S / max(float(_block(plain, given, _WARM_UP).min()), 1e-6), 5, 400))
    times, kept = [], [False] * _WARM_UP
    for session in (plain, watched, watched, plain):
        _block(session, given, _WARM_UP)  # the other's threads may still spin
        block = _block(session, given, calls)
        if session is plain:
            times.append(block)
        else:
            kept += [False] * _WARM_UP + [True] * calls
    events = json.loads(Path(watched.end_profiling()).read_text())
    nodes = {n.name for n in _load(folder / "optimized.onnx").graph.node}
    runs: dict[tuple[str, str], list[int]] = defaultdict(list)
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"] and name in nodes:  # not what lies inside a loop or a branch
            runs[name, event["args"].get("node_index", "")].append(event["dur"])
    return (
        float(np.median(np.concatenate(times))) * 1e3,
        [(name, _typical(durations, kept)) for (name, _), durations in runs.items()],
        2 * calls,
    )


def _typical(durations: list[int], kept: list[bool]) -> float:
    """Milliseconds: the mean of the middle half, which is finer than the microsecond that a median would end on."""
    times = np.sort(np.array(durations)[np.array(kept)[-len(durations) :]]) / 1e3
    return float(times[len(times) // 4 : len(times) - len(times) // 4].mean()) + _TICK_MS


def _session(folder: Path, threads: int, *, profile: bool) -> Any:
    """As `load.py` opens it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def _block(session: Any, given: dict[str, Any], calls: int) -> np.ndarray[Any, Any]:
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        session.run(None, given)
        times.append(time.perf_counter_ns() - start)
    return np.array(times) / 1e9


def _load(file: Path) -> onnx.ModelProto:
    import onnx

    return onnx.load(file, load_external_data=False)


def _anchors(given: onnx.GraphProto, optimized: onnx.GraphProto) -> list[int]:
    """For each node of the optimized graph, the place of the given node that it does the work of.

    Known by the tensor that it gives; by its own name; by the tensor in its name, which ONNX Runtime's blocked layout writes there;
    else it is the node in front of it, or the first.
    """
    makers = {output: place for place, node in enumerate(given.node) for output in node.output if output}
    names = {node.name: place for place, node in enumerate(given.node)}
    found: dict[str, int] = {}
    anchors = []
    for node in optimized.node:
        known = [makers[o] for o in node.output if o in makers]
        blocked = node.name.removesuffix("_nchwc")
        before = [found[i] for i in node.input if i in found]
        at = known[0] if known else names.get(node.name, makers.get(blocked, max(before, default=0)))
        anchors.append(at)
        found.update(dict.fromkeys(node.output, at))
    return anchors


def _groups(given: onnx.GraphProto, optimized: onnx.GraphProto) -> dict[int, list[int]]:
    """The nodes of the given graph by the anchor that they were fused into.

    A node without an anchor of its own went into the one behind it (a convolution into its activation, a pair of quantizers into
    the integer operator), or, where it only follows one up (an addition in a blocked convolution), into the one in front.
    """
    anchored = set(_anchors(given, optimized))
    readers: dict[str, list[int]] = defaultdict(list)
    makers: dict[str, int] = {}
    for place, node in enumerate(given.node):
        for name in node.input:
            readers[name].append(place)
        makers.update(dict.fromkeys(node.output, place))
    home = {place: place for place in anchored}
    for place, node in enumerate(given.node):
        before = [makers[i] for i in node.input if makers.get(i) in anchored]
        if place not in home and node.op_type in _FOLLOWERS and before:
            home[place] = max(before)
    for place in reversed(range(len(given.node))):
        behind = [home[r] for o in given.node[place].output for r in readers[o] if r in home]
        if place not in home and behind:
            home[place] = min(behind)
    groups: dict[int, list[int]] = defaultdict(list)
    for place, anchor in sorted(home.items()):
        groups[anchor].append(place)
    return groups


def _layer(
    model: onnx.ModelProto,
    places: list[int],
    ms: float,
    call_ms: float,
    sizes: dict[str, tuple[counts.Shape, int]],
    macs: dict[int, int] | None,
    ceiling: Ceiling,
    integers: bool,
) -> Layer:
    nodes = [model.graph.node[p] for p in places]
    main = nodes[max(range(len(nodes)), key=lambda i: ((macs or {}).get(places[i], 0), i))]
    weights = counts.weights(model.graph)
    moved = _moved(model.graph, nodes, sizes)
    work = None if macs is None else sum(macs.get(p, 0) for p in places)
    floor, bound = (None, None) if work is None else ceiling.floor_ms(work, moved, integers=integers)
    return Layer(
        name=main.name,
        module=_module(main),
        kind=main.op_type,
        nodes=tuple(n.name for n in nodes),
        shape=sizes.get(nodes[-1].output[0], ((), 0))[0],
        parameters=sum(weights.get(name, 0) for name in {i for n in nodes for i in n.input}),
        macs=work,
        moved_bytes=moved,
        integers=integers,
        ms=ms,
        share=ms / call_ms,
        floor_ms=floor,
        bound=bound,
    )


def _moved(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], sizes: dict[str, tuple[counts.Shape, int]]) -> int:
    """Bytes of all tensors that cross the border of the fused nodes, each once. Of a table only the rows that are looked up."""
    if all(n.op_type in _VIEWS for n in nodes):
        return 0
    inside = {o for n in nodes for o in n.output}
    names = {id(n) for n in nodes}
    outside = {i for n in graph.node if id(n) not in names for i in n.input} | {o.name for o in graph.output}
    weights = {t.name for t in graph.initializer}
    tables = {n.input[0]: sizes.get(n.output[0], ((), 0))[1] for n in nodes if n.op_type == "Gather" and n.input[0] in weights}
    crossing = {i for n in nodes for i in n.input if i and i not in inside} | (inside & outside)
    return sum(tables.get(name, sizes.get(name, ((), 0))[1]) for name in crossing)


def _footprint(graph: onnx.GraphProto, sizes: dict[str, tuple[counts.Shape, int]]) -> int:
    """Bytes that a call touches: all weights, and twice the largest tensor between layers."""
    weights = {t.name for t in graph.initializer}
    between = [size for name, (_, size) in sizes.items() if name not in weights]
    return sum(sizes[name][1] for name in weights) + 2 * max(between, default=0)


def _module(node: onnx.NodeProto) -> str | None:
    """The path of the module that a weight of the node is named for, else what torch's exporter says."""
    for name in node.input:
        if named := re.fullmatch(r"(.+)\.(weight|kernel|gamma)", name):
            return named[1]
    said = next((p.value for p in node.metadata_props if p.key == _SCOPES), "[]")
    try:
        scopes = ast.literal_eval(said)
        inner = str(scopes[-2])
    except (ValueError, SyntaxError, TypeError, IndexError):  # a file from elsewhere may say anything there
        return None
    return inner if re.fullmatch(r"\w+(\.\w+)*", inner) and not inner.startswith("_") else None


def _on_integers(kind: str) -> bool:
    return kind.startswith(("QLinear", "QGemm", "DynamicQuantize")) or "Integer" in kind


def _ceiling(footprint: int, threads: int) -> Ceiling:
    """The fastest matrix products of ONNX Runtime and torch, and the bandwidth."""
    import torch

    a = torch.randn(_SIDE, _SIDE)
    floats = _product("MatMul", np.float32, threads)
    return Ceiling(
        float_macs_per_s=_SIDE**3 / min(floats, layers.best_s(lambda: a @ a)),
        integer_macs_per_s=_SIDE**3 / _product("MatMulInteger", np.uint8, threads),
        bytes_per_s=layers.bytes_per_s(footprint),
    )


def _product(kind: str, dtype: type, threads: int) -> float:
    """Seconds of one product of square matrices, the right one a constant."""
    import onnxruntime
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    integers = dtype is np.uint8
    right = rng.integers(-60, 60, (_SIDE, _SIDE)).astype(np.int8 if integers else np.float32)
    left: np.ndarray[Any, Any] = rng.integers(0, 120, (_SIDE, _SIDE)).astype(dtype)
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", "w"], ["y"])],
        kind,
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(left.dtype), left.shape)],
        [helper.make_tensor_value_info("y", 6 if integers else 1, left.shape)],
        [numpy_helper.from_array(right, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return layers.best_s(lambda: session.run(None, {"x": left}))
