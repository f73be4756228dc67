"""From many trials to one result: the heat among the contenders, the ablation, the proof, and the final timing.

Everything before the proof looks at *select* alone.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hasten.core.data import Sealed, View
from hasten.core.errors import UsageError
from hasten.core.network import Arrays
from hasten.core.recipe import Recipe, describe
from hasten.core.report import Certificate, Interval, Latency, LedgerLine, Limit, Trial
from hasten.core.runner import Runner
from hasten.measure import timing
from hasten.search import ledger, prover
from hasten.search.bench import SCORING_BATCH, Bench

Progress = Callable[[float, str], None]
CONTENDERS = 6
NO_GAIN = 1.01


def contenders(trials: Sequence[Trial], limit: Limit, batch: int) -> list[Trial]:
    """The fastest trials that no other beats in both speed and score, and whose drop on *select* is not beyond hope."""
    ran = [t for t in trials if t.measurement and t.measurement.score_drop <= 1.5 * limit.max_drop + 1e-9]
    ran.sort(key=lambda t: t.measurement.at(batch).p50_ms)  # type: ignore[union-attr]
    front = [
        t
        for t in ran
        if not any(_beats(other, t, batch) for other in ran)  # clearly: ranking times are off by several percent
    ]
    return front[:CONTENDERS]


def _beats(one: Trial, other: Trial, batch: int) -> bool:
    assert one.measurement
    assert other.measurement
    faster = one.measurement.at(batch).p50_ms * 1.15 < other.measurement.at(batch).p50_ms
    return faster and one.measurement.score_drop <= other.measurement.score_drop


def heat(bench: Bench, trials: Sequence[Trial], progress: Progress | None = None) -> dict[int, float]:
    """Latency in milliseconds at the user's batch size, by trial number, of contenders timed side by side in one go."""
    ordered = sorted(trials, key=lambda t: t.number)
    name = f"heat {','.join(str(t.number) for t in ordered)}"
    batch = bench.settings.batch

    def run() -> dict[str, float]:
        timed = timing.race(
            [bench.contestant(t) for t in ordered],
            bench.select.inputs,
            [batch],
            protocol=timing.RANKING,
            progress=progress,
        )
        medians = np.exp(np.log(timed.medians_ms[:, :, 0]).mean(axis=0))
        return {str(t.number): float(ms) for t, ms in zip(ordered, medians, strict=True)}

    return {int(number): ms for number, ms in bench.store.once(name, run).items()}


def ablate(bench: Bench, best: Trial, progress: Progress | None = None) -> tuple[Trial, list[LedgerLine]]:
    """Takes each step out of the best recipe in turn. A step that brings no measured gain is left out of the result.

    Returns:
        The recipe that is left, as a trial, and what each of its parts bought and cost.
    """
    while True:
        recipe = Recipe.from_json(best.recipe)
        without = {}
        for at, step in enumerate(recipe.steps):
            try:
                shorter = Recipe((*recipe.steps[:at], *recipe.steps[at + 1 :]), recipe.engine)
            except UsageError:
                continue
            without[step] = bench.attempt(shorter, progress)
        measured = {s: t for s, t in without.items() if t.measurement}
        times = heat(bench, [best, *measured.values()], progress) if measured else {}
        useless = [t for t in measured.values() if _no_worse(t, best, times)]
        if not useless:
            return best, [_line(describe(s), best, t, times) for s, t in measured.items()]
        best = min(useless, key=lambda t: times[t.number])


def _no_worse(shorter: Trial, best: Trial, times: dict[int, float]) -> bool:
    assert shorter.measurement
    assert best.measurement
    slower = times[shorter.number] > NO_GAIN * times[best.number]
    return not slower and shorter.measurement.score_drop <= best.measurement.score_drop


def _line(part: str, best: Trial, without: Trial, times: dict[int, float]) -> LedgerLine:
    assert best.measurement
    assert without.measurement
    return LedgerLine(
        part=part,
        latency_ms=times[without.number] - times[best.number],
        size_bytes=without.measurement.size_bytes - best.measurement.size_bytes,
        score_drop=best.measurement.score_drop - without.measurement.score_drop,
    )


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

    The best plain engine is held against the original first and by itself: that its outputs are equal is no estimate.
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
                outputs[trial.number] = _outputs(bench, trial, view)
            yield trial.number, outputs[trial.number], Recipe.from_json(trial.recipe).lossless

    limit, seed = bench.settings.limit, bench.settings.seed
    found = []
    for group in ([original], [plain], [t for t in frozen if t.number not in (original.number, plain.number)]):
        found += prover.certify(base, target, answers(group), score=bench.score, limit=limit, seed=seed)
    unique = {certificate.trial: certificate for certificate in reversed(found)}
    ordered = tuple(sorted(unique.values(), key=found.index))
    return Proof(certificates=ordered, original=base, target=target, view=view, outputs=outputs)


def _outputs(bench: Bench, trial: Trial, view: View) -> Arrays:
    with Runner(bench.package(trial.number), fixed_batch=bench.facts(trial.number)["fixed_batch"]) as runner:
        return runner.outputs(view.inputs, batch=SCORING_BATCH)


@dataclass(frozen=True, kw_only=True)
class FinalTiming:
    """The full protocol among the network as given, the best plain engine, and the fastest certified candidate."""

    original: tuple[Latency, ...]
    plain: tuple[Latency, ...]
    best: tuple[Latency, ...]
    over_original: tuple[Interval, ...]
    over_plain: tuple[Interval, ...]
    plain_over_original: tuple[Interval, ...]
    memory: tuple[int, int, int]


def final_timing(bench: Bench, original: Trial, plain: Trial, best: Trial, progress: Progress | None = None) -> FinalTiming:
    """Times the three in fresh launches; only these figures are quoted."""
    unique = list({t.number: t for t in (original, plain, best)}.values())
    place = {t.number: i for i, t in enumerate(unique)}
    timed = timing.race([bench.contestant(t) for t in unique], bench.select.inputs, bench.settings.batches, progress=progress)
    old, middle, new = (place[t.number] for t in (original, plain, best))
    return FinalTiming(
        original=timed.latency(old),
        plain=timed.latency(middle),
        best=timed.latency(new),
        over_original=_ratio(timed, old, new),
        over_plain=_ratio(timed, middle, new),
        plain_over_original=_ratio(timed, old, middle),
        memory=(timed.peak_memory_bytes[old], timed.peak_memory_bytes[middle], timed.peak_memory_bytes[new]),
    )


def _ratio(timed: timing.Timing, old: int, new: int) -> tuple[Interval, ...]:
    if old != new:
        return timed.speedup(old, new)
    return tuple(replace(i, value=1.0, low=1.0, high=1.0) for i in timed.speedup(0, 0)) if len(timed.medians_ms) else ()
