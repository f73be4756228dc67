"""The report says no more than was shown, in one sentence and in the terminal."""

from __future__ import annotations

import io
import json
import random
import re
import unicodedata
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

import sample_reports as samples
from hasten.core.report import Interval, Limit, Report
from hasten.report import facts, json_text, page, show, tables, text, verdict_sentence
from hasten.search.catalogue import Settings
from hasten.search.summary import _cautions, _shape

NAMES = sorted(samples.ALL)
SENTENCES = {
    "kept": "4.9× faster at batch 1 than the network as given (95 % interval 4.6–5.3; 1.5× over the best plain engine), "
    "3.8× smaller; accuracy 98.4 % → 98.3 %, drop at most 0.55 points (95 %, 2,000 examples): kept.",
    "equal": "3.4× faster at batch 1 than the network as given (95 % interval 3.3–3.6; 1.05× over the best plain engine); "
    "accuracy 98.4 %, outputs equal (2,000 examples): equal.",
    "plain": "The network comes back unchanged in OnnxRuntime, 3.1× faster at batch 1 than as given (95 % interval 2.9–3.4), outputs "
    "equal; no changed one was proved faster within 1 point.",
    "unchanged": "Nothing faster was proved within 1 point: the network comes back unchanged.",
    "cap_unmet": "No candidate certified within 1 point meets the cap: latency at most 0.05 ms at batch 1 and size at most "
    "80 kB; closest miss: trial 7: latency 0.0613 ms (12 % over), size 71 kB; its drop was not shown to keep the limit; "
    "about 3,100 examples would do for trial 7.",
    "not_shown": "No candidate certified within 1 point meets the cap: at least 4.0× faster; closest miss: trial 6: 4.9×, "
    "estimated drop 0.3 points; about 1,200 examples would do for trial 6.",
    "exceeded": "No candidate certified within 1 point meets the cap: at least 4.0× faster; closest miss: trial 6: 4.9×, drop 3.1 points.",
    "point": "6.6× faster at batch 1 than the network as given (95 % interval 6.1–7.0; 2.0× over the best plain engine), "
    "5.7× smaller; accuracy 98.4 % → 98.0 %, estimated drop 0.45 points (2,000 examples): an estimate only, not a proof that "
    "the drop is at most 1 point (about 3,100 examples would do).",
    "unknown": "4.9× faster at batch 1 than the network as given (95 % interval 4.6–5.3; 1.5× over the best plain engine), "
    "3.8× smaller; accuracy 98.4 % → 98.3 %, drop at most 0.55 points (95 %, 2,000 examples): kept (provenance unknown: the "
    "original may have been trained on these examples; proof data reused).",
    "slower": "1.6× slower at batch 32 than the network as given (95 % interval 1.5–1.7; 5.0× slower than the best plain "
    "engine), 1.16× slower at batch 1, 3.7× smaller; accuracy 98.4 % → 98.3 %, "
    "drop at most 0.55 points (95 %, 2,000 examples): kept.",
    "no_difference": "No difference in speed shown at batch 1 against the network as given (95 % interval 1.00–1.06; no "
    "difference shown against the best plain engine); accuracy 98.4 % → 98.3 %, "
    "drop at most 0.55 points (95 %, 2,000 examples): kept.",
    "values": "4.9× faster at batch 1 than the network as given (95 % interval 4.7–5.2), 3.8× smaller; negative squared error "
    "0.984 → 0.983, drop at most 0.0055 (95 %, 2,000 examples): kept.",
    "running": "Running: 7 trials done, best so far 4.9× with a drop of 0.1 points (ranking figures, nothing is proved yet).",
    "interrupted": "Interrupted: 7 trials done, best so far 4.9× with a drop of 0.1 points (ranking figures, nothing is proved "
    "yet); the same command goes on from here.",
    "empty": "No candidate was certified within 1 point.",
}


@pytest.mark.parametrize("name", sorted(SENTENCES))
def test_the_sentence_reads_as_it_should(name: str) -> None:
    assert verdict_sentence(samples.ALL[name]) == SENTENCES[name]


