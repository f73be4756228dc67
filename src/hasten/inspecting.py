"""What a network is made of and where its time goes on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten import prepare
from hasten.core import folder
from hasten.core.child import Child
from hasten.core.errors import Unsupported, UsageError
from hasten.load.guards.places import room_for
from hasten.load.source import Source
from hasten.measure import machine
from hasten.search.watch import Watch, Watcher, nobody

_LONGEST_S = 900.0
_ROOM_BYTES = 12 << 30


def inspect(
    model: str | Path | Source, data: str | Path | None = None, *, batch: int = 1, threads: int = 0, watcher: Watcher = nobody
) -> dict[str, Any]:
    """Opens the network in a guarded child and times it layer by layer in ONNX Runtime.

    Args:
        model: anything that hasten opens; see `Source`.
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
    source = Source.of(model)
    for path in (p for p in (source.path, data) if p is not None and not Path(p).exists()):
        raise UsageError(f"no such file: {path}")
    Watch(watcher=watcher).stage("inspect", "opening the network and timing its layers")
    asked: dict[str, Any] = {"model": source.to_json(), "data": None if data is None else str(data), "batch": batch, "threads": threads}
    with Child(memory_bytes=_ROOM_BYTES) as child:
        found: Mapping[str, Any] = prepare.call(child, "hasten.inspecting:_look", source.path, **asked, deadline_s=_LONGEST_S).value
    return {"model": str(source), **found, "environment": machine.environment()}


def show(found: Mapping[str, Any], console: Any) -> None:
    """Prints what `inspect` found."""
    from hasten.report import layers

    layers.show(found, console)


def write_page(found: Mapping[str, Any], file: Path) -> None:
    """Writes the HTML page of what `inspect` found."""
    from hasten.report import layers

    folder.write(file, layers.page(found))


def _look(*, model: dict[str, Any], data: str | None, batch: int, threads: int) -> dict[str, Any]:
    """In a child."""
    from hasten.advice import advice
    from hasten.engines import labels
    from hasten.engines.profiling import layer_times
    from hasten.load import files, lower
    from hasten.load.data import read
    from hasten.measure import counts

    source, loaded = Source(**model), None
    if data is not None:
        with room_for(data):
            loaded = read(data)
    given = None if loaded is None else loaded.view
    example = None if given is None else given.take(slice(0, 4)).inputs
    network = files.open_in_room(source, example, loaded.names if loaded else ())
    facts = files.summarize(network) | {"macs": counts.macs(network), "times": None, "reason": None, "hints": []}
    facts["metadata"] = labels.read(Path(source.path))
    try:
        times = layer_times(lower.lower(network), None if given is None else given.inputs, batch=batch, threads=threads)
    except Unsupported as why:
        return facts | {"reason": str(why)}
    return facts | {"times": times.to_json(), "hints": [hint.to_json() for hint in advice(times)]}
