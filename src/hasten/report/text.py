"""Figures as a person writes them, and strings from outside made fit to print.

A bound is rounded to its unsafe side's opposite: what is said to be "at most" is rounded up, both ends of an interval outwards.
"""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import Any, TypeVar

from hasten.core.report import Interval, Limit

T = TypeVar("T")

ABSENT = "—"
SHARES = frozenset({"accuracy", "agreement", "auc", "auroc", "f1", "iou", "map", "precision", "recall", "top"})
JOINERS = "\u200c\u200d"  # Persian and emoji need them; every other format character only hides or reorders text


def significant(value: float, digits: int = 3, rounding: str = ROUND_HALF_EVEN) -> str:
    """`value` with that many significant digits; whole digits are never rounded away. Not finite: a dash.

    >>> significant(0.012345), significant(12.345), significant(1234567), significant(-2.0), significant(0)
    ('0.0123', '12.3', '1,234,567', '−2', '0')
    """
    if not math.isfinite(value):
        return ABSENT
    exact = Decimal(repr(float(value)))
    places = max(0, digits - 1 - exact.adjusted()) if exact else 0
    return _fixed(exact, places, rounding, strip=True)


def decimals(value: float, places: int, rounding: str = ROUND_HALF_EVEN) -> str:
    """`value` with that many decimals.

    >>> decimals(98.4, 2), decimals(-0.001, 1), decimals(1.021, 1, ROUND_CEILING)
    ('98.40', '0.0', '1.1')
    """
    return _fixed(Decimal(repr(float(value))), places, rounding, strip=False) if math.isfinite(value) else ABSENT


def _fixed(exact: Decimal, places: int, rounding: str, *, strip: bool) -> str:
    rounded = exact.quantize(Decimal(1).scaleb(-places), rounding)
    written = f"{rounded if rounded else abs(rounded):,f}"
    if strip and "." in written:
        written = written.rstrip("0").rstrip(".")
    return written.replace("-", "−")


def count(value: int | None) -> str:
    """A whole number with thousands; a dash for None.

    >>> count(2000), count(None)
    ('2,000', '—')
    """
    return ABSENT if value is None else f"{value:,}".replace("-", "−")


def many(value: int | None) -> str:
    """A large count in thousands, millions or billions.

    >>> many(940), many(99_872), many(25_557_032), many(4_089_000_000), many(None)
    ('940', '99.9 k', '25.6 M', '4.09 G', '—')
    """
    return ABSENT if value is None else _scaled(value, ("", "k", "M", "G", "T")).rstrip()


def size(value: int | None) -> str:
    """Bytes in decimal units.

    >>> size(512), size(43_180), size(102_500_000), size(-2_000), size(None)
    ('512 B', '43.2 kB', '102 MB', '−2 kB', '—')
    """
    return ABSENT if value is None else _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    written = significant(value) if abs(value) < 100 else decimals(value, 0)
    return f"{written} {units[power]}"


def milliseconds(value: float | None) -> str:
    """A time of one call.

    >>> milliseconds(0.0421), milliseconds(62.6), milliseconds(1234.5), milliseconds(None)
    ('0.0421 ms', '62.6 ms', '1,234 ms', '—')
    """
    return ABSENT if value is None else f"{significant(value) if abs(value) < 1000 else decimals(value, 0)} ms"


def duration(seconds: float) -> str:
    """A time of waiting.

    >>> duration(0.42), duration(83), duration(7_384)
    ('0.4 s', '1 min 23 s', '2 h 3 min')
    """
    if not math.isfinite(seconds):
        return ABSENT
    if seconds < 60:
        return f"{significant(round(seconds, 1))} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def ratio(value: float) -> str:
    """Old ÷ new: two decimals near 1, where they tell.

    >>> ratio(4.93), ratio(1.03), ratio(2.0), ratio(0.44), ratio(12.3), ratio(0.0042)
    ('4.9×', '1.03×', '2.0×', '0.44×', '12×', '0.0042×')
    """
    if abs(value) < 0.9:
        return f"{significant(value, 2)}×"
    return f"{decimals(value, 2 if abs(value) < 1.2 else 1 if abs(value) < 9.95 else 0)}×"


def interval(value: Interval) -> str:
    """Both ends, rounded outwards. Of a far end of several thousand, which a few busy launches can give, only that it is one.

    >>> interval(Interval(batch=1, value=4.9, low=4.63, high=5.14)), interval(Interval(batch=1, value=1, low=0.987, high=1.021))
    ('4.6–5.2', '0.98–1.03')
    >>> interval(Interval(batch=1, value=400, low=0.07, high=1950415.2))
    '0.07–more than 1,000'
    """
    places = 2 if value.low < 1.2 else 1 if value.high < 20 else 0
    far = value.high > 1_000 and value.high > 10 * value.low
    high = "more than 1,000" if far else decimals(value.high, places, ROUND_CEILING)
    return f"{decimals(value.low, places, ROUND_FLOOR)}–{high}"


