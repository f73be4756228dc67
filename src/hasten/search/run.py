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
from hasten.core.report import Report, Trial
from hasten.core.score import Score
from hasten.core.store import Store
from hasten.measure import machine
from hasten.search import ledger, portions, summary, warm
from hasten.search.anytime import Best
from hasten.search.bench import Bench
from hasten.search.board import Dialogue
from hasten.search.catalogue import Catalogue, Settings
from hasten.search.clock import Clock
from hasten.search.conclude import finish, take
from hasten.search.crew import to_come
from hasten.search.outpost import Hands
from hasten.search.pace import trains
from hasten.search.propose import propose
from hasten.search.watch import Watch
from hasten.search.workshop import Workshop

_LEAST_S = 5.0  # that a trial which has begun may take, though the time for trials is over
_UNTRAINED = 1 / 3  # of the time left, that a trial without a training may take: compiling a network must not cost the search


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
    folder.sweep(job.folder)
    if job.store.fact("final"):
        _learn(job)
        return summary.report(job.folder, job.store)
    ledger.check()
    before_s = job.store.fact("seconds") or 0.0
    clock = Clock(limit_s=job.settings.time_limit_s, elapsed_s=job.watch.elapsed_s, before_s=before_s)
    if clock.limit_s is not None:
        job.watch.ends_s = clock.limit_s - before_s
    workshop = Workshop(job.folder, loss=job.loss, seed=job.settings.seed, memory_bytes=machine.memory_bytes())
    try:
        workshop.crew = job.hands.hire(job.folder, loss=job.loss, seed=job.settings.seed)
        bench = Bench(job.folder, job.store, job.views.select, job.score, job.settings, workshop)
        bench.left_s = clock.left_s
        job = _settle(job, bench)
        _search(job, bench, clock)
        finish(job, bench, clock)
        _learn(job)
    finally:
        workshop.close()
        job.store.remember("seconds", clock.used_s())
    return summary.report(job.folder, job.store)


def _learn(job: Job) -> None:
    """Leaves the result as the next search's first guess, once."""
    if job.store.fact("learnt"):
        return
    best = summary.report(job.folder, job.store).chosen
    if best:
        warm.remember(_kept_at(job), Recipe.from_json(best.recipe))
        job.store.remember("learnt", True)


def pick(job: Job, which: str) -> Report:
    """Puts another certified candidate of a finished run into `artifact/`; measures nothing.

    Raises:
        UsageError: if there is no such candidate; see `Final.pick`.
    """
    final = summary.Final.from_json(job.store.fact("final"))
    number = final.pick(which, job.store.fact("settings")["batch"])
    with Workshop(job.folder, loss=job.loss, seed=job.settings.seed, memory_bytes=machine.memory_bytes()) as workshop:
        take(job, Bench(job.folder, job.store, job.views.select, job.score, job.settings, workshop), number)
    job.store.remember("picked", number)
    return summary.report(job.folder, job.store)


def _settle(job: Job, bench: Bench) -> Job:
    """Tries the network as given; what the limit is relative to is known from here on."""
    job.watch.stage("search", "measuring the network as given")
    first = bench.attempt(Recipe((), job.catalogue.as_given), job.watch.progress)
    if not first.measurement:
        job.store.forget(first.number)  # what was wrong may pass: memory, time, a package
        raise ModelRefused(f"the network does not run as given: {first.reason}")
    each_s = max(job.store.fact("fitted")["each_s"], min(e.p50_ms / e.batch for e in first.measurement.latency) / 1e3)
    settings, prove = bench.settings.settled(first.measurement.score), job.views.prove
    if bench.baseline and bench.baseline.values is not None:
        size, _ = job.store.once("proving", lambda: [portions.proving(settings, prove.size, each_s, job.score), prove.size])
        prove = prove if size == prove.size else prove.part(size, seed=settings.seed)
    settings = bench.settings.settled(first.measurement.score, prove.size * each_s)
    settings = replace(settings, select_examples=len(bench.select), prove_examples=settings.prove_examples and prove.size)
    bench.settings = settings
    job.store.remember("settings", settings_json(settings))
    return replace(job, settings=settings, views=replace(job.views, prove=prove))


def settings_json(settings: Settings) -> dict[str, Any]:
    """The settings as the report reads them."""
    return {
        "limit": settings.limit.to_json(),
        "goals": list(settings.goals),
        "batch": settings.batch,
        "batches": list(settings.batches),
        "seed": settings.seed,
        "trials": settings.trials,
        "time_limit_s": settings.time_limit_s,
        "prove_examples": settings.prove_examples,
    }


def _search(job: Job, bench: Bench, clock: Clock) -> None:
    watch = job.watch
    spaces = _survey(job, bench.workshop)
    first_s = job.store.trials()[0].seconds
    settings = replace(job.settings, aside_s=job.store.once("aside", lambda: clock.used_s() - first_s))
    guess = 2 * len(job.catalogue.engines) * (1 + len(spaces)) + 4
    watch.expected_trials = min(settings.trials or guess, guess)
    guesses = _guesses(job)

    def begin() -> Dialogue:
        return propose(job.catalogue, spaces, settings, guesses)

    dialogue, crew, best = begin(), bench.workshop.crew, Best(job, bench)
    recipe: Recipe | None = next(dialogue)
    said = list[Trial]()
    # What is run whatever the time, each for `_LEAST_S` at least.
    race = {Recipe((), engine) for engine in (job.catalogue.as_given, *job.catalogue.engines)}
    while recipe is not None and (settings.trials is None or len(said) < settings.trials):
        if clock.left_s() <= settings.reserve_s and recipe not in race:
            break
        began = time.monotonic()
        seconds = _allowed(recipe, said, clock.left_s() - settings.reserve_s)
        if crew:
            crew.follow(begin, said)
        with bench.workshop.within(seconds):
            trial = bench.attempt(recipe, watch.progress)
        said.append(trial)
        job.store.remember("seconds", clock.used_s())  # a process that is killed has used its time as well
        watch.coming = _coming(begin, said, settings, watch.coming)
        best.see(trial)
        watch.ended(trial, time.monotonic() - began)
        try:
            recipe = dialogue.send(trial)
        except StopIteration:
            recipe = None
    if crew:
        crew.drop()


def _allowed(recipe: Recipe, said: Sequence[Trial], left_s: float) -> float:
    """Seconds that a trial may take: all that are left where it trains, else a third, or twice what the longest so far took."""
    if any(map(trains, recipe.steps)):
        return max(_LEAST_S, left_s)
    longest = max((t.seconds for t in said if t.measurement and not any(map(trains, Recipe.from_json(t.recipe).steps))), default=0.0)
    return max(_LEAST_S, min(left_s, max(_UNTRAINED * left_s, 2 * longest)))


def _guesses(job: Job) -> dict[type[Step], Step]:
    """What came out best on such a network before, as it was known when this run began. With a number of trials the search is to be
    the same wherever and whenever it runs, so it begins at the usual settings."""
    if job.settings.trials is not None:
        return {}
    return warm.parts(job.store.once("guesses", lambda: warm.recall(_kept_at(job))))


def _kept_at(job: Job) -> Path:
    architecture = (job.store.fact("task") or {}).get("architecture")
    return warm.place([architecture, machine.cpu()[0], list(job.settings.goals), job.settings.batch])


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
