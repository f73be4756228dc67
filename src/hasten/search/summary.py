"""The report of a run, put together from its store at any moment: running, broken off or finished. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hasten.core.report import (
    Baseline,
    Certificate,
    Chosen,
    ClassChange,
    LedgerLine,
    Limit,
    ParetoPoint,
    Report,
    Trial,
    Verdict,
)
from hasten.core.score import Score
from hasten.core.store import Store
from hasten.measure import machine
from hasten.search.bench import Bench
from hasten.search.finals import FinalTiming, Proof

AS_GIVEN = "as given"
BEST_PLAIN = "best plain engine"


@dataclass(frozen=True, kw_only=True)
class Final:
    """What the end of a run adds to its store."""

    baselines: dict[str, Baseline]
    chosen: Chosen | None
    closest_miss: str | None
    verdict: Verdict
    classes: tuple[ClassChange, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "baselines": {name: b.to_json() for name, b in self.baselines.items()},
            "chosen": self.chosen.to_json() if self.chosen else None,
            "closest_miss": self.closest_miss,
            "verdict": self.verdict,
            "classes": [c.to_json() for c in self.classes],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Final:
        """What `to_json` wrote."""
        return cls(
            baselines={name: Baseline.from_json(b) for name, b in record["baselines"].items()},
            chosen=Chosen.from_json(record["chosen"]) if record["chosen"] else None,
            closest_miss=record["closest_miss"],
            verdict=record["verdict"],
            classes=tuple(ClassChange.from_json(c) for c in record["classes"]),
        )


def report(run: Path, store: Store, *, state: Literal["finished", "running", "interrupted"] | None = None) -> Report:
    """The report, without its sentence.

    Args:
        run: the run folder.
        store: its store, open.
        state: of a run that has no result yet; "interrupted" if None.
    """
    task = store.fact("task") or {}
    settings = store.fact("settings") or {"limit": Limit().to_json(), "batch": 1, "batches": [1], "seed": 0}
    final = Final.from_json(record) if (record := store.fact("final")) else None
    trials = tuple(store.trials())
    batch = settings["batch"]
    return Report(
        state="finished" if final else state or "interrupted",
        verdict=final.verdict if final and final.chosen else None,
        sentence="",
        limit=Limit.from_json(settings["limit"]),
        score_name=task.get("score_name", "score"),
        provenance=task.get("provenance", "unknown"),
        examples=task.get("examples", {}),
        baselines=final.baselines if final else _ranking_baseline(trials),
        chosen=final.chosen if final else None,
        closest_miss=final.closest_miss if final else None,
        certificates=tuple(Certificate.from_json(c) for c in store.fact("certificates") or ()),
        pareto=pareto(trials, batch),
        ledger=tuple(LedgerLine.from_json(line) for line in store.fact("ledger") or ()),
        classes=final.classes if final else (),
        openings=store.openings(),
        trials=trials,
        notes=tuple(task.get("notes", ())),
        batch=batch,
        batches=tuple(settings["batches"]),
        artifact=_artifact(run),
        command=task.get("command", ""),
        seed=settings["seed"],
        seconds=store.fact("seconds") or 0.0,
        environment=store.fact("environment") or machine.environment(),
    )


def pareto(trials: Sequence[Trial], batch: int) -> tuple[ParetoPoint, ...]:
    """The trials that no other beats in both speed and score, the fastest last.

    Speed is that of the ranking, against the first trial.
    """
    ran = [t for t in trials if t.measurement]
    if not ran:
        return ()
    base = ran[0].measurement.at(batch).p50_ms  # type: ignore[union-attr]
    points = [ParetoPoint(trial=t.number, speedup=base / m.at(batch).p50_ms, score_drop=m.score_drop) for t in ran if (m := t.measurement)]
    points.sort(key=lambda p: (-p.speedup, p.score_drop))
    front: list[ParetoPoint] = []
    for point in points:
        if not front or point.score_drop < front[-1].score_drop:
            front.append(point)
    return tuple(reversed(front))


def baselines(bench: Bench, original: Trial, plain: Trial, timed: FinalTiming, proof: Proof) -> dict[str, Baseline]:
    """The two that every speed-up is held against, with their final figures."""
    both = [(AS_GIVEN, original, timed.original, 0), (BEST_PLAIN, plain, timed.plain, 1)]
    return {name: _baseline(bench, trial, latency, timed.memory[at], proof) for name, trial, latency, at in both}


def _baseline(bench: Bench, trial: Trial, latency: Any, memory: int, proof: Proof) -> Baseline:
    assert trial.measurement
    return Baseline(
        trial=trial.number,
        words=trial.words,
        score=bench.score.value(proof.outputs.get(trial.number, proof.original), proof.target),
        size_bytes=trial.measurement.size_bytes,
        peak_memory_bytes=memory,
        parameters=trial.measurement.parameters,
        macs=trial.measurement.macs,
        latency_ms=latency,
    )


def with_best(timed: FinalTiming, *, plain: bool) -> FinalTiming:
    """The same timing with one of the baselines as the result."""
    if plain:
        one = tuple(replace(i, value=1.0, low=1.0, high=1.0) for i in timed.over_plain)
        memory = (timed.memory[0], timed.memory[1], timed.memory[1])
        return replace(timed, best=timed.plain, over_original=timed.plain_over_original, over_plain=one, memory=memory)
    one = tuple(replace(i, value=1.0, low=1.0, high=1.0) for i in timed.over_original)
    inverse = tuple(replace(i, value=1 / i.value, low=1 / i.high, high=1 / i.low) for i in timed.plain_over_original)
    memory = (timed.memory[0], timed.memory[1], timed.memory[0])
    return replace(timed, best=timed.original, over_original=one, over_plain=inverse, memory=memory)


def missed_size(trial: Trial, limit: Limit) -> list[str]:
    """Which caps on size and memory a trial misses, in words."""
    measured = trial.measurement
    assert measured
    found = []
    if limit.size_bytes is not None and measured.size_bytes > limit.size_bytes:
        found.append(f"{measured.size_bytes:,} bytes on disk, cap {limit.size_bytes:,}")
    if limit.peak_memory_bytes is not None and measured.peak_memory_bytes > limit.peak_memory_bytes:
        found.append(f"{measured.peak_memory_bytes:,} bytes of memory, cap {limit.peak_memory_bytes:,}")
    return found


def missed_speed(timed: FinalTiming, limit: Limit, batch: int) -> list[str]:
    """Which caps on speed the final timing misses, in words."""
    latency = next(entry.p50_ms for entry in timed.best if entry.batch == batch)
    speedup = next(i.value for i in timed.over_original if i.batch == batch)
    found = []
    if limit.latency_ms is not None and latency > limit.latency_ms:
        found.append(f"{latency:.3g} ms, cap {limit.latency_ms:g} ms")
    if limit.min_speedup is not None and speedup < limit.min_speedup:
        found.append(f"{speedup:.2f}× faster, minimum {limit.min_speedup:g}×")
    return found


def miss_words(trials: Mapping[int, Trial], best: Chosen, missed: Sequence[str], limit: Limit) -> str:
    """The closest miss in one line: the certified candidate that came nearest, and the smallest where size is the trouble."""
    words = f"{best.words} has {', '.join(missed)}"
    if limit.size_bytes is None:
        return words
    small = min((t for t in trials.values() if t.measurement), key=lambda t: t.measurement.size_bytes)  # type: ignore[union-attr]
    assert small.measurement
    return f"{words}; the smallest tried is {small.words} with {small.measurement.size_bytes:,} bytes"


def class_changes(score: Score, proof: Proof, number: int, task: Mapping[str, Any]) -> tuple[ClassChange, ...]:
    """The score of each class on *prove* before and after, where there are classes and a score per example."""
    labels, names = proof.view.labels, task.get("classes") or []
    before = score.per_example(proof.original, proof.target)
    after = score.per_example(proof.outputs[number], proof.target)
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu" or before is None or after is None:
        return ()
    found = []
    for label in np.unique(labels):
        rows = labels == label
        name = names[label] if label < len(names) else str(label)
        found.append(ClassChange(name=name, n=int(rows.sum()), before=float(before[rows].mean()), after=float(after[rows].mean())))
    return tuple(found)


def _ranking_baseline(trials: Sequence[Trial]) -> dict[str, Baseline]:
    """While a run is not finished: the network as given, with its ranking figures."""
    if not trials or not (measured := trials[0].measurement):
        return {}
    first = trials[0]
    return {
        AS_GIVEN: Baseline(
            trial=first.number,
            words=first.words,
            score=measured.score,
            size_bytes=measured.size_bytes,
            peak_memory_bytes=measured.peak_memory_bytes,
            parameters=measured.parameters,
            macs=measured.macs,
            latency_ms=measured.latency,
        )
    }


def _artifact(run: Path) -> str | None:
    return next((str(run / name) for name in ("artifact", "best-so-far") if (run / name).is_dir()), None)
