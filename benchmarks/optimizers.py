"""The time of one step: our optimizers, torch's in all its ways, and a kernel that only reads and writes the same arrays.

    python benchmarks/optimizers.py [--quick] [--json] [--save]

25.6 million parameters in the shapes of ResNet-50, 109 million in those of BERT-base, and 93,000 in those of a small CNN, where what
is done before the arithmetic counts. In each round every way takes one step, in a new order. `ratio_to_best_torch`: the median over
the rounds of (ours ÷ the fastest way of torch), with the 95 % interval of the median from order statistics; `share_of_floor`: median
of (streaming kernel ÷ ours). The floor reads and writes in place what the optimizer with float32 state must; rows with small state
are held against the same floor.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import machine
import numpy as np
import shapes as networks
import torch
from torch import nn

from hasten import optim
from hasten.train.optim import kernel
from hasten.train.optim.source import Form

# (name, class, settings, arrays beside parameter and gradient, ways of torch)
LOOP, FOREACH, FUSED = {"foreach": False}, {"foreach": True}, {"fused": True}
Row = tuple[str, str, dict[str, Any], int, tuple[dict[str, bool], ...]]
ROWS: list[Row] = [
    ("SGD", "SGD", {"lr": 1e-3}, 0, (LOOP, FOREACH, FUSED)),
    ("SGD, momentum", "SGD", {"lr": 1e-3, "momentum": 0.9}, 1, (LOOP, FOREACH, FUSED)),
    ("Momentum", "Momentum", {"lr": 1e-3}, 1, ()),
    ("Adagrad", "Adagrad", {"lr": 1e-3}, 1, (LOOP, FOREACH, FUSED)),
    ("RMSprop", "RMSprop", {"lr": 1e-3}, 1, (LOOP, FOREACH)),
    ("Adam", "Adam", {}, 2, (LOOP, FOREACH, FUSED)),
    ("AdamW", "AdamW", {}, 2, (LOOP, FOREACH, FUSED)),
    ("NAdam", "NAdam", {}, 2, (LOOP, FOREACH)),
    ("Lion", "Lion", {}, 1, ()),
    ("ScheduleFreeAdamW", "ScheduleFreeAdamW", {}, 2, ()),
    ("Prodigy", "Prodigy", {}, 4, ()),
    ("AdamW, bfloat16 state", "AdamW", {"state_dtype": torch.bfloat16}, 2, ()),
    ("AdamW, int8 state", "AdamW", {"state_dtype": torch.int8}, 2, ()),
    ("Lion, int8 state", "Lion", {"state_dtype": torch.int8}, 1, ()),
    ("AdamW, plain path", "AdamW", {"fused": False}, 2, ()),
    ("Adafactor", "Adafactor", {}, 0, (LOOP,)),
]


def resnet50() -> list[tuple[int, ...]]:
    """ResNet-50: 25.6 million."""
    with torch.device("meta"):
        return [tuple(p.shape) for p in networks.resnet50().parameters()]


def bert() -> list[tuple[int, ...]]:
    """BERT-base: 109 million."""
    layer = [(768, 768), (768,)] * 4 + [(3072, 768), (3072,), (768, 3072)] + [(768,)] * 5
    return [(30522, 768), (512, 768), (2, 768), (768,), (768,), *layer * 12, (768, 768), (768,)]


def small_cnn() -> list[tuple[int, ...]]:
    """Six convolutions with norms and a layer of 10 classes: 93,000."""
    widths = (3, 16, 16, 32, 32, 64, 64)
    shapes: list[tuple[int, ...]] = []
    for inside, outside in pairwise(widths):
        shapes += [(outside, inside, 3, 3), (outside,), (outside,)]
    return [*shapes, (10, 2048), (10,)]


def stream(x: Any, h: Any) -> None:
    """Every array but the gradient is read and written once, with as little arithmetic as there can be."""
    for name in [n for n in vars(x) if n not in ("p", "g", "sums")]:
        setattr(x, name, getattr(x, name) + x.g)
    x.p = x.p + h.rate * x.g


def floor(params: list[nn.Parameter], more: int) -> Callable[[], object]:
    """The streaming kernel on arrays of its own."""
    names = [f"a{k}" for k in range(more)]
    form = Form(stream, tuple((n, "float32") for n in ("p", "g", *names)), ("rate",), ())
    run = kernel.kernel(form)
    arrays = [[p.detach(), p.grad, *(torch.zeros_like(p) for _ in names)] for p in params]
    pointers, sizes = [t.data_ptr() for row in arrays for t in row if t is not None], [p.numel() for p in params]
    return lambda arrays=arrays: run(sizes, pointers, (1e-9,) * len(sizes), 0, 0)  # type: ignore[misc]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rows on all sets of shapes."""
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "optimizers": []}
    for network, shapes in {"small CNN": small_cnn(), "ResNet-50": resnet50(), "BERT-base": bert()}.items():
        if options.quick and network == "BERT-base":
            continue
        rounds = 300 if network == "small CNN" else 7 if options.quick else 21 if network == "BERT-base" else 41
        for row in ROWS:
            slow = row[0] in ("Adafactor", "AdamW, plain path")  # up to seconds a step
            if slow and (network == "BERT-base" or (options.quick and network == "ResNet-50")):
                continue
            if options.only and options.only not in row[0]:
                continue
            found["optimizers"].append({"network": network, **_row(row, shapes, rounds)})
            options.keep(found)
            gc.collect()
    return found