def is_share(score_name: str) -> bool:
    """Whether a score of that name is a share, so that 0.01 of it is one point.

    >>> is_share("accuracy"), is_share("Top-5 accuracy"), is_share("negative squared error")
    (True, True, False)
    """
    return not SHARES.isdisjoint(re.findall(r"[a-z]+\d?", score_name.lower()))


def score(value: float, *, share: bool, places: int = 1) -> str:
    """A score: per cent where it is a share.

    >>> score(0.984, share=True), score(0.98412, share=True, places=2), score(-1.23456, share=False)
    ('98.4 %', '98.41 %', '−1.235')
    """
    return f"{decimals(_hundredfold(value), places)} %" if share else significant(value, 4)


def drop(value: float | None, *, share: bool, at_most: bool = False) -> str:
    """A score drop, in points where the score is a share; `at_most` rounds it up.

    >>> drop(0.006, share=True), drop(0.01, share=True), drop(0.00551, share=True, at_most=True), drop(0.013, share=False)
    ('0.6 points', '1 point', '0.56 points', '0.013')
    >>> drop(-0.001, share=True), drop(None, share=True)
    ('−0.1 points', '—')
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    rounding = ROUND_CEILING if at_most else ROUND_HALF_EVEN
    if not share:
        return significant(value, 2, rounding)
    written = significant(_hundredfold(value), 2, rounding)
    return f"{written} point" if written in ("1", "−1") else f"{written} points"


def change(value: float, *, share: bool) -> str:
    """A signed change of a score, upwards positive.

    >>> change(-0.021, share=True), change(0.004, share=True), change(0.0, share=True)
    ('−2.1 points', '+0.4 points', '0 points')
    """
    return ("+" if value > 0 else "") + drop(value, share=share)


def percent(value: float) -> str:
    """A confidence.

    >>> percent(0.95), percent(0.999)
    ('95 %', '99.9 %')
    """
    return f"{significant(_hundredfold(value), 4)} %"


def caps(limit: Limit, batch: int) -> tuple[str, ...]:
    """The caps that the user set besides the drop, in words.

    >>> caps(Limit(latency_ms=2, min_speedup=3), batch=8)
    ('latency at most 2 ms at batch 8', 'at least 3.0× faster')
    """
    words = (
        limit.latency_ms and f"latency at most {milliseconds(limit.latency_ms)} at batch {batch}",
        limit.size_bytes and f"size at most {size(limit.size_bytes)}",
        limit.peak_memory_bytes and f"peak memory at most {size(limit.peak_memory_bytes)}",
        limit.energy_mj and f"energy at most {limit.energy_mj:.3g} mJ at batch {batch}",
        limit.min_speedup and f"at least {ratio(limit.min_speedup)} faster",
        limit.examples_per_s and f"at least {limit.examples_per_s:,.0f} examples per second at batch {batch}",
    )
    return tuple(str(said) for said in words if said)


def listed(words: tuple[str, ...]) -> str:
    """An enumeration.

    >>> listed(("a",)), listed(("a", "b", "c")), listed(())
    ('a', 'a, b and c', '')
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def clean(text: str, longest: int = 2000) -> str:
    r"""`text` without control, direction and unassigned characters; line breaks become spaces; cut at `longest`.

    >>> clean("cat\x1b[31m\u202e\nx\ud800"), clean("abcdef", longest=4)
    ('cat[31m x', 'abc…')
    """
    kept = "".join(" " if c.isspace() else c for c in text if c in JOINERS or c.isspace() or unicodedata.category(c)[0] != "C")
    return kept if len(kept) <= longest else kept[: longest - 1] + "…"


def printable(value: T) -> T:
    """The same value with every string in it cleaned, keys of mappings included."""
    return _printable(value)  # type: ignore[no-any-return]


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _printable(getattr(value, f.name)) for f in dataclasses.fields(value)})
    if isinstance(value, (tuple, list)):
        return type(value)(_printable(v) for v in value)
    if isinstance(value, dict):
        return {_printable(k): _printable(v) for k, v in value.items()}
    return value


def _hundredfold(value: float) -> float:
    """Times 100 in decimal: 0.07 gives 7, not 7.000000000000001, which would be rounded up to 7.1."""
    return float(Decimal(repr(float(value))) * 100) if math.isfinite(value) else value
