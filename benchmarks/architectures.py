"""Structured pruning on many architectures: which shrink, are exact, export, run in every engine, and match.

    python benchmarks/architectures.py [--quick] [--json] [--save] [--only NAME] [--compile]

Each network (small, random weights) loses half of every family of units. The smaller network must give what the whole one gives
with these units silenced; it is then lowered and run in each engine against eager PyTorch. `--compile` adds torch.compile, which
takes a quarter of a minute for each. `--save` also writes docs/architectures.md. Needs `hasten[architectures]`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
import zoo

from hasten.compress import PruneStructure
from hasten.compress.prune.structure import analyse
from hasten.core.data import View
from hasten.core.errors import HastenError
from hasten.core.network import Network
from hasten.core.recipe import Context, Engine
from hasten.core.runner import Runner
from hasten.engines import Eager, OnnxRuntime, OpenVINO, TorchCompile
from hasten.load.lower import forward, lower, quiet, relative_difference

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"
MATCH = 1e-3  # of the largest output, against eager PyTorch
QUICK = ("MLP", "ShuffleNet", "LSTM, 2 layers", "U-Net")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Prunes and runs every architecture."""
    makers = zoo.own() | ({} if options.quick else zoo.transformers())
    wanted = options.only or (QUICK if options.quick else tuple(makers))
    engines: list[Engine] = [OnnxRuntime(threads=1), OpenVINO(threads=1), *([TorchCompile(threads=1)] if options.compile else [])]
    rows = {r["name"]: r for r in (machine.earlier("architectures", "rows") if options.only and options.save else [])}
    for name in wanted:
        rows[name] = _row(name, makers[name], engines)
        options.keep(_summed(list(rows.values()), engines))
    return _summed(list(rows.values()), engines)


def _summed(rows: list[dict[str, Any]], engines: list[Engine]) -> dict[str, Any]:
    names = ["Eager", *(type(e).__name__ for e in engines)]
    return {
        "ratio": 0.5,
        "engines": names,
        "rows": rows,
        "architectures": len(rows),
        "pruned": sum(r.get("families", 0) > 0 for r in rows),
        "match_everywhere": sum(r.get("families", 0) > 0 and all(r["engines"].get(e) is True for e in names) for r in rows),
    }


def _row(name: str, make: Callable[[], zoo.Built], engines: list[Engine]) -> dict[str, Any]:
    torch.manual_seed(0)
    with quiet():
        module, example = make()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    network = Network(kind="module", body=module.eval(), example=(example.numpy(),))
    view = View(inputs=network.example)
    context = Context(train=view, calibrate=view, original=network, loss="original")
    row: dict[str, Any] = {"name": name, "parameters": _size(network), "engines": {}}
    try:
        with quiet():
            structure = analyse(network)
            row |= {"families": len(structure.families), "refused": structure.refused}
            pruned = PruneStructure(multiple=1).apply(network, context)
            row["parameters_after"] = _size(pruned)
            row["engines"] = {type(e).__name__: _matches(e, pruned) for e in (Eager(), *engines)}
    except HastenError as why:
        row["reason"] = str(why)
    return row


def _size(network: Network) -> int:
    return sum(p.numel() for p in network.module.parameters())


def _matches(engine: Engine, network: Network) -> bool | str:
    expected = forward(network, network.example)
    try:
        ready = lower(network) if engine.takes == "graph" else network
        with tempfile.TemporaryDirectory() as folder:
            engine.pack(ready, Path(folder))
            with Runner(Path(folder), fixed_batch=network.fixed_batch) as runner:
                given = runner(*network.example)
    except HastenError as why:
        return str(why)[:200]
    worst = max(relative_difference(a, b) for a, b in zip(expected, given, strict=True))
    return True if worst <= MATCH else f"differs by {worst:.2g} of the largest output"


def show(found: dict[str, Any]) -> None:
    """Prints the table; the page has the same."""
    print(_table(found))
    print(f"\n{found['architectures']} architectures, {found['pruned']} pruned, {found['match_everywhere']} of them match in every engine")


def _table(found: dict[str, Any]) -> str:
    engines = found["engines"]
    lines = [f"| architecture | parameters | families | {' | '.join(engines)} | stays |", f"|---|---|---|{'---|' * len(engines)}---|"]
    for row in found["rows"]:
        sizes = f"{row['parameters']:,} → {row['parameters_after']:,}" if "parameters_after" in row else f"{row['parameters']:,}"
        marks = " | ".join({True: "match"}.get(row["engines"].get(e), row["engines"].get(e) or "–") for e in engines)
        lines.append(f"| {row['name']} | {sizes} | {row.get('families', '–')} | {marks} | {_stays(row)} |")
    return "\n".join(lines)


def _stays(row: dict[str, Any]) -> str:
    if "reason" in row:
        return str(row["reason"]).replace("|", "/")
    reasons: dict[str, list[str]] = {}
    for layer, why in row["refused"].items():
        reasons.setdefault(why.split("(")[0].split(" takes")[-1].strip(), []).append(layer)
    return "; ".join(f"{len(layers)}: {row['refused'][layers[0]]}" for layers in reasons.values()).replace("|", "/")


def page(found: dict[str, Any]) -> str:
    """The text of docs/architectures.md."""
    where = found["environment"]
    return (
        "# Structured pruning by architecture\n"
        f"Written by `python benchmarks/architectures.py --save`: {found['architectures']} small networks with random weights, half of\n"
        f"every family of units taken out by `PruneStructure`. {found['pruned']} shrink; {found['match_everywhere']} of these give the\n"
        f"same in every engine (to {MATCH:g} of the largest output). `stays` counts the layers whose outputs keep their size, with one\n"
        "reason for each kind.\n"
        f"{where['cpu']}, torch {where['versions'].get('torch')}, {found['date']}.\n\n"
        f"{_table(found)}\n"
    )


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    """Prunes and runs every architecture."""
    found = measure(options)
    if options.save:
        PAGE.write_text(page(options.keep(found)))
    return found


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", metavar="NAME")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")


if __name__ == "__main__":
    machine.run("architectures", _measured, show, _options)
