"""The verdict as one sentence that says no more than was shown."""

from __future__ import annotations

from hasten.core.report import Bound, Chosen, Interval, Report
from hasten.report import facts, text


def verdict_sentence(report: Report) -> str:
    """What came out, in one sentence: speed with its interval, size, score with its bound, verdict.

    "Faster" is said only where the interval's low end lies above 1.02, "slower" where its high end lies below 1 ÷ 1.02;
    between the two no difference is shown.
    """
    report = text.printable(report)
    outcome = facts.outcome(report)
    if outcome == "unfinished":
        return _unfinished(report)
    if outcome == "no result" or report.chosen is None:
        return _no_result(report)
    if outcome == "as given":
        return f"{_nothing_faster(report)}: the network comes back unchanged{_hint(report)}."
    if outcome == "plain engine":
        return _plain_engine(report, report.chosen)
    return _result(report, report.chosen)


def _result(report: Report, chosen: Chosen) -> str:
    parts = [_speed(report, chosen), *_size(report, chosen)]
    return f"{_capital(', '.join(parts))}; {_score(report, chosen)}: {_standing(report)}."


def _plain_engine(report: Report, chosen: Chosen) -> str:
    interval = facts.at_batch(chosen.speedup, facts.headline_batch(report))
    gain = f", {_compared(interval)} as given ({_spread(interval)}){_other_batches(report, chosen)}" if interval else ""
    kept = f"The network comes back unchanged in {chosen.words}{gain}, outputs equal"
    return f"{kept}; no changed one was proved faster within {_limit(report)}{_hint(report)}."


def _nothing_faster(report: Report) -> str:
    return f"Nothing faster was proved within {_limit(report)}"


def _no_result(report: Report) -> str:
    caps = text.caps(report.limit, facts.headline_batch(report))
    if caps:
        head = f"No candidate certified within {_limit(report)} meets the cap: {text.listed(caps)}"
    else:
        head = f"No candidate was certified within {_limit(report)}"
    miss = f"; closest miss: {report.closest_miss.rstrip('. ')}" if report.closest_miss else ""
    return f"{head}{miss}{_needs(report) if miss else _hint(report)}."


def _unfinished(report: Report) -> str:
    rows = facts.rows(report)
    done = sum(row.trial.state != "running" for row in rows)
    so_far = f"{text.count(done)} trial{'' if done == 1 else 's'} done"
    within = [r for r in rows if r.speedup is not None and r.drop is not None and r.drop <= report.limit.max_drop]
    best = max(within, key=lambda r: r.speedup or 0, default=None)
    found = "nothing within the limit yet"
    if best is not None and best.speedup is not None:
        lost = text.drop(best.drop, share=text.is_share(report.score_name))
        found = f"best so far {text.ratio(best.speedup)} with a drop of {lost} (ranking figures, nothing is proved yet)"
    if report.state == "running":
        return f"Running: {so_far}, {found}."
    return f"Interrupted: {so_far}, {found}; the same command goes on from here."


def _speed(report: Report, chosen: Chosen) -> str:
    batch = facts.headline_batch(report)
    interval = facts.at_batch(chosen.speedup, batch)
    if interval is None:
        return f"speed at batch {batch} was not measured"
    plain = facts.at_batch(chosen.speedup_over_best_plain, batch)
    beside = f"; {_over_plain(plain)}" if plain else ""
    return f"{_compared(interval)} the network as given ({_spread(interval)}{beside}){_other_batches(report, chosen)}"


def _compared(interval: Interval) -> str:
    """`4.9× faster at batch 1 than`, to be followed by what it is held against."""
    pace = facts.pace(interval)
    if pace == "no difference shown":
        return f"no difference in speed shown at batch {interval.batch} against"
    return f"{_times(interval)} {pace} at batch {interval.batch} than"


def _times(interval: Interval) -> str:
    """The estimate; of an interval that says little its near end."""
    turned = facts.turned(interval)
    return f"at least {text.ratio(turned.low)}" if turned.vague else text.ratio(turned.value)


