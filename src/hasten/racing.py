"""The engine race alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hasten import prepare
from hasten.core import folder
from hasten.core.child import Child, Reply
from hasten.core.data import View
from hasten.core.errors import ChildFailed, HastenError, Unsupported, UsageError
from hasten.core.network import Arrays, Network
from hasten.core.recipe import Engine, describe
from hasten.core.runner import Runner
from hasten.load.guards.places import room_for
from hasten.load.source import Source
from hasten.measure import machine, timing
from hasten.search.bench import check_alike, difference
from hasten.search.watch import Watch, Watcher, nobody

_PACKING_S = 1800.0
_SHORT = timing.Protocol(fewest=4, most=4)


def benchmark(
    model: str | Path | Source,
    data: str | Path | None = None,
    *,
    batches: Sequence[int] = (1, 32),
    every: bool = False,
    watcher: Watcher = nobody,
) -> dict[str, Any]:
    """Times the unchanged network in the engines that a search races and on the devices that are here, each in its own processes, all in
    the same rounds.

    Args:
        model: where the network lies: a path, "net.py:Class", or a `Source`.
        data: real inputs; without it, random ones of the network's shapes.
        batches: batch sizes.
        every: also the engines that take minutes to compile or convert (AOTInductor, ExecuTorch, LiteRT, a plain program), and a row
            with the reason for each device that is not here.
        watcher: is told the progress.

    Returns:
        {"engines": one row each with `engine`, and either `reason` or latencies, speed-up over the first and the largest
        difference of the outputs; "shapes", of the inputs behind the batch axis; "environment"}. An engine that fails has its reason and
        stops nothing. Sizes that the network leaves open, and the states that it is given, are timed as they come in the inputs.
    """
    if not batches or min(batches) < 1:
        raise UsageError(f"a batch size must be at least 1, got {list(batches)}")
    given = Source.of(model)
    if not Path(given.path).exists():
        raise UsageError(f"no such file: {given.path}")
    watch = Watch(watcher=watcher)
    watch.stage("load", "opening the network and packing it for each engine")
    with tempfile.TemporaryDirectory(prefix="hasten-") as name, Child() as child:
        source = None if data is None else str(data)
        here: dict[str, Any] = {"into": name, "model": given.to_json(), "data": source, "rows": max(batches), "every": every}
        opened = prepare.call(child, "hasten.racing:_pack_all", given.path, **here, deadline_s=_PACKING_S)
        rows, fixed = opened.value["rows"], opened.value["fixed_batch"]
        sizes = [fixed] if fixed else sorted(set(batches))
        running = _check(rows, Path(name), opened.arrays, fixed)
        contestants = [timing.Contestant(folder=Path(name) / str(rows.index(r)), fixed_batch=fixed) for r in running]
        if contestants:
            watch.stage("race", "timing the engines in turn")
            timed = timing.race(contestants, opened.arrays, sizes, protocol=_SHORT, progress=watch.progress)
            for at, row in enumerate(running):
                row["latency_ms"] = [entry.to_json() for entry in timed.latency(at)]
                row["speedup"] = [i.to_json() for i in timed.speedup(0, at)] if at else []
                row["peak_memory_bytes"] = timed.peak_memory_bytes[at]
    shapes = [list(a.shape[1:]) for a in opened.arrays]
    return {"model": str(given), "engines": rows, "shapes": shapes, "environment": machine.environment()}


def show(found: dict[str, Any], console: Any) -> None:
    """Prints the race as one table."""
    from rich.table import Table
    from rich.text import Text

    shapes = ", ".join("×".join(map(str, shape)) or "one number" for shape in found["shapes"])
    where = f"{found['environment']['cpu']}, {found['environment']['cores']} cores"
    table = Table(title=Text(f"{found['model']} on {where}; inputs of {shapes}"))
    for heading in ("engine", "batch", "p50 ms", "p95 ms", "× first (95 %)", "memory MB", "difference"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for row in found["engines"]:
        speed = {s["batch"]: f"{s['value']:.2f} ({s['low']:.2f}–{s['high']:.2f})" for s in row.get("speedup", [])}
        for entry in row.get("latency_ms", []):
            table.add_row(
                row["engine"],
                str(entry["batch"]),
                f"{entry['p50_ms']:.3g}",
                f"{entry['p95_ms']:.3g}",
                speed.get(entry["batch"], "1"),
                f"{row['peak_memory_bytes'] / 1e6:.0f}",
                f"{row['difference']:.1g}",
            )
    console.print(table)
    for row in found["engines"]:
        if row["reason"]:
            console.print(Text(f"{row['engine']}: {row['reason']}"))


def _check(rows: list[dict[str, Any]], place: Path, inputs: Arrays, fixed: int | None) -> list[dict[str, Any]]:
    """Launches each packed engine once; the rows of those that answer, the first one's outputs being the measure."""
    first: Arrays | None = None
    running = []
    for at, row in enumerate(rows):
        if row["reason"]:
            continue
        try:
            with Runner(place / str(at), fixed_batch=fixed) as runner:
                outputs = runner.outputs(inputs)
            first = first or outputs
            check_alike(first, outputs)
        except ChildFailed as why:
            row["reason"] = str(why)
            continue
        row["difference"] = difference(first, outputs)
        running.append(row)
    return running


def _pack_all(*, into: str, model: dict[str, Any], data: str | None, rows: int, every: bool = False) -> Reply:
    """In a child: opens the network and packs it for each engine; gives inputs, and the reason of each that cannot."""
    from hasten.load import files, lower
    from hasten.load.data import read

    loaded = None
    if data is not None:
        with room_for(data):
            loaded = read(data)
    given = None if loaded is None else loaded.view
    example = None if given is None else given.take(slice(0, 4)).inputs
    network = files.check_forward(files.open_in_room(Source(**model), example, loaded.names if loaded else ()))
    source = given or View(inputs=network.example)
    inputs = source.take(np.arange(network.fixed_batch or rows) % len(source)).inputs
    found = []
    graph = None
    for at, engine in enumerate(_contestants(network, every=every)):
        try:
            if engine.takes == "module" and network.kind == "graph":
                raise Unsupported(f"{describe(engine)} needs a torch module: {'; '.join(network.notes)}")
            if engine.takes == "graph":
                graph = graph or lower.lower(network)
            _pack(engine, graph if engine.takes == "graph" and graph else network, Path(into) / str(at))
            reason = None
        except HastenError as why:
            reason = str(why)
        found.append({"engine": describe(engine), "reason": reason})
    return Reply({"rows": found, "fixed_batch": network.fixed_batch}, inputs)


def _contestants(network: Network, *, every: bool) -> list[Engine]:
    """The engine that runs the network as given first, then the search's own, then what else there is: devices that are here, or all."""
    from hasten import engines, presets

    catalogue = presets.default(network.kind, imported=network.source is not None)
    usual = (catalogue.as_given, *catalogue.engines)
    kinds = {type(e) for e in usual}
    others = [e for e in engines.variants() if every or (type(e) in kinds and e.available() is None)]
    return list(dict.fromkeys([*usual, *others]))


def _pack(engine: Engine, network: Any, place: Path) -> None:
    if why := engine.available():
        raise ChildFailed(why)
    with folder.new_folder(place) as fresh:
        engine.pack(network, fresh)
