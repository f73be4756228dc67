"""From the trials to the result: heat, ablation, the frozen order, the proof, the final timing, the choice."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hasten.core.report import Bound, Certificate, Chosen, Interval, LedgerLine, Limit, Measurement, Trial
from hasten.search import export, finals, prover, summary
from hasten.search.anytime import BEST, SAFE, is_plain
from hasten.search.bench import Bench
from hasten.search.catalogue import Settings
from hasten.search.clock import Clock
from hasten.search.finals import FinalTiming, Heat, Proof
from hasten.search.objective import Objective, missed
from hasten.search.risk import risks

if TYPE_CHECKING:
    from hasten.search.run import Job

_CONTENDER_S = 10.0  # of the heats, the proof and the final timing, for one contender
_OFFER_ROUNDS = 6.0  # of the final timing, that an offer should get
_ABLATION = 1 / 4  # of the time left


def finish(job: Job, bench: Bench, clock: Clock) -> None:
    """What follows the last trial. Each stage leaves its result in the store."""
    settings = job.settings
    cost = settings.objective.cost
    # Those of the search alone: a run that goes on after its ablation must find the contenders that it had.
    searched = set(job.store.once("searched", lambda: [t.number for t in job.store.trials()]))
    trials = [t for t in job.store.trials() if t.number in searched]
    original, plain = trials[0], plain_best(trials, settings.objective)
    progress = job.watch.progress
    _begin(job, clock, "heat", "timing the contenders side by side")
    proof_s = (job.store.fact("fitted") or {}).get("each_s", 0.0) * job.views.prove.size
    fit = job.store.once("rivals", lambda: fitting(clock.left_s(), _CONTENDER_S + proof_s, 2))
    rivals = finals.contenders(trials, settings)[:fit]
    hot = finals.heat(bench, unique([*rivals, plain]), progress)
    plain = min((t for t in unique([*rivals, plain]) if is_plain(t)), key=lambda t: cost(hot[t.number]))
    _begin(job, clock, "ablation", "taking each step out in turn")
    lines, leader = _ablation(job, bench, clock, rivals, hot)
    rivals = unique([leader, *rivals, plain])
    hot = finals.heat(bench, rivals, progress)
    risk = risks(unique([*trials, *rivals]), settings)
    points = [(t.number, hot[t.number].score_drop, risk[t.number], cost(hot[t.number])) for t in rivals]
    small = finals.smallest([*trials, *rivals], rivals, settings) if len(rivals) <= fit else []
    frozen = job.store.once("frozen", lambda: [*prover.freeze(points, limit=settings.limit), *(t.number for t in small)])
    job.store.remember("ledger", [line.to_json() for line in lines])
    _begin(job, clock, "proof", "opening the proof data, once")
    by_number = {t.number: t for t in job.store.trials()}
    proof = finals.prove(bench, job.views.prove, original, plain, [by_number[n] for n in frozen], progress)
    job.store.remember("certificates", [c.to_json() for c in proof.certificates])
    if all(c.trial != plain.number for c in proof.certificates):
        plain = original  # it ran on *select* and dies on *prove*
    _begin(job, clock, "timing", "timing the result in fresh launches")
    certified = {c.trial: by_number[c.trial] for c in proof.certificates if passes(c, settings.limit.accept)}
    ranked = sorted(certified.values(), key=lambda t: cost(hot[t.number]) if t.number in hot else float("inf"))
    each_s = max(finals.round_s(t, settings.batches) for t in (plain, *ranked[:1]))
    offers = ranked[: job.store.once("offered", lambda: min(finals.OFFERS, fitting(clock.left_s(), _OFFER_ROUNDS * each_s, 3) - 2))]
    timed = finals.final_timing(bench, original, plain, offers[::-1], clock.left_s(), progress)
    _conclude(job, bench, Finalists(original=original, plain=plain, certified=tuple(certified.values()), timed=timed), proof)


def _begin(job: Job, clock: Clock, stage: str, words: str) -> None:
    job.store.remember("seconds", clock.used_s())
    job.watch.stage(stage, words)


def fitting(left_s: float, each_s: float, least: int) -> int:
    """How many things that take so long fit into the time left; at least `least`."""
    return max(least, int(min(left_s / each_s, 1e6)))


def take(job: Job, bench: Bench, number: int, *, name: str = SAFE) -> None:
    """Puts the package of a trial into `artifact/`."""
    trials = job.store.trials()
    export.package(job.folder, bench, next(t for t in trials if t.number == number), trials[0], name=name)


@dataclass(frozen=True, kw_only=True)
class Finalists:
    """What the final timing compared.

    Args:
        original, plain: the network as given, and unchanged in its best engine.
        certified: the trials that *prove* let through; those that were timed count.
        timed: the figures.
    """

    original: Trial
    plain: Trial
    certified: tuple[Trial, ...]
    timed: FinalTiming

    def within(self, limit: Limit, batch: int) -> list[Trial]:
        """The certified trials that were timed and meet all caps."""
        return [t for t in self.known() if not self.missed(t, limit, batch)]

    def known(self) -> list[Trial]:
        """The certified trials that were timed."""
        return [t for t in self.certified if t.number in self.timed.latency]

    def missed(self, trial: Trial, limit: Limit, batch: int) -> list[str]:
        """The caps that a trial misses, in words."""
        speedup = next(i.value for i in self.timed.over_original[trial.number] if i.batch == batch)
        return missed(self.timed.measured(trial), speedup, limit, batch)

    def ranked(self, among: Sequence[Trial], objective: Objective) -> list[Trial]:
        """The result first, then by cost.

        A change that is not equal must be shown better than the plain engine (the low end of the interval above 1.02), where the
        plain engine is among them. Equal outputs risk nothing, so the estimate decides between it and the network as given.
        """
        figures = {t.number: self.timed.measured(t) for t in {t.number: t for t in (*among, self.plain)}.values()}
        numbers = {t.number for t in among}
        safe = self.plain.number in numbers

        def gain(trial: Trial) -> Interval:
            return objective.gain(figures[self.plain.number], figures[trial.number], self.timed.over_plain[trial.number])

        shown = [t for t in among if not safe or t.number == self.plain.number or gain(t).faster]
        if self.original.number in numbers and safe and gain(self.original).value > 1:
            shown = [t for t in shown if t.number != self.plain.number] + [self.original]
        first = sorted(unique(shown), key=lambda t: objective.cost(figures[t.number]))
        return unique([*first, *sorted(among, key=lambda t: objective.cost(figures[t.number]))])


def _conclude(job: Job, bench: Bench, finalists: Finalists, proof: Proof) -> None:
    """Chooses among the certified trials, falls back where nothing is gained, and exports."""
    settings, limit = job.settings, job.settings.limit
    within = finalists.within(limit, settings.batch)
    offered = finalists.ranked(within or finalists.known(), settings.objective)
    offers = tuple(_offer(job, bench, t, finalists.timed, proof) for t in offered)
    best = offered[0]
    caps = finalists.missed(best, limit, settings.batch)
    by_number = {t.number: t for t in job.store.trials()}
    final = summary.Final(
        baselines=summary.baselines(bench, finalists.original, finalists.plain, finalists.timed, proof),
        offers=offers,
        taken=None if caps else best.number,
        closest_miss=summary.miss_words(by_number, offers[0].chosen, caps, limit) if caps else None,
    )
    take(job, bench, best.number, name=BEST if caps else SAFE)
    if not caps:
        shutil.rmtree(job.folder / BEST, ignore_errors=True)
    job.store.remember("final", final.to_json())  # the last thing: a run that has it is only reported


def _ablation(job: Job, bench: Bench, clock: Clock, rivals: Sequence[Trial], hot: Heat) -> tuple[list[LedgerLine], Trial]:
    leader = leading(rivals, hot, job.settings)
    with bench.workshop.within(max(1.0, _ABLATION * clock.left_s())):  # a step whose absence takes a training goes unmeasured
        leader, lines = finals.ablate(bench, leader, job.watch.progress)
    return lines, leader


def leading(rivals: Sequence[Trial], hot: Mapping[int, Measurement], settings: Settings) -> Trial:
    """Of the lowest cost among those that a proof is expected of, else among those within the limit, else among all."""
    likely = [t for t in rivals if settings.promising(hot[t.number])]
    within = [t for t in rivals if hot[t.number].score_drop <= settings.limit.max_drop]
    return min(likely or within or rivals, key=lambda t: settings.objective.cost(hot[t.number]))


def _offer(job: Job, bench: Bench, trial: Trial, timed: FinalTiming, proof: Proof) -> summary.Offer:
    certificate = next(c for c in proof.certificates if c.trial == trial.number)
    facts, measured = bench.facts(trial.number), timed.measured(trial)
    chosen = Chosen(
        trial=trial.number,
        recipe=trial.recipe,
        words=trial.words,
        speedup=timed.over_original[trial.number],
        speedup_over_best_plain=timed.over_plain[trial.number],
        score=bench.score.value(proof.outputs[trial.number], proof.target),
        score_drop=certificate.bound or Bound(value=0.0, upper=0.0, n=len(proof.view), method="equal outputs"),
        size_bytes=measured.size_bytes,
        peak_memory_bytes=measured.peak_memory_bytes,
        parameters=facts["parameters"],
        macs=facts["macs"],
        latency_ms=measured.latency,
        energy_mj=measured.energy_mj,
    )
    classes = summary.class_changes(bench.score, proof, trial.number, job.store.fact("task") or {})
    return summary.Offer(chosen=chosen, verdict=certificate.verdict, classes=classes)


def plain_best(trials: Sequence[Trial], objective: Objective) -> Trial:
    """The unchanged network in its best plain engine, by ranking figures."""
    return min((t for t in trials if is_plain(t)), key=lambda t: objective.cost(t.measurement))  # type: ignore[arg-type]


def passes(certificate: Certificate, accept: str) -> bool:
    """Whether a candidate may be the result."""
    return certificate.verdict in ("equal", "kept") or (accept == "point" and certificate.verdict == "not shown")


def unique(trials: Sequence[Trial]) -> list[Trial]:
    """Each trial once."""
    return list({t.number: t for t in trials}.values())
