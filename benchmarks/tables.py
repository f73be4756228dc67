"""Writes the tables of the README and of docs/ that come from benchmarks/results anew.

    python benchmarks/tables.py

A table stands between `<!-- NAME -->` and `<!-- end -->`; where there is no result of that name it stays as it is. A test holds that the
pages have the tables of the results beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_WITH_TABLES = ("README.md", "docs/results.md", "docs/training.md", "docs/formats.md", "docs/safety.md")
PAGES = tuple(Path(__file__).parents[1] / name for name in _WITH_TABLES)
Row = dict[str, Any]


def loop_overhead(found: Row) -> Iterable[tuple[str, ...]]:
    """Seconds of a pass and their ratio to the bare loop's."""
    yield "loop", "seconds a pass", "÷ the bare loop"
    for r in found["loops"]:
        yield r["name"], f"{r['pass_s']:.2f}", _spread(r["ratio"], r["ratio_sd"], 2)


def time_to_accuracy(found: Row) -> Iterable[tuple[str, ...]]:
    """Seconds to a target."""
    yield "target", "loop", "passes", "seconds", "accuracy, %", "reached", "÷ hasten"
    for r in found["table"]:
        seconds, over = _spread(r["seconds"], r["seconds_std"], 1), _spread(r["over_hasten"], r["over_hasten_std"], 2)
        accuracy = _spread(100 * r["accuracy"], r["accuracy_std"] and 100 * r["accuracy_std"], 2)
        yield r["target"], r["loop"], f"{r['passes']:g}", seconds, accuracy, f"{r['reached']} of {r['seeds']}", over


def final_accuracy(found: Row) -> Iterable[tuple[str, ...]]:
    """Accuracy of both recipes and the gain."""
    yield "task", "default, %", "textbook, %", "gain in points, 95 % interval", "better"
    for r in found["table"]:
        both = [_spread(100 * r[name], r[f"{name}_std"] and 100 * r[f"{name}_std"], 2) for name in ("default", "textbook")]
        low, high = (100 * g for g in r.get("gain_interval", (float("nan"),) * 2))
        yield r["task"], *both, f"{100 * r['gain']:+.2f} ({low:+.2f} to {high:+.2f})", f"{r['won']} of {r['seeds']}"


def training_memory(found: Row) -> Iterable[tuple[str, ...]]:
    """Peaks."""
    yield "network", "way", "peak beyond the start, MB", "÷ plain"
    for r in found["table"]:
        low, high = r["range"]
        yield r["network"], r["name"], f"{r['mb']:.0f} ({low:.0f}–{high:.0f})", f"{r['share_of_plain']:.2f}"


def search_peers(found: Row) -> Iterable[tuple[str, ...]]:
    """How many times as fast hasten's result is as each peer's."""
    peers = list(dict.fromkeys(r["peer"] for n in found["networks"] for r in n["rows"]))[1:]
    yield "network", "hasten found", "drop at most, points", "minutes for each", *peers
    for network in found["networks"]:
        rows = {r["peer"]: r for r in network["rows"]}
        own = rows["hasten"]
        drop = "equal outputs" if own["kept"] and own["upper"] > found["limit"] else f"{100 * own['upper']:.2f}"
        yield network["network"], network["recipe"], drop, f"{network['minutes']:g}", *(_over(rows.get(peer)) for peer in peers)


def compression(found: Row) -> Iterable[tuple[str, ...]]:
    """What each recipe keeps and buys; the controls last."""
    yield "network", "recipe", "engine", "accuracy, %", "kept", "× eager", "× ORT fp32", "× best int8", "× OpenVINO int8", "× smaller"
    for name in dict.fromkeys(r["network"] for r in found["table"]):
        rows = [r for r in found["table"] if r["network"] == name]
        for r in sorted(rows, key=lambda r: r["recipe"].startswith("control")):
            accuracy = _spread(100 * r["accuracy"], r["accuracy_std"] and 100 * r["accuracy_std"], 2)
            over = [f"{r['over'][who]:.2f}" for who in ("eager", "ort", "best_int8", "openvino_int8")]
            yield name, r["recipe"], r["engine"], accuracy, f"{r['kept']} of {r['seeds']}", *over, f"{r['smaller']:.1f}"


