"""The report of a run, put together from its store at any moment: running, broken off or finished. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hasten.core.data import Array
from hasten.core.errors import UsageError
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
from hasten.measure import machine, timing
from hasten.search import portions
from hasten.search.bench import Bench
from hasten.search.catalogue import Settings
from hasten.search.diagnosis import diagnose
from hasten.search.finals import FinalTiming, Proof

AS_GIVEN = "as given"
BEST_PLAIN = "best plain engine"
_ROUNDS = timing.FULL.fewest


@dataclass(frozen=True, kw_only=True)
class Offer:
    """One certified candidate with its final figures."""

    chosen: Chosen
    verdict: Verdict
    classes: tuple[ClassChange, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Final:
    """What the end of a run adds to its store.

    Args:
        baselines: the network as given and the best plain engine.
        offers: the certified candidates that meet the caps; where none does, all of them. The result first, the others by cost.
        taken: number of the offer's trial that is the result; None where a cap is missed.
        closest_miss: in words.
    """

    baselines: dict[str, Baseline]
    offers: tuple[Offer, ...]
    taken: int | None
    closest_miss: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "baselines": {name: b.to_json() for name, b in self.baselines.items()},
            "offers": [[o.chosen.to_json(), o.verdict, [c.to_json() for c in o.classes]] for o in self.offers],
            "taken": self.taken,
            "closest_miss": self.closest_miss,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Final:
        """What `to_json` wrote."""
        offers = tuple(
            Offer(chosen=Chosen.from_json(chosen), verdict=verdict, classes=tuple(ClassChange.from_json(c) for c in classes))
            for chosen, verdict, classes in record["offers"]
        )
        baselines = {name: Baseline.from_json(b) for name, b in record["baselines"].items()}
        return cls(baselines=baselines, offers=offers, taken=record["taken"], closest_miss=record["closest_miss"])

    def offer(self, number: int | None) -> Offer | None:
        """The offer of a trial, if there is one."""
        return next((o for o in self.offers if o.chosen.trial == number), None)

    def pick(self, which: str, batch: int) -> int:
        """The trial number of an offer: "fastest", "smallest", "balanced" (the least latency · size), or a number.

        Raises:
            UsageError: on another word, and on a number that is not certified.
        """
        if self.taken is None:
            raise UsageError(f"there is nothing to pick: {self.closest_miss}")

        def cost(chosen: Chosen) -> float:
            ms = next(entry.p50_ms for entry in chosen.latency_ms if entry.batch == batch)
            return {"fastest": ms, "smallest": float(chosen.size_bytes)}.get(which, ms * chosen.size_bytes)

        if which in ("fastest", "smallest", "balanced"):
            return min((o.chosen for o in self.offers), key=cost).trial
        known = [o.chosen.trial for o in self.offers]
        if which.isdigit() and int(which) in known:
            return int(which)
        raise UsageError(f"pick must be fastest, smallest, balanced or one of the certified trials {known}, got {which!r}")


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
    picked = store.fact("picked")
    taken = final.offer(final.taken if picked is None else picked) if final and final.taken is not None else None
    trials = tuple(store.trials())
    used, left_out = portions.told(store)
    died = [f"ran on *select*, failed on *prove* and is no result: {told}" for told in (store.fact("died") or {}).values()]
    batch = settings["batch"]
    asked = Settings(
        limit=Limit.from_json(settings["limit"]),
        goals=tuple(settings.get("goals", ("latency",))),
        batch=batch,
        batches=tuple(settings["batches"]),
        prove_examples=settings.get("prove_examples"),
    )
    return Report(
        state="finished" if final else state or "interrupted",
        verdict=taken.verdict if taken else None,
        sentence="",
        limit=asked.limit,
        score_name=task.get("score_name", "score"),
        provenance=task.get("provenance", "unknown"),
        examples={**task.get("examples", {}), **used},
        baselines=final.baselines if final else _ranking_baseline(trials),
        chosen=taken.chosen if taken else None,
        closest_miss=final.closest_miss if final else None,
        certificates=tuple(Certificate.from_json(c) for c in store.fact("certificates") or ()),
        pareto=pareto(trials, batch),
        ledger=tuple(LedgerLine.from_json(line) for line in store.fact("ledger") or ()),
        findings=diagnose(store.fact("survey") or {}, trials, asked, taken.chosen.recipe if taken else None),
        classes=taken.classes if taken else (),
        class_names=tuple(task.get("classes") or ()),
        input_names=tuple(task.get("inputs") or ()),
        input_shapes=tuple(_shape(i) for i in (task.get("summary") or {}).get("inputs", ())),
        openings=store.openings(),
        trials=trials,
        notes=(*task.get("notes", ()), *left_out, *died, *_cautions(asked, trials, taken.chosen if taken else None)),
        batch=batch,
        batches=asked.batches,
        fixed_batch=task.get("fixed_batch"),
        objective=asked.goals,
        offers=tuple(o.chosen for o in final.offers) if taken and final else (),
        artifact=_artifact(run),
        command=task.get("command", ""),
        seed=settings["seed"],
        seconds=store.fact("seconds") or 0.0,
        environment=store.fact("environment") or machine.environment(),
    )


def _cautions(asked: Settings, trials: Sequence[Trial], chosen: Chosen | None) -> Iterator[str]:
    """What weakens the figures, or makes the limit mean little."""
    score = trials[0].measurement.score if trials and trials[0].measurement else None
    if score is not None and 0 < abs(score) <= asked.limit.max_drop:
        yield f"the limit {asked.limit.max_drop:g} is as large as the score of the network as given, {score:.4g}: say --max-drop 5%rel"
    if chosen and any(gain.vague for gain in chosen.speedup):
        yield "the times scatter so much that the machine was probably busy: do not rely on the speed-ups, run again with less beside it"
    launches = min((entry.launches for entry in chosen.latency_ms), default=_ROUNDS) if chosen else _ROUNDS
    if launches < _ROUNDS:
        yield f"the final timing had time for {launches} rounds of fresh launches; with more time it has {_ROUNDS}"


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
    return {name: _baseline(bench, trial, timed, proof) for name, trial in ((AS_GIVEN, original), (BEST_PLAIN, plain))}


def _baseline(bench: Bench, trial: Trial, timed: FinalTiming, proof: Proof) -> Baseline:
    assert trial.measurement
    return Baseline(
        trial=trial.number,
        words=trial.words,
        score=bench.score.value(proof.outputs.get(trial.number, proof.original), proof.target),
        size_bytes=trial.measurement.size_bytes,
        peak_memory_bytes=timed.memory[trial.number],
        parameters=trial.measurement.parameters,
        macs=trial.measurement.macs,
        latency_ms=timed.latency[trial.number],
        energy_mj=trial.measurement.energy_mj,
    )


def miss_words(trials: Mapping[int, Trial], best: Chosen, caps: Sequence[str], limit: Limit) -> str:
    """The closest miss in one line: the certified candidate that came nearest, and the smallest where size is the trouble."""
    words = f"{best.words} has {', '.join(caps)}"
    if limit.size_bytes is None:
        return words
    small = min((t for t in trials.values() if t.measurement), key=lambda t: t.measurement.size_bytes)  # type: ignore[union-attr]
    assert small.measurement
    return f"{words}; the smallest tried is {small.words} with {small.measurement.size_bytes:,} bytes"


def class_changes(score: Score, proof: Proof, number: int, task: Mapping[str, Any]) -> tuple[ClassChange, ...]:
    """The score of each class on *prove* before and after, where there are classes and a score per example."""
    if proof.view.labels is None:
        return ()
    values = [score.per_example(outputs, proof.target) for outputs in (proof.original, proof.outputs[number])]
    found = by_class(proof.view.labels, values, task.get("classes") or [])
    return tuple(ClassChange(name=name, n=n, before=before, after=after) for name, n, (before, after) in found)


def by_class(labels: Array | None, values: Sequence[Array | None], names: Sequence[str]) -> Iterator[tuple[str, int, list[float]]]:
    """For each class its name, its number of examples and the means of the scores per example; nothing where there are no classes.

    Args:
        labels: (n,) integers; values: (n,) each, None for a score that has none; names: of the classes, as far as they have some.
    """
    known = [v for v in values if v is not None]
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu" or len(known) < len(values):
        return
    for label in np.unique(labels):
        rows = labels == label
        yield names[label] if label < len(names) else str(label), int(rows.sum()), [float(v[rows].mean()) for v in known]


def _shape(described: Mapping[str, Any]) -> str:
    """Of one example: "1×28×28 float32"."""
    sizes = "×".join(str(size) for size in described["shape"][1:])
    return f"{sizes or 'a number,'} {described['dtype']}"


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
