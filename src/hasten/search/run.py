"""The search from the first trial to the report. Every stage leaves its result in the store, so a killed run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hasten.core import folder
from hasten.core.data import Views
from hasten.core.errors import ModelRefused
from hasten.core.recipe import Loss, Recipe, Space, Step
from hasten.core.report import Bound, Certificate, Chosen, LedgerLine, Report, Trial
from hasten.core.score import Score
from hasten.core.store import Store
from hasten.measure import machine
from hasten.search import export, finals, prover, summary
from hasten.search.bench import Bench
from hasten.search.catalogue import Catalogue, Settings
from hasten.search.crew import to_come
from hasten.search.finals import FinalTiming, Proof
from hasten.search.outpost import Hands
from hasten.search.propose import Dialogue, propose
from hasten.search.watch import Watch
from hasten.search.workshop import Workshop


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One run: the folder with `networks/original` and `views`, its store, and what the user asked for."""

    folder: Path
    store: Store
    views: Views
    score: Score
    loss: Loss
    catalogue: Catalogue
    settings: Settings
    watch: Watch
    hands: Hands = field(default_factory=Hands)


def optimize(job: Job) -> Report:
    """Searches, proves, times and exports; a job that was finished before is only reported.

    Raises:
        ModelRefused: if the network does not run as given.
        StorageError: if the run folder cannot be written.
    """
    if job.store.fact("final"):
        return summary.report(job.folder, job.store)
    start = time.monotonic()
    workshop = Workshop(job.folder, loss=job.loss, seed=job.settings.seed, memory_bytes=machine.memory_bytes())
    folder.sweep(job.folder)
    try:
        workshop.crew = job.hands.hire(job.folder, loss=job.loss, seed=job.settings.seed)
        bench = Bench(job.folder, job.store, job.views.select, job.score, job.settings, workshop)
        job = _settle(job, bench)
        _search(job, bench)
        _finish(job, bench)
    finally:
        workshop.close()
        job.store.remember("seconds", (job.store.fact("seconds") or 0.0) + time.monotonic() - start)
    return summary.report(job.folder, job.store)


def _settle(job: Job, bench: Bench) -> Job:
    """Tries the network as given; what the limit is relative to is known from here on."""
    job.watch.stage("search", "measuring the network as given")
    first = bench.attempt(Recipe((), job.catalogue.as_given), job.watch.progress)
    if not first.measurement:
        raise ModelRefused(f"the network does not run as given: {first.reason}")
    settings = job.settings.settled(first.measurement.score)
    bench.settings = settings
    job.store.remember("settings", settings_json(settings))
    return replace(job, settings=settings)


def settings_json(settings: Settings) -> dict[str, Any]:
    """The settings as the report reads them."""
    return {
        "limit": settings.limit.to_json(),
        "batch": settings.batch,
        "batches": list(settings.batches),
        "seed": settings.seed,
        "trials": settings.trials,
    }


def _search(job: Job, bench: Bench) -> None:
    watch, settings = job.watch, job.settings
    spaces = _survey(job, bench.workshop)
    guess = 2 * len(job.catalogue.engines) * (1 + len(spaces)) + 4
    watch.expected_trials = min(settings.trials or guess, guess)

    def begin() -> Dialogue:
        return propose(job.catalogue, spaces, settings)

    dialogue, crew = begin(), bench.workshop.crew
    recipe: Recipe | None = next(dialogue)
    said: list[Trial] = []
    while recipe is not None and (settings.trials is None or len(said) < settings.trials):
        began = time.monotonic()
        if crew:
            crew.follow(begin, said)
        trial = bench.attempt(recipe, watch.progress)
        said.append(trial)
        watch.coming = _coming(begin, said, settings, watch.coming)
        watch.best = _best_words(said, settings)
        watch.ended(trial, time.monotonic() - began)
        try:
            recipe = dialogue.send(trial)
        except StopIteration:
            recipe = None
    if crew:
        crew.drop()


def _survey(job: Job, workshop: Workshop) -> dict[type[Step], Space]:
    kinds = job.catalogue.steps
    found: dict[str, Any] = job.store.once("survey", lambda: workshop.survey(kinds))
    return {
        kind: {name: tuple(values) for name, values in found[kind.__name__]["space"].items()}
        for kind in kinds
        if "space" in found[kind.__name__]
    }