def pairs(found: Row) -> Iterable[tuple[str, ...]]:
    """How many pairs of steps on each network come to what."""
    kinds = ("composes", "refused", "no recipe", "failed")
    yield "network", *kinds
    for name in dict.fromkeys(r["network"] for r in found["rows"]):
        outcomes = [r["outcome"] for r in found["rows"] if r["network"] == name]
        yield name, *(str(outcomes.count(kind)) for kind in kinds)


def hostile(found: Row) -> Iterable[tuple[str, ...]]:
    """How the files of each format ended, and what the worst of them took."""
    yield "files", "n", "refused", "loaded", "the child died of it", "worst s", "worst MiB", "promise broken"
    for name, r in found["rows"].items():
        ends = r["outcomes"]
        loaded, died = ends.get("loaded", 0), ends.get("died", 0)
        refused = sum(ends.values()) - loaded - died - ends.get("raised", 0)
        worst = f"{r['worst_seconds'][0]:.2f}", f"{r['worst_bytes'][0] / 2**20:.1f}"
        yield name, str(r["files"]), str(refused), str(loaded), str(died), *worst, str(len(r["broken"]))


def trained_networks(found: Row) -> Iterable[tuple[str, ...]]:
    """Each network in each form: what it becomes, which engines run it, what the search made of it, what was refused."""
    yield "network", "operators", "parameters", "becomes", "engines", "verdict", "recipe", "× as given", "× best plain", "refused"
    for r in found["networks"]:
        engines, made = r.get("engines", []), r.get("optimized", {})
        refused = [r["refused"]] if "refused" in r else [f"{e['engine']}: {e['reason']}" for e in engines if e["reason"]]
        refused += [made["reason"]] if "reason" in made else []
        runs = f"{sum(not e['reason'] for e in engines)} of {len(engines)}" if engines else "–"
        over = [f"{v:.2f} ({low:.2f}–{high:.2f})" for v, low, high in made.get("over", {}).values()] or ["–", "–"]
        name = f"{r['package']}: {r['file'].rpartition('/')[2]}"
        kinds, count = str(len(r.get("layers", {}))), f"{r.get('parameters', 0):,}"
        cells = (name, kinds, count, r.get("kind", "–"), runs, made.get("verdict") or "–", made.get("recipe", "–"), *over)
        yield *cells, "; ".join(why.replace("|", "/").replace("\n", " ")[:160] for why in refused)


def widths(found: Row) -> Iterable[tuple[str, ...]]:
    """The time at each width as a share of that at the next multiple of 8."""
    known = found["widths"]
    yield "layers", "engine", "numbers", *(str(w) for w in known)
    for r in found["rows"]:
        ms = [t["ms"] for t in r["times"]]
        above = [next(t for v, t in zip(known, ms, strict=True) if v >= w and v % 8 == 0) for w in known]
        yield r["layer"], r["engine"], "int8" if r["int8"] else "float32", *(f"{t / a:.2f}" for t, a in zip(ms, above, strict=True))


def _over(row: Row | None) -> str:
    if row is None:
        return "refused"
    over = row["over"]
    return f"{over['value']:.2f}× ({over['low']:.2f}–{over['high']:.2f})" + ("" if row["kept"] else ", not kept")


TABLES: dict[str, Callable[[Row], Iterable[tuple[str, ...]]]] = {
    "compression": compression,
    "final_accuracy": final_accuracy,
    "hostile": hostile,
    "loop_overhead": loop_overhead,
    "pairs": pairs,
    "search_peers": search_peers,
    "time_to_accuracy": time_to_accuracy,
    "trained_networks": trained_networks,
    "training_memory": training_memory,
    "widths": widths,
}


def _spread(value: float | None, deviation: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def markdown(rows: Iterable[tuple[str, ...]]) -> str:
    """The first row is the head.

    >>> print(markdown([("a", "b"), ("1", "2")]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, *rest)).replace("\n", "\n" + "|---" * len(head) + "|\n", 1)


def written(page: str) -> str:
    """The page with its tables anew."""
    for name, table in TABLES.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            fresh = f"<!-- {name} -->\n{markdown(table(json.loads(path.read_text())))}\n<!-- end -->"
            page = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, fresh=fresh: fresh, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text()))