@pytest.mark.parametrize("low", [0.5, 0.97, 0.99, 1.0, 1.0199, 1.02, 1.0201, 1.3, 20.0])
@pytest.mark.parametrize("width", [0.0, 0.01, 0.4])
def test_faster_and_slower_are_said_only_where_shown(low: float, width: float) -> None:
    interval = Interval(batch=1, value=low + width / 2, low=low, high=low + width)
    chosen = samples.kept.chosen
    assert chosen is not None
    said = verdict_sentence(replace(samples.kept, chosen=replace(chosen, speedup=(interval,), speedup_over_best_plain=())))
    assert ("faster" in said) == (low > 1.02)
    assert ("slower" in said) == (low + width < 1 / 1.02)
    assert ("No difference in speed shown" in said) == (low <= 1.02 and low + width >= 1 / 1.02)


def test_an_unproved_result_is_never_called_kept() -> None:
    for name, report in samples.ALL.items():
        said = verdict_sentence(report).rstrip(".")
        proved = report.chosen is not None and report.verdict == "kept"
        assert bool(re.search(r": kept( \(|$)", said)) == proved, name
    assert "an estimate only" in verdict_sentence(samples.point)
    assert facts.badge(samples.point) == "estimate only"


@pytest.mark.parametrize(
    ("name", "badge"),
    [("kept", "kept"), ("equal", "equal"), ("cap_unmet", "cap not met"), ("not_shown", "not shown"), ("exceeded", "exceeded"),
     ("running", "running"), ("interrupted", "interrupted"), ("empty", "cap not met")],
)  # fmt: skip
def test_the_badge_is_the_verdict(name: str, badge: str) -> None:
    report = samples.ALL[name]
    assert facts.badge(report) == badge
    assert f'class="badge {facts.tone(report)}">{badge}</span>' in page(report)


def test_bounds_are_rounded_to_the_safe_side() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        bound = draw.uniform(0, 0.3)
        said = text.drop(bound, share=True, at_most=True)
        assert float(said.split()[0]) / 100 >= bound - 1e-15
        assert float(text.drop(bound, share=False, at_most=True)) >= bound
        low = draw.uniform(0.1, 40)
        high = low * draw.uniform(1, 1.5)
        ends = text.interval(Interval(batch=1, value=low, low=low, high=high)).split("–")
        assert float(ends[0]) <= low
        assert float(ends[1]) >= high
    assert text.drop(0.07, share=True, at_most=True) == "7 points"  # 0.07 * 100 is 7.000000000000001


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_becomes_a_dash(value: float) -> None:
    assert text.significant(value) == text.decimals(value, 1) == text.drop(value, share=True) == text.ABSENT
    assert text.ABSENT in text.score(value, share=True)
    assert text.ABSENT in text.milliseconds(value)


def test_clean_leaves_nothing_that_acts_on_a_screen() -> None:
    everything = "".join(map(chr, range(0x3000))) + "\ud800\ue000\u2066\U000e0041"
    kept = text.clean(everything, longest=10**6)
    assert all(unicodedata.category(c)[0] != "C" or c in text.JOINERS for c in kept)
    assert not re.search(r"[\r\n\t\x85\u2028\u2029]", kept)
    assert text.clean(kept, longest=10**6) == kept
    assert text.printable(samples.kept) == samples.kept


# ---- the page


def printed(report: Report, width: int, *, terminal: bool = False) -> str:
    out = io.StringIO()
    show(report, Console(file=out, width=width, force_terminal=terminal, color_system="truecolor" if terminal else None))
    return out.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", NAMES)
def test_the_terminal_keeps_its_width(name: str, width: int) -> None:
    out = printed(samples.with_sentences()[name], width)
    assert max(cell_len(line) for line in out.splitlines()) <= width
    assert not [c for c in set(out) if unicodedata.category(c)[0] == "C" and c != "\n"]


def test_colour_is_for_terminals() -> None:
    assert "\x1b[" not in printed(samples.kept, 80)
    assert "\x1b[" in printed(samples.kept, 80, terminal=True)


def test_the_terminal_reads_no_markup() -> None:
    out = " ".join(printed(samples.hostile, 1000).split())
    assert out.count("[bold red][/]") > 3 * len(samples.TRIALS) / 2


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_tells_the_whole_story(width: int) -> None:
    out = " ".join(printed(samples.kept, width).split())
    assert "4.9× (4.6–5.3)" in out
    assert "0.0815 ms" in out
    assert "StaticInt8" in out
    assert "not shown" in out
    assert "−1 point" in out
    assert "runs/cnn/best" in out
    assert samples.kept.notes[0][:30] in out