def _coming(begin: Callable[[], Dialogue], said: Sequence[Trial], settings: Settings, last: float | None) -> float:
    """Trials still to come. Looking ahead replays the whole dialogue, so a long one is looked at less often."""
    if last is not None and len(said) > 100 and len(said) % (len(said) // 20):
        return last - 1
    found = to_come(begin, said)
    return found if settings.trials is None else min(found, settings.trials - len(said))


def _best_words(said: Sequence[Trial], settings: Settings) -> str | None:
    limit, batch = settings.limit, settings.batch
    within = [t for t in said if t.measurement and t.measurement.score_drop <= limit.max_drop]
    if not within:
        return None
    best = min(within, key=lambda t: t.measurement.at(batch).p50_ms)  # type: ignore[union-attr]
    first = said[0].measurement
    assert best.measurement
    assert first
    speed = first.at(batch).p50_ms / best.measurement.at(batch).p50_ms
    return f"{speed:.1f}× {best.words} (not proved yet)"


def _finish(job: Job, bench: Bench) -> None:
    watch, settings = job.watch, job.settings
    trials = job.store.trials()
    original = trials[0]
    plain = plain_best(trials, settings.batch)
    export.package(job.folder, bench, plain, original)  # from here on there is a valid artifact
    watch.stage("heat", "timing the contenders side by side")
    rivals = finals.contenders(trials, settings.limit, settings.batch)
    times = finals.heat(bench, _unique([*rivals, plain]), watch.progress)
    plain = min((t for t in _unique([*rivals, plain]) if is_plain(t)), key=lambda t: times[t.number])
    watch.stage("ablation", "taking each step out in turn")
    lines, leader = _ablation(job, bench, rivals, times)
    rivals = _unique([leader, *rivals, plain])
    times = finals.heat(bench, rivals, watch.progress)
    points = [(t.number, t.measurement.score_drop, times[t.number]) for t in rivals if t.measurement]
    frozen = job.store.once("frozen", lambda: prover.freeze(points, limit=settings.limit))
    job.store.remember("ledger", [line.to_json() for line in lines])
    watch.stage("proof", "opening the proof data, once")
    by_number = {t.number: t for t in job.store.trials()}
    proof = finals.prove(bench, job.views.prove, original, plain, [by_number[n] for n in frozen], watch.progress)
    job.store.remember("certificates", [c.to_json() for c in proof.certificates])
    _conclude(job, bench, original, plain, proof, times)


def _ablation(job: Job, bench: Bench, rivals: Sequence[Trial], times: dict[int, float]) -> tuple[list[LedgerLine], Trial]:
    within = [t for t in rivals if t.measurement and t.measurement.score_drop <= job.settings.limit.max_drop]
    fastest = min(within or rivals, key=lambda t: times[t.number])
    leader, lines = finals.ablate(bench, fastest, job.watch.progress)
    return lines, leader


def _conclude(job: Job, bench: Bench, original: Trial, plain: Trial, proof: Proof, times: dict[int, float]) -> None:
    """Times the fastest certified candidate against the baselines, falls back where nothing is gained, and exports."""
    watch, limit, batch = job.watch, job.settings.limit, job.settings.batch
    by_number = {t.number: t for t in job.store.trials()}
    certified = [by_number[c.trial] for c in proof.certificates if passes(c, limit.accept)]
    small = [t for t in certified if not summary.missed_size(t, limit)]
    ranked = sorted(small, key=lambda t: times.get(t.number, float("inf")))
    best = ranked[0] if ranked else plain
    watch.stage("timing", "timing the result in fresh launches")
    timed = finals.final_timing(bench, original, plain, best, watch.progress)
    best, timed = fall_back(original, plain, best, timed, allowed=[t.number for t in small], batch=batch)
    missed = [*summary.missed_size(best, limit), *summary.missed_speed(timed, limit, batch)]
    chosen = _chosen(bench, best, timed, proof)
    final = summary.Final(
        baselines=summary.baselines(bench, original, plain, timed, proof),
        chosen=None if missed else chosen,
        closest_miss=summary.miss_words(by_number, chosen, missed, limit) if missed else None,
        verdict=next(c.verdict for c in proof.certificates if c.trial == best.number),
        classes=summary.class_changes(bench.score, proof, best.number, job.store.fact("task") or {}),
    )
    export.package(job.folder, bench, best, original, name="best-so-far" if missed else "artifact")
    job.store.remember("final", final.to_json())


def fall_back(
    original: Trial, plain: Trial, best: Trial, timed: FinalTiming, *, allowed: Sequence[int], batch: int
) -> tuple[Trial, FinalTiming]:
    """What is returned after the final timing: `best`, or the plain engine, or the network as given, with its figures.

    A lossy result must be shown faster than the plain engine (the low end of the interval above 1). Equal outputs risk nothing,
    so the estimate decides between the plain engine and the network as given. `allowed`: numbers that are within the caps.
    """
    if best.number != plain.number and not _at(timed.over_plain, batch).faster and plain.number in allowed:
        best, timed = plain, summary.with_best(timed, plain=True)
    helped = plain.number == original.number or _at(timed.plain_over_original, batch).value > 1
    if best.number == plain.number and not helped and original.number in allowed:
        best, timed = original, summary.with_best(timed, plain=False)
    return best, timed


def _chosen(bench: Bench, best: Trial, timed: FinalTiming, proof: Proof) -> Chosen:
    assert best.measurement
    certificate = next(c for c in proof.certificates if c.trial == best.number)
    facts = bench.facts(best.number)
    return Chosen(
        trial=best.number,
        recipe=best.recipe,
        words=best.words,
        speedup=timed.over_original,
        speedup_over_best_plain=timed.over_plain,
        score=bench.score.value(proof.outputs[best.number], proof.target),
        score_drop=certificate.bound or Bound(value=0.0, upper=0.0, n=len(proof.view), method="equal outputs"),
        size_bytes=best.measurement.size_bytes,
        peak_memory_bytes=timed.memory[2],
        parameters=facts["parameters"],
        macs=facts["macs"],
        latency_ms=timed.best,
    )


def is_plain(trial: Trial) -> bool:
    """Whether a trial is the unchanged network in a lossless engine."""
    recipe = Recipe.from_json(trial.recipe)
    return trial.measurement is not None and not recipe.steps and recipe.lossless


def plain_best(trials: Sequence[Trial], batch: int) -> Trial:
    """The fastest plain engine of the unchanged network, by ranking time."""
    return min((t for t in trials if is_plain(t)), key=lambda t: t.measurement.at(batch).p50_ms)  # type: ignore[union-attr]


def passes(certificate: Certificate, accept: str) -> bool:
    """Whether a candidate may be the result."""
    return certificate.verdict in ("equal", "kept") or (accept == "point" and certificate.verdict == "not shown")


def _unique(trials: Sequence[Trial]) -> list[Trial]:
    return list({t.number: t for t in trials}.values())


def _at(intervals: Sequence[Any], batch: int) -> Any:
    return next(i for i in intervals if i.batch == batch)