def _row(row: Row, shapes: list[tuple[int, ...]], rounds: int) -> dict[str, Any]:
    name, kind, settings, more, ways = row
    params = [nn.Parameter(torch.full(s, 0.5)) for s in shapes]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    steps: dict[str, Callable[[], object]] = {"floor": floor(params, more), "ours": getattr(optim, kind)(params, **settings).step}
    for way in ways:
        steps[f"torch {'for-loop' if way == LOOP else next(iter(way))}"] = getattr(torch.optim, kind)(params, **settings, **way).step
    times: dict[str, list[float]] = {key: [] for key in steps}
    rng = np.random.default_rng(0)
    for turn in range(rounds + 2):
        for key in rng.permutation(list(steps)):
            start = time.perf_counter()
            steps[key]()
            if turn >= 2:  # the first two make the state and wake the threads
                times[key].append(1e3 * (time.perf_counter() - start))
    medians = {key: float(np.median(values)) for key, values in times.items()}
    best = min((key for key in steps if key.startswith("torch")), key=medians.__getitem__, default=None)
    ours = np.array(times["ours"])
    return {
        "name": name,
        "ms": round(medians["ours"], 3),
        "ratio_to_best_torch": _interval(ours / np.array(times[best])) if best else None,
        "share_of_floor": _interval(np.array(times["floor"]) / ours),
        "parameters": sum(p.numel() for p in params),
        "best_torch": best,
        "ms_of": {key: round(value, 3) for key, value in medians.items()},
        "n": rounds,
        "ms_spread": [round(float(np.quantile(ours, q)), 3) for q in (0.05, 0.95)],
    }


def _interval(values: np.ndarray) -> list[float]:
    """The median and the 95 % interval of it, from the ranks n/2 ± 0.98·√n."""
    ordered, n = np.sort(values), len(values)
    low, high = max(0, int(n / 2 - 0.98 * n**0.5)), min(n - 1, int(np.ceil(n / 2 + 0.98 * n**0.5)))
    return [round(float(v), 3) for v in (np.median(ordered), ordered[low], ordered[high])]


def show(found: dict[str, Any]) -> None:
    """A table."""
    print(f"{'':11}{'':24}{'ms':>8}  {'to best torch':26}{'share of floor':22}")
    for row in found["optimizers"]:
        ratio, share = row["ratio_to_best_torch"], row["share_of_floor"]
        told = f"{ratio[0]:.2f} ({ratio[1]:.2f}–{ratio[2]:.2f}) {row['best_torch'].split()[1]}" if ratio else "—"
        print(f"{row['network']:11}{row['name']:24}{row['ms']:8.2f}  {told:26}{share[0]:.2f} ({share[1]:.2f}–{share[2]:.2f})  n={row['n']}")


if __name__ == "__main__":
    machine.run("optimizers", measure, show, lambda parser: parser.add_argument("--only", help="rows whose name holds this"))
