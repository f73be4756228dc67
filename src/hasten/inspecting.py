"""What a network is made of and where its time goes on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.core import folder
from hasten.core.child import Child
from hasten.core.errors import Unsupported, UsageError
from hasten.measure import machine
from hasten.search.watch import Watch, Watcher, nobody

_LONGEST_S = 900.0
_ROOM_BYTES = 12 << 30


def inspect(
    model: str | Path, data: str | Path | None = None, *, batch: int = 1, threads: int = 0, watcher: Watcher = nobody
) -> dict[str, Any]:
    """Opens the network in a guarded child and times it layer by layer in ONNX Runtime.

    Args:
        model: a `.pt2` or `.onnx` file.
        data: real inputs; without it, random ones of the network's shapes.
        batch: rows of a call.
        threads: of one operator; 0 for all cores.
        watcher: is told the progress.

    Returns:
        {"model", "kind", "inputs", "outputs", "layers" (types and how many), "parameters", "macs" (of one example), "fixed_batch",
        "notes", "times" (`hasten.measure.layers.LayerTimes`, or null with the `reason`), "hints" (`hasten.advice.Hint`),
        "metadata" (what hasten wrote into the file, or null), "environment"}.

    Raises:
        UsageError, ModelRefused, DataRefused: see `hasten.core.errors`.
    """
    if batch < 1 or threads < 0:
        raise UsageError(f"a batch size must be at least 1 and threads at least 0, got {batch} and {threads}")
    for path in (p for p in (model, data) if p is not None and not Path(p).exists()):
        raise UsageError(f"no such file: {path}")
    Watch(watcher=watcher).stage("inspect", "opening the network and timing its layers")
    asked: dict[str, Any] = {"model": str(model), "data": None if data is None else str(data), "batch": batch, "threads": threads}
    with Child(memory_bytes=_ROOM_BYTES) as child:
        found: Mapping[str, Any] = child.call("hasten.inspecting:_look", **asked, deadline_s=_LONGEST_S).value
    return {"model": str(model), **found, "environment": machine.environment()}


def show(found: Mapping[str, Any], console: Any) -> None:
    """Prints what `inspect` found."""
    from hasten.report import layers

    layers.show(found, console)


def write_page(found: Mapping[str, Any], file: Path) -> None:
    """Writes the HTML page of what `inspect` found."""
    from hasten.report import layers

    folder.write(file, layers.page(found))


def _look(*, model: str, data: str | None, batch: int, threads: int) -> dict[str, Any]:
    """In a child."""
    from hasten.advice import advice
    from hasten.engines import labels
    from hasten.engines.profiling import layer_times
    from hasten.load import files, lower
    from hasten.load.data import read
    from hasten.measure import counts

    given = None if data is None else read(data).view
    network = files.open_network(Path(model), None if given is None else given.take(slice(0, 4)).inputs)
    facts = files.summarize(network) | {"macs": counts.macs(network), "times": None, "reason": None, "hints": []}
    facts["metadata"] = labels.read(Path(model))
    try:
        times = layer_times(lower.lower(network), None if given is None else given.inputs, batch=batch, threads=threads)
    except Unsupported as why:
        return facts | {"reason": str(why)}
    return facts | {"times": times.to_json(), "hints": [hint.to_json() for hint in advice(times)]}
