"""From many trials to one result: the heat among the contenders, the ablation, the proof, and the final timing.

Everything before the proof looks at *select* alone.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hasten.core.data import Sealed, View
from hasten.core.errors import ChildFailed, UsageError
from hasten.core.network import Arrays
from hasten.core.recipe import Recipe, Stage, Step, describe
from hasten.core.report import Certificate, Interval, Latency, LedgerLine, Measurement, Trial
from hasten.core.runner import Runner
from hasten.measure import timing
from hasten.search import ledger, prover
from hasten.search.bench import Bench
from hasten.search.catalogue import Settings
from hasten.search.objective import missed, timed
from hasten.search.risk import risks

Progress = Callable[[float, str], None]
Heat = dict[int, Measurement]
CONTENDERS, RISKY = 5, 2
CLEARLY = 1.15
HEATING = 1 / 4  # of the time left, that a heat may take; where it would take longer the times of the trials themselves have to do
_LAUNCH_S, _BATCH_MS, _CALLS = 1.0, 300.0, 6  # of a contestant in a round: to start, and for a batch size so long or so many calls
NO_GAIN = 1.01
OFFERS = 4


def contenders(trials: Sequence[Trial], settings: Settings) -> list[Trial]:
    """The trials of the lowest cost that no other beats in both cost and risk; where some meet all caps, of these alone.

    Of those that a proof is to be expected of the fastest, and the safest whose answers changed; and a few that may surprise: their drop
    on *select* is not beyond hope.
    """
    cost, hopeful, known = settings.objective.cost, 1.5 * settings.limit.max_drop + 1e-9, risks(trials, settings)
    measured = [t for t in trials if t.measurement and t.measurement.score_drop <= hopeful]
    capped = [t for t in measured if not _misses(_measured(t), _measured(trials[0]), settings)]
    ran = [(cost(_measured(t)), known[t.number], t) for t in capped or measured]
    ran.sort(key=lambda row: row[0])
    front, at, least = [], 0, math.inf  # the least risk among those that cost clearly less: ranking times are off by several percent
    for own, risk, trial in ran:
        while ran[at][0] * CLEARLY < own:
            least = min(least, ran[at][1])
            at += 1
        if risk < least:
            front.append(trial)
    likely = [t for t in front if settings.promising(_measured(t))]
    numbers = {t.number for t in likely}
    fastest = likely[: CONTENDERS - 1]
    safest = [t for t in likely[CONTENDERS - 1 :] if _measured(t).max_difference > prover.EQUAL_TOLERANCE][-1:]
    return [*fastest[:1], *safest, *fastest[1:], *[t for t in front if t.number not in numbers][:RISKY]]


def smallest(trials: Sequence[Trial], rivals: Sequence[Trial], settings: Settings) -> list[Trial]:
    """The smallest trial that a proof is expected of, where it is clearly smaller than all that stand for their speed; else nothing."""
    likely = [t for t in trials if t.measurement and settings.promising(t.measurement)]
    found = min(likely, key=lambda t: (_measured(t).size_bytes, t.number), default=None)
    least = min((_measured(t).size_bytes for t in rivals), default=0)
    return [found] if found and CLEARLY * _measured(found).size_bytes < least else []


def _misses(measured: Measurement, first: Measurement, settings: Settings) -> list[str]:
    speedup = first.at(settings.batch).p50_ms / measured.at(settings.batch).p50_ms
    return missed(measured, speedup, settings.limit, settings.batch)


def heat(bench: Bench, trials: Sequence[Trial], progress: Progress | None = None) -> Heat:
    """Measurements by trial number, with the times of contenders timed side by side in one go.

    Where that takes too long, or one of them fails, each keeps the times of its trial.
    """
    ordered = sorted(trials, key=lambda t: t.number)
    name = f"heat {','.join(str(t.number) for t in ordered)}"
    batches = bench.settings.objective.batches

    def run() -> dict[str, list[float]]:
        known = {str(t.number): [_measured(t).at(batch).p50_ms for batch in batches] for t in ordered}
        if timing.RANKING.most * sum(round_s(t, batches) for t in ordered) > HEATING * bench.left_s():
            return known
        runners = [bench.contestant(t) for t in ordered]
        try:
            found = timing.race(runners, bench.select.inputs, batches, protocol=timing.RANKING, progress=progress)
        except ChildFailed:
            return known
        medians = np.exp(np.log(found.medians_ms).mean(axis=0))
        return {str(t.number): [float(ms) for ms in row] for t, row in zip(ordered, medians, strict=True)}

    told = bench.store.once(name, run)
    return {t.number: timed(_measured(t), dict(zip(batches, told[str(t.number)], strict=True))) for t in ordered}


def round_s(trial: Trial, batches: Sequence[int]) -> float:
    """Seconds that a contestant is expected to take in a round of timing."""
    return _LAUNCH_S + sum(max(_BATCH_MS, _CALLS * _measured(trial).at(batch).p50_ms) for batch in batches) / 1e3


def ablate(bench: Bench, best: Trial, progress: Progress | None = None) -> tuple[Trial, list[LedgerLine]]:
    """Takes each step out of the best recipe in turn. A step that brings no measured gain is left out of the result.

    A step that changes the structure takes the training behind it along, where nothing is left that lost anything: the training is
    there to mend it.

    Returns:
        The recipe that is left, as a trial, and what each of its parts bought and cost.
    """
    settings, first = bench.settings, _measured(bench.store.trials()[0])
    cost = settings.objective.cost
    while True:
        recipe = Recipe.from_json(best.recipe)
        without: dict[Step, Trial] = {}
        for step in recipe.steps:
            try:
                shorter = Recipe(_without(recipe.steps, step), recipe.engine)
            except UsageError:
                continue
            without[step] = bench.attempt(shorter, progress)
        ran = {s: t for s, t in without.items() if t.measurement}
        hot = heat(bench, [best, *{t.number: t for t in ran.values()}.values()], progress) if ran else {}
        hopeful = [t for t in ran.values() if _no_worse(hot[t.number], hot[best.number], cost)]
        useless = [t for t in hopeful if not _misses(hot[t.number], first, settings) or _misses(hot[best.number], first, settings)]
        if not useless:
            lines = [_line(recipe.steps, s, hot[best.number], hot[t.number], bench.settings.objective.batches[0]) for s, t in ran.items()]
            return best, lines + [_unknown(s, t) for s, t in without.items() if s not in ran]
        best = min(useless, key=lambda t: cost(hot[t.number]))


def _without(steps: tuple[Step, ...], step: Step) -> tuple[Step, ...]:
    left = tuple(s for s in steps if s is not step)
    losing = [s for s in left if s.stage == Stage.STRUCTURE and not s.lossless]
    mended = step.stage == Stage.STRUCTURE and not step.lossless and not losing
    return tuple(s for s in left if not (mended and _mends(s))) if mended else left


def _mends(step: Step) -> bool:
    return step.stage == Stage.TRAIN and step.aims == {"score"}


def _no_worse(shorter: Measurement, best: Measurement, cost: Callable[[Measurement], float]) -> bool:
    return cost(shorter) <= NO_GAIN * cost(best) and shorter.score_drop <= best.score_drop


def _line(steps: tuple[Step, ...], step: Step, best: Measurement, without: Measurement, batch: int) -> LedgerLine:
    along = len(steps) - len(_without(steps, step)) > 1
    return LedgerLine(
        part=describe(step),
        latency_ms=without.at(batch).p50_ms - best.at(batch).p50_ms,
        size_bytes=without.size_bytes - best.size_bytes,
        score_drop=best.score_drop - without.score_drop,
        note="with the training behind it" if along else "",
    )


def _unknown(step: Step, trial: Trial) -> LedgerLine:
    return LedgerLine(part=describe(step), latency_ms=None, size_bytes=None, score_drop=None, note=f"without it: {trial.reason}")


def _measured(trial: Trial) -> Measurement:
    assert trial.measurement
    return trial.measurement


@dataclass(frozen=True, kw_only=True, eq=False)
class Proof:
    """What *prove* said: a certificate per tested candidate, and the outputs behind them."""

    certificates: tuple[Certificate, ...]
    original: Arrays
    target: np.ndarray
    view: View
    outputs: dict[int, Arrays]


def prove(bench: Bench, sealed: Sealed, original: Trial, plain: Trial, frozen: Sequence[Trial], progress: Progress | None = None) -> Proof:
    """Opens *prove* once and tests the frozen candidates in turn, in their final engines.

    The best plain engine is held against the original first and by itself: that its outputs are equal is no estimate. A candidate that
    fails on these examples ends the tests: it is none that could pass.
    """
    numbers = tuple(t.number for t in frozen)
    identity = bench.store.once("identity", lambda: secrets.token_hex(16))
    view = sealed.open(lambda fingerprint: bench.store.record_opening(ledger.record(fingerprint, numbers, run=identity)))
    base = _outputs(bench, original, view)
    target = view.labels if bench.score.target == "labels" else base[0]
    assert target is not None
    outputs = {original.number: base}

    def answers(trials: Sequence[Trial]) -> Iterator[tuple[int, Arrays, bool]]:
        for at, trial in enumerate(trials):
            if progress:
                progress(at / len(trials), f"proving {trial.words}")
            if trial.number not in outputs:
                try:
                    outputs[trial.number] = _outputs(bench, trial, view)
                except ChildFailed as why:
                    died = {**(bench.store.fact("died") or {}), str(trial.number): f"{trial.words}: {why}"}
                    bench.store.remember("died", died)
                    return
            yield trial.number, outputs[trial.number], Recipe.from_json(trial.recipe).lossless

    limit, seed = bench.settings.limit, bench.settings.seed
    found = []
    for group in ([original], [plain], [t for t in frozen if t.number not in (original.number, plain.number)]):
        found += prover.certify(base, target, answers(group), score=bench.score, limit=limit, seed=seed)
    unique = {certificate.trial: certificate for certificate in reversed(found)}
    ordered = tuple(sorted(unique.values(), key=found.index))
    return Proof(certificates=ordered, original=base, target=target, view=view, outputs=outputs)


def _answers(bench: Bench, trial: Trial) -> bool:
    """Whether it runs by itself."""
    try:
        _outputs(bench, trial, bench.select.take(slice(bench.settings.batch)))
    except ChildFailed:
        return False
    return True


def _outputs(bench: Bench, trial: Trial, view: View) -> Arrays:
    with Runner(bench.package(trial.number), fixed_batch=bench.facts(trial.number)["fixed_batch"]) as runner:
        return runner.outputs(view.inputs)


@dataclass(frozen=True, kw_only=True)
class FinalTiming:
    """The full protocol among the network as given, the best plain engine, and the best certified candidates.

    By trial number: the distribution of the times, peak memory, and the speed-up over the network as given and over the plain engine.
    """

    latency: dict[int, tuple[Latency, ...]]
    memory: dict[int, int]
    over_original: dict[int, tuple[Interval, ...]]
    over_plain: dict[int, tuple[Interval, ...]]

    def measured(self, trial: Trial) -> Measurement:
        """The trial's measurement with these figures in it."""
        number = trial.number
        return replace(_measured(trial), latency=self.latency[number], peak_memory_bytes=self.memory[number])


