"""Reports as a search would leave them, one for each way in which a run can end."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from hasten.core.report import (
    Baseline,
    Bound,
    Certificate,
    Chosen,
    ClassChange,
    Interval,
    Latency,
    LedgerLine,
    Limit,
    Measurement,
    Opening,
    ParetoPoint,
    Report,
    Trial,
)

HOSTILE = "<script src=\"https://evil.example/x.js\">alert('1')</script>\x1b[31m\u202egnp.exe\ud800{{ 7*7 }}[bold red][/]\x00&amp;"
ENVIRONMENT: dict[str, Any] = {
    "cpu": "AMD EPYC 7B13, 2 cores",
    "flags": ["avx2", "fma"],
    "threads": 2,
    "python": "3.11.9",
    "torch": "2.13.0",
    "onnxruntime": "1.30.0",
    "openvino": "2026.4.1",
    "hasten": "0.1.0",
}


def latency(batch: int, p50: float, launches: int = 1) -> Latency:
    return Latency(batch=batch, p50_ms=p50, p95_ms=p50 * 1.18, calls=400 * launches, launches=launches, first_call_ms=p50 * 9)


def measured(p50: float, drop: float, size: int, *, batches: tuple[int, ...] = (1,), parameters: int = 99_872) -> Measurement:
    return Measurement(
        score=0.984 - drop,
        score_drop=drop,
        flips=abs(drop) * 1.4,
        max_difference=abs(drop) * 3,
        latency=tuple(latency(b, p50 * b**0.8) for b in batches),
        size_bytes=size,
        peak_memory_bytes=61_000_000 + 4 * size,
        parameters=parameters,
        macs=parameters * 41,
    )


def recipe(engine: str, *steps: str) -> dict[str, Any]:
    named = [{"name": f"hasten.compress.{step}"} for step in steps]
    return {"steps": named, "engine": {"name": f"hasten.engines.{engine}", "threads": 2}}


def trial(number: int, engine: str, *steps: str, p50: float, drop: float = 0.0, size: int = 402_000, **more: Any) -> Trial:
    return Trial(
        number=number,
        recipe=recipe(engine, *steps),
        words=" → ".join((*steps, engine)),
        state="finished",
        measurement=measured(p50, drop, size, **more),
        seconds=4.0 + number,
    )


def refused(number: int, reason: str, *steps: str, state: Any = "failed") -> Trial:
    words = " → ".join((*steps, "OpenVino"))
    return Trial(number=number, recipe=recipe("OpenVino", *steps), words=words, state=state, reason=reason, seconds=0.3)


PRUNED = ("FoldBatchNorm", "PruneChannels(amount=0.3)", "FineTune")
TRIALS = (
    trial(0, "Eager", p50=0.402),
    trial(1, "OnnxRuntime", p50=0.123, size=398_000),
    trial(2, "OpenVino", p50=0.232, size=405_000),
    trial(3, "OpenVino(bf16)", p50=0.151, drop=0.0005, size=405_000),
    trial(4, "OnnxRuntime", "FoldBatchNorm", p50=0.117, size=396_000),
    refused(5, "FoldBatchNorm needs a Conv2d followed by BatchNorm2d, found none behind 'head.3'", "FoldBatchNorm", "Fold"),
    trial(6, "OnnxRuntime", "FoldBatchNorm", "StaticInt8", p50=0.0815, drop=0.001, size=106_000),
    trial(7, "OnnxRuntime", *PRUNED, "StaticInt8", p50=0.0613, drop=0.004, size=71_000),
    trial(8, "OnnxRuntime", "FoldBatchNorm", "PruneChannels(amount=0.6)", "StaticInt8", p50=0.0457, drop=0.142, size=39_000),
    trial(9, "OnnxRuntime", "DynamicInt8", p50=0.467, drop=0.0015, size=108_000),
    trial(10, "OpenVino", "FoldBatchNorm", "StaticInt8(bits=4)", p50=0.0921, drop=0.013, size=64_000),
    refused(11, "the child needed more than 2.0 GB; allow more with --memory or leave Factorize out", "Factorize(rank=8)"),
    trial(12, "OnnxRuntime", *PRUNED, "ShareWeights", "StaticInt8", p50=0.0569, drop=0.0085, size=62_000),
)  # fmt: skip


def baseline(number: int, words: str, p50: float, size: int) -> Baseline:
    return Baseline(
        trial=number,
        words=words,
        score=0.984,
        size_bytes=size,
        peak_memory_bytes=182_000_000 if number == 0 else 74_000_000,
        parameters=99_872,
        macs=4_094_752,
        latency_ms=(latency(1, p50, 12), latency(32, p50 * 22, 12)),
    )


BASELINES = {"as given": baseline(0, "Eager", 0.402, 402_000), "best plain engine": baseline(1, "OnnxRuntime", 0.123, 398_000)}


def chosen(number: int, speedup: tuple[Interval, ...], over: tuple[Interval, ...], bound: Bound) -> Chosen:
    tried = TRIALS[number]
    assert tried.measurement is not None
    return Chosen(
        trial=number,
        recipe=tried.recipe,
        words=tried.words,
        speedup=speedup,
        speedup_over_best_plain=over,
        score=0.984 - bound.value,
        score_drop=bound,
        size_bytes=tried.measurement.size_bytes,
        peak_memory_bytes=tried.measurement.peak_memory_bytes,
        parameters=tried.measurement.parameters,
        macs=tried.measurement.macs,
        latency_ms=(latency(1, 0.402 / speedup[0].value, 12),),
    )


def gain(value: float, half: float, batch: int = 1) -> Interval:
    return Interval(batch=batch, value=value, low=value - half, high=value + half, launches=12)


def tango(value: float, upper: float, n: int = 2000, lost: int = 14, won: int = 12) -> Bound:
    return Bound(value=value, upper=upper, n=n, method="Tango's score interval", lost=lost, won=won)


EQUAL = Bound(value=0.0, upper=0.0, n=2000, method="outputs equal within 1e-4 of their largest", lost=0, won=0)
KEPT = tango(0.001, 0.0055)
PARETO = tuple(ParetoPoint(trial=n, speedup=s, score_drop=d) for n, s, d in (
    (4, 3.44, 0.0), (6, 4.93, 0.001), (7, 6.56, 0.004), (12, 7.07, 0.0085), (8, 8.8, 0.142),
))  # fmt: skip

kept = Report(
    state="finished",
    verdict="kept",
    sentence="",
    limit=Limit(max_drop=0.01),
    score_name="accuracy",
    provenance="held out",
    examples={"train": 8000, "calibrate": 500, "select": 1500, "prove": 2000},
    baselines=BASELINES,
    chosen=chosen(6, (gain(4.93, 0.28),), (gain(1.51, 0.06),), KEPT),
    certificates=(
        Certificate(trial=4, verdict="equal", bound=EQUAL),
        Certificate(trial=6, verdict="kept", bound=KEPT),
        Certificate(trial=7, verdict="not shown", bound=tango(0.0045, 0.0112, lost=33, won=24), enough=3100),
    ),
    pareto=PARETO,
    ledger=(
        LedgerLine(part="FoldBatchNorm", latency_ms=0.0062, size_bytes=1_800, score_drop=0.0),
        LedgerLine(part="StaticInt8", latency_ms=0.0355, size_bytes=290_000, score_drop=0.001, note="7-bit weights: no VNNI here"),
        LedgerLine(part="OnnxRuntime", latency_ms=0.28, size_bytes=4_000, score_drop=0.0, note="against Eager"),
    ),
    classes=(
        ClassChange(name="aeroplane", n=212, before=0.991, after=0.991),
        ClassChange(name="bird", n=197, before=0.975, after=0.9645),
        ClassChange(name="cat", n=208, before=0.952, after=0.947),
        ClassChange(name="dog", n=190, before=0.963, after=0.968),
        ClassChange(name="frog", n=201, before=0.99, after=0.995),
        ClassChange(name="ship", n=204, before=0.985, after=0.98),
    ),
    openings=(Opening(fingerprint="9f2c61d0" * 8, when="2026-11-21T14:03:11Z", candidates=(4, 6, 7), reused=False),),
    trials=TRIALS,
    notes=("OpenVINO int8 is slower than ONNX Runtime on this network: the layers are small.",),
    batches=(1,),
    artifact="runs/cnn/best",
    command="hasten optimize cnn.pt2 --data train.npz --prove test.npz --max-drop 1pt",
    seconds=412.0,
    environment=ENVIRONMENT,
)

equal = replace(kept, verdict="equal", chosen=chosen(4, (gain(3.44, 0.11),), (gain(1.05, 0.02),), EQUAL), pareto=PARETO[:1], classes=())
plain = replace(
    kept,
    verdict="equal",
    chosen=chosen(1, (gain(3.11, 0.2),), (gain(1.0, 0.0),), EQUAL),
    certificates=(Certificate(trial=1, verdict="equal", bound=EQUAL),),
    pareto=(),
    ledger=(),
    classes=(),
    trials=TRIALS[:4],
)
unchanged = replace(
    plain,
    chosen=chosen(0, (gain(1.0, 0.0),), (gain(1.0, 0.0),), EQUAL),
    certificates=(),
    notes=("Nothing ran faster than the network as given.",),
)
cap_unmet = replace(
    kept,
    verdict="kept",
    limit=Limit(max_drop=0.01, latency_ms=0.05, size_bytes=80_000),
    chosen=None,
    closest_miss="trial 7: latency 0.0613 ms (12 % over), size 71 kB; its drop was not shown to keep the limit",
    classes=(),
    ledger=(),
)
not_shown = replace(
    kept,
    verdict="not shown",
    limit=Limit(max_drop=0.01, min_speedup=4),
    chosen=None,
    closest_miss="trial 6: 4.9×, estimated drop 0.3 points",
    certificates=(Certificate(trial=6, verdict="not shown", bound=tango(0.003, 0.0141, 360, 3, 2), enough=1200),),
    classes=(),
    ledger=(),
)
exceeded = replace(
    not_shown,
    verdict="exceeded",
    certificates=(Certificate(trial=6, verdict="exceeded", bound=tango(0.031, 0.042, 2000, 90, 28)),),
    closest_miss="trial 6: 4.9×, drop 3.1 points",
)
point = replace(
    kept,
    verdict="not shown",
    limit=Limit(max_drop=0.01, accept="point"),
    chosen=chosen(7, (gain(6.56, 0.4),), (gain(2.01, 0.1),), tango(0.0045, 0.0112, lost=33, won=24)),
)
unknown = replace(
    kept, provenance="unknown", openings=(*kept.openings, replace(kept.openings[0], when="2026-11-22T09:15:40Z", reused=True))
)
slower = replace(
    kept,
    batch=32,
    batches=(1, 32),
    chosen=chosen(9, (gain(0.86, 0.03), gain(0.62, 0.02, 32)), (gain(0.26, 0.01), gain(0.2, 0.01, 32)), KEPT),
)
no_difference = replace(kept, chosen=replace(chosen(6, (gain(1.03, 0.03),), (gain(0.99, 0.03),), KEPT), size_bytes=402_000))
values = replace(
    kept,
    score_name="negative squared error",
    limit=Limit(max_drop=0.05),
    classes=(),
    chosen=chosen(6, (gain(4.9, 0.2),), (), KEPT),
)
no_labels = replace(kept, score_name="agreement with the original", provenance="unknown", classes=())
running = replace(
    kept,
    state="running",
    verdict=None,
    chosen=None,
    certificates=(),
    ledger=(),
    classes=(),
    openings=(),
    pareto=PARETO[:2],
    trials=(*TRIALS[:7], Trial(number=7, recipe=TRIALS[7].recipe, words=TRIALS[7].words, state="running")),
    artifact=None,
)
interrupted = replace(running, state="interrupted", trials=TRIALS[:7])
hostile = replace(
    kept,
    closest_miss=HOSTILE,
    score_name=f"accuracy {HOSTILE}",
    baselines={"as given": replace(BASELINES["as given"], words=HOSTILE), HOSTILE: BASELINES["best plain engine"]},
    chosen=replace(kept.chosen, words=HOSTILE) if kept.chosen else None,
    ledger=(LedgerLine(part=HOSTILE, latency_ms=1.0, size_bytes=1, score_drop=0.1, note=HOSTILE),),
    classes=tuple(ClassChange(name=f"{HOSTILE}{i}" * 4, n=10, before=0.9, after=0.8) for i in range(3)),
    openings=(Opening(fingerprint=HOSTILE, when=HOSTILE, candidates=(1,), reused=True),),
    certificates=(Certificate(trial=6, verdict="kept", bound=replace(KEPT, method=HOSTILE)),),
    trials=(
        *(replace(t, words=HOSTILE, reason=t.reason and HOSTILE) for t in TRIALS),
        refused(13, "x" * 5000),
        refused(14, "W" * 500, "y" * 300),
    ),
    notes=(HOSTILE, "n" * 900),
    artifact='runs/it\'s "here"\x1b]8;;https://evil.example\x07/' + HOSTILE,
    command=f"hasten optimize '{HOSTILE}'",
    environment={HOSTILE: HOSTILE, "nested": {"deep": [HOSTILE]}},
)
empty = Report(
    state="finished",
    verdict=None,
    sentence="",
    limit=Limit(),
    score_name="accuracy",
    provenance="unknown",
    examples={},
    baselines={},
    chosen=None,
)

ALL: dict[str, Report] = {
    "kept": kept,
    "equal": equal,
    "plain": plain,
    "unchanged": unchanged,
    "cap_unmet": cap_unmet,
    "not_shown": not_shown,
    "exceeded": exceeded,
    "point": point,
    "unknown": unknown,
    "slower": slower,
    "no_difference": no_difference,
    "values": values,
    "no_labels": no_labels,
    "running": running,
    "interrupted": interrupted,
    "hostile": hostile,
    "empty": empty,
}


def long(trials: int = 300) -> Report:
    """A search of many trials, one in seven refused."""
    many = tuple(
        refused(i, f"StaticInt8 cannot treat layer 'block{i}.attention': no calibration range", "StaticInt8")
        if i % 7 == 6
        else trial(i, "OnnxRuntime", "FoldBatchNorm", f"PruneChannels(amount={i / 400:.3f})", "StaticInt8",
                   p50=0.4 / (1 + i % 37 / 5), drop=(i * 37 % 101) / 4000 - 0.003, size=400_000 - 900 * i)
        for i in range(len(TRIALS), trials)
    )  # fmt: skip
    return replace(kept, trials=(*TRIALS, *many))


@functools.cache
def with_sentences() -> dict[str, Report]:
    """Every sample with its sentence filled in, as the search does."""
    from hasten.report import verdict_sentence

    return {name: replace(report, sentence=verdict_sentence(report)) for name, report in ALL.items()}