def _spread(interval: Interval) -> str:
    return f"95 % interval {text.interval(facts.turned(interval))}"


def _over_plain(interval: Interval) -> str:
    pace, times = facts.pace(interval), _times(interval)
    if pace == "faster":
        return f"{times} over the best plain engine"
    if pace == "slower":
        return f"{times} slower than the best plain engine"
    return "no difference shown against the best plain engine"


def _other_batches(report: Report, chosen: Chosen) -> str:
    others = tuple(
        f"{_brief(interval)} at batch {interval.batch}" for interval in chosen.speedup if interval.batch != facts.headline_batch(report)
    )
    return f", {text.listed(others)}" if others else ""


def _brief(interval: Interval) -> str:
    pace = facts.pace(interval)
    return pace if pace == "no difference shown" else f"{_times(interval)} {pace}"


def _size(report: Report, chosen: Chosen) -> list[str]:
    given = report.baselines.get(facts.AS_GIVEN)
    times = facts.times_smaller(given.size_bytes, chosen.size_bytes) if given else None
    if times is None or 1 / 1.05 < times < 1.05:
        return []
    return [f"{text.ratio(times)} smaller" if times > 1 else f"{text.ratio(1 / times)} larger"]


def _score(report: Report, chosen: Chosen) -> str:
    share = text.is_share(report.score_name)
    given = report.baselines.get(facts.AS_GIVEN)
    after = text.score(chosen.score, share=share)
    moved = f"{text.score(given.score, share=share)} → {after}" if given and report.verdict != "equal" else after
    return f"{report.score_name} {moved}, {_drop(report, chosen.score_drop, share)}"


def _drop(report: Report, bound: Bound, share: bool) -> str:
    n = f"{text.count(bound.n)} examples"
    if report.verdict == "equal":
        return f"outputs equal ({n})"
    if report.verdict == "kept":
        return f"drop at most {text.drop(bound.upper, share=share, at_most=True)} ({text.percent(report.limit.confidence)}, {n})"
    return f"estimated drop {text.drop(bound.value, share=share)} ({n})"


def _standing(report: Report) -> str:
    """The verdict with everything that weakens it."""
    if report.verdict in ("equal", "kept"):
        standing = str(report.verdict)
    else:
        standing = f"an estimate only, not a proof that the drop is at most {_limit(report)}{_enough(report)}"
    weak = []
    if report.provenance == "unknown" and report.verdict != "equal":
        weak.append("provenance unknown: the original may have been trained on these examples")
    if facts.reused(report) and report.verdict != "equal":
        weak.append("proof data reused")
    return standing + (f" ({'; '.join(weak)})" if weak else "")


def _enough(report: Report) -> str:
    chosen = report.chosen.trial if report.chosen else None
    enough = next((c.enough for c in report.certificates if c.trial == chosen and c.enough), None)
    return f" (about {text.count(enough)} examples would do)" if enough else ""


def _hint(report: Report) -> str:
    """What stopped the sequence of tests, and how much data would let it go on."""
    failure = facts.first_failure(report)
    if failure is None or failure.bound is None:
        return ""
    share = text.is_share(report.score_name)
    n = text.count(failure.bound.n)
    if failure.verdict == "exceeded":
        return f"; trial {failure.trial} drops by {text.drop(failure.bound.value, share=share)} ({n} examples)"
    would_do = f", about {text.count(failure.enough)} would do" if failure.enough else ""
    return f"; trial {failure.trial} was not shown to keep the limit with {n} examples{would_do}"


def _needs(report: Report) -> str:
    """The same in brief, beside a closest miss that gives the reason."""
    failure = facts.first_failure(report)
    if failure is None or not failure.enough:
        return ""
    return f"; about {text.count(failure.enough)} examples would do for trial {failure.trial}"


def _limit(report: Report) -> str:
    return text.drop(report.limit.max_drop, share=text.is_share(report.score_name))


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