def final_timing(
    bench: Bench, original: Trial, plain: Trial, offers: Sequence[Trial], left_s: float, progress: Progress | None = None
) -> FinalTiming:
    """Times them in fresh launches; only these figures are quoted. With little time left there are fewer rounds, at least 3.

    An offer that fails now is left out; where each by itself answers, there are too many for this machine at once, and the first goes.
    """
    unique = list({t.number: t for t in (original, plain, *offers)}.values())
    place = {t.number: i for i, t in enumerate(unique)}
    protocol = replace(timing.FULL, hurry_s=max(left_s, 0.0))
    runners = [bench.contestant(t) for t in unique]
    try:
        timed_ = timing.race(runners, bench.select.inputs, bench.settings.batches, protocol=protocol, progress=progress)
    except ChildFailed:
        if not offers:
            raise
        left = [t for t in offers if _answers(bench, t)]
        return final_timing(bench, original, plain, left if len(left) < len(offers) else offers[1:], left_s, progress)
    return FinalTiming(
        latency={number: timed_.latency(at) for number, at in place.items()},
        memory={number: timed_.peak_memory_bytes[at] for number, at in place.items()},
        over_original={number: _ratio(timed_, place[original.number], at) for number, at in place.items()},
        over_plain={number: _ratio(timed_, place[plain.number], at) for number, at in place.items()},
    )


def _ratio(timed_: timing.Timing, old: int, new: int) -> tuple[Interval, ...]:
    found = timed_.speedup(old, new)
    return found if old != new else tuple(replace(i, value=1.0, low=1.0, high=1.0) for i in found)