def test_what_is_left_out_is_said() -> None:
    out = printed(samples.long(300), 100)
    rows = out.partition("Trials (")[2].partition("What each step")[0]
    shown = len(re.findall(r"^ +\d+   +\S", rows, re.M))
    missing = int(re.search(r"Trials \((\d+) more", out).group(1))  # type: ignore[union-attr]
    assert shown + missing == 300


# ---- tables and JSON


def test_classes_that_changed_come_worst_first() -> None:
    table = tables.classes(samples.kept)
    assert [line.cells[0] for line in table.lines] == ["bird", "cat", "ship", "dog", "frog"]
    assert all(line.bar.start >= 0 and line.bar.start + line.bar.length <= 100 for line in table.lines if line.bar)


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_rectangular(name: str) -> None:
    report = samples.ALL[name]
    for make in (
        tables.comparison,
        tables.trials,
        tables.ledger,
        tables.classes,
        tables.certificates,
        tables.openings,
        tables.offers,
        tables.findings,
    ):
        table = make(report)
        assert all(len(line.cells) == len(table.headings) for line in table.lines), table.name


def test_what_can_be_picked_is_listed_where_there_is_a_choice() -> None:
    report = samples.ALL["kept"]
    assert report.chosen
    assert not tables.offers(report).lines
    other = replace(report.chosen, trial=4, words="another", size_bytes=9_000)
    table = tables.offers(replace(report, offers=(report.chosen, other)))
    assert [(line.cells[0], line.mark) for line in table.lines] == [(str(report.chosen.trial), "chosen"), ("4", "")]
    assert table.lines[1].cells[3] == "9 kB"
    assert "another" in page(replace(report, offers=(report.chosen, other)))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"hostile"}))
def test_json_reads_back(name: str) -> None:
    report = samples.ALL[name]
    assert Report.from_json(json.loads(json_text(report))) == report


def test_json_of_half_characters_can_be_written_and_read() -> None:
    again = Report.from_json(json.loads(json_text(samples.hostile).encode()))
    assert again.notes[0] == samples.HOSTILE.replace("\ud800", "?")


def test_an_interval_that_says_little_is_told_by_its_near_end() -> None:
    assert samples.kept.chosen
    wide = (Interval(batch=1, value=105, low=12, high=918), Interval(batch=32, value=237, low=0.09, high=6e5))
    told = verdict_sentence(replace(samples.kept, chosen=replace(samples.kept.chosen, speedup=wide)))
    assert told.startswith("At least 12× faster at batch 1 than the network as given (95 % interval 12–918")
    assert "237" not in told


def test_every_trial_is_held_against_the_same_figure() -> None:
    """The ranking's own: the network as given may be timed quite differently in the end."""
    report = samples.kept
    slow = replace(
        report.baselines["as given"], latency_ms=tuple(replace(e, p50_ms=e.p50_ms / 300) for e in report.baselines["as given"].latency_ms)
    )
    before, after = (facts.rows(r) for r in (report, replace(report, baselines={**report.baselines, "as given": slow})))
    assert [row.speedup for row in before] == [row.speedup for row in after]
    assert before[0].speedup == pytest.approx(1.0)


def test_cautions_stand_in_the_notes() -> None:
    chosen = samples.kept.chosen
    assert chosen
    asked = Settings(limit=Limit(max_drop=0.01))
    assert list(_cautions(asked, samples.kept.trials, chosen)) == []
    wide = replace(chosen, speedup=(Interval(batch=1, value=105, low=12, high=918),))
    hasty = replace(chosen, latency_ms=tuple(replace(e, launches=3) for e in chosen.latency_ms))
    assert "probably busy" in " ".join(_cautions(asked, samples.kept.trials, wide))
    assert "time for 3 rounds" in " ".join(_cautions(asked, samples.kept.trials, hasty))
    first = samples.kept.trials[0]
    assert first.measurement
    small = replace(first, measurement=replace(first.measurement, score=-0.0023))
    assert "the limit 0.01 is as large as the score of the network as given, -0.0023" in " ".join(_cautions(asked, [small], None))


def test_the_shape_of_an_example_in_words() -> None:
    assert _shape({"shape": ["batch", 1, 28, 28], "dtype": "float32"}) == "1×28×28 float32"
    assert _shape({"shape": [4], "dtype": "int64"}) == "a number, int64"
