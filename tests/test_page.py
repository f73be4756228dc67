"""The page stands alone, and its plot keeps its frame. Each check of a page is held against a planted fault."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from importlib import resources

import pytest

import sample_reports as samples
from hasten.core.report import Limit, Report
from hasten.report import facts, html, page, plot, text

NAMES = sorted(samples.ALL)
VOID = frozenset(("meta", "br"))
LINKS = frozenset(("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background", "formaction"))


@dataclass
class Parsed(HTMLParser):
    """What a page consists of; `faults` names what is wrong with it."""

    source: str = field(repr=False)
    stack: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list, repr=False)
    words: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.feed(self.source)
        self.close()
        self.faults += [f"<{tag}> is left open" for tag in self.stack]
        self.faults += [f"control character {c!r}" for c in set(self.source) if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"]
        self.faults += [f"loads {it}" for it in re.findall(r"@import|url\(", self.source.partition("</style>")[0])]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "iframe", "object", "embed", "link", "base", "img"):
            self.faults.append(f"<{tag}>")
        self.faults += [f"{key}={value}" for key, value in attrs if key in LINKS or key.startswith("on")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.faults.append(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def found(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(w in (a.get(k.rstrip("_")) or "").split() for k, w in wanted.items())]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).replace("\u00a0", " ").split())


def dots(parsed: Parsed) -> int:
    """Circles with a tooltip: those of the legend have none."""
    return sum(t == "circle" and "cx" in a and a["cx"] != "7" for t, a in parsed.tags)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_stands_alone(name: str) -> None:
    written = page(samples.with_sentences()[name])
    parsed = Parsed(written)
    assert parsed.faults == []
    assert len(written.encode()) < 300_000
    assert "default-src 'none'" in written
    assert parsed.found("meta", name="viewport")


PLANTED = {
    "open": ("</main>", ""),
    "crossed": ("</header>", "</main>"),
    "script": ("</main>", "<script>1</script></main>"),
    "picture": ("</main>", '<p style="color:red" onclick="f()"></p></main>'),
    "link": ("</main>", '<a href="https://example.org">x</a></main>'),
    "font": ("* { box-sizing", "@import 'x'; * { box-sizing"),
    "background": ("* { box-sizing", "p { background: url(//x) } * { box-sizing"),
    "control": ("</main>", "\x1b</main>"),
    "surrogate": ("</main>", "\ud800</main>"),
}


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_the_check_of_the_page_sees_a_fault(name: str) -> None:
    written = page(samples.kept)
    old, new = PLANTED[name]
    assert old in written
    assert not Parsed(written).faults
    assert Parsed(written.replace(old, new)).faults


@pytest.mark.parametrize("name", NAMES)
def test_every_finished_trial_has_a_dot_and_every_refused_one_its_reason(name: str) -> None:
    report = samples.ALL[name]
    parsed = Parsed(page(report))
    finished = [t for t in report.trials if t.state == "finished"]
    assert dots(parsed) == (len(finished) if report.baselines else 0)
    for trial in report.trials:
        assert " ".join(text.clean(trial.words, 600).split()) in parsed.text
        if trial.reason:
            assert " ".join(text.clean(trial.reason, 500).rstrip("…").split()) in parsed.text


@pytest.mark.parametrize("name", NAMES)
def test_the_page_can_be_read_aloud(name: str) -> None:
    parsed = Parsed(page(samples.ALL[name]))
    assert parsed.found("html", lang="en")
    assert len(parsed.found("h1")) == 1
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert all(a.get("scope") in ("col", "row") for a in parsed.found("th"))
    drawings = [a for a in parsed.found("svg") if a.get("viewbox") != "0 0 14 14"]
    assert all(a.get("role") == "img" and a.get("aria-label") for a in drawings)
    assert all(a.get("aria-label") and a.get("tabindex") == "0" for a in parsed.found("div", class_="box"))


def test_words_from_outside_stay_words() -> None:
    report = samples.hostile
    written = page(report)
    parsed = Parsed(written)
    clean = text.clean(samples.HOSTILE)
    assert "<script src=" in clean
    assert clean in parsed.text
    assert "{{ 7*7 }}" in parsed.text
    assert "<script" not in written
    assert parsed.text.count("alert('1')") > 20
    assert Parsed(written.replace("&lt;", "<")).faults  # what no escaping would lead to


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_drop", [0.0, 0.01])
def test_bars_keep_their_width(name: str, max_drop: float) -> None:
    report = samples.ALL[name]
    parsed = Parsed(page(replace(report, limit=replace(report.limit, max_drop=max_drop))))
    styles = [a["style"] or "" for tag, a in parsed.tags if tag in ("i", "b")]
    assert bool(styles) == (report.chosen is not None or bool(report.certificates or report.ledger))
    for style in styles:
        assert re.fullmatch(r"left:[\d.]+%(;width:[\d.]+%)?", style)
        assert sum(map(float, re.findall(r"[\d.]+(?=%)", style))) <= 100.2


def test_many_trials_stay_small() -> None:
    report = samples.long(300)
    written = page(report)
    assert len(written.encode()) < 300_000
    assert dots(Parsed(written)) == sum(t.state == "finished" for t in report.trials)


def test_what_weakens_the_proof_is_on_the_page() -> None:
    parsed = Parsed(page(samples.unknown))
    assert "It is not known whether the original network was trained on this data" in parsed.text
    assert "opened more than once" in parsed.text
    assert parsed.found("tr", class_="reused")
    sound = Parsed(page(samples.kept))
    assert "opened more than once" not in sound.text
    assert not sound.found("tr", class_="reused")


def test_the_page_says_how_to_use_the_result_and_how_it_came_about() -> None:
    parsed = Parsed(page(samples.kept))
    assert "run = load('runs/cnn/best')" in parsed.text
    assert samples.kept.command in parsed.text
    assert all(str(v) in parsed.text for v in samples.ENVIRONMENT.values() if isinstance(v, str))
    assert "run = load(" not in Parsed(page(samples.running)).text


def colours() -> Iterator[tuple[str, dict[str, str]]]:
    css = resources.files("hasten.report").joinpath("page.css").read_text()
    for scheme, block in zip(("light", "dark", "print"), re.findall(r":root \{(.*?)\}", css, re.S), strict=True):
        yield scheme, dict(re.findall(r"--([\w-]+): (#\w+);", block))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (L1 + 0.05) / (L2 + 0.05) of the relative luminances."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("scheme", "named"), list(colours()), ids=lambda it: it if isinstance(it, str) else "")
def test_words_stand_out_from_their_ground(scheme: str, named: dict[str, str]) -> None:
    pairs = [*itertools.product(("ink", "soft"), ("paper", "card", "shade", "allowed", "good-tint"))]
    pairs += [("good", "good-tint"), ("bad", "bad-tint"), ("plain", "plain-tint"), ("bad", "paper"), ("bad", "allowed")]
    poor = {pair: contrast(named[pair[0]], named[pair[1]]) for pair in pairs}
    assert {pair: ratio for pair, ratio in poor.items() if ratio < 4.5} == {}
    assert contrast("#777777", "#ffffff") < 4.5 < contrast("#767676", "#ffffff")  # the known edge


# ---- the plot


@pytest.mark.parametrize("report", [*samples.ALL.values(), samples.long(80)], ids=[*samples.ALL, "80 trials"])
def test_the_plot_keeps_its_frame_and_its_order(report: Report) -> None:
    drawn = plot.pareto_plot(report)
    if drawn is None:
        assert not report.baselines
        return
    rows = {row.trial.number: row for row in facts.rows(report)}
    for dot in drawn.dots:
        assert plot.LEFT <= dot.x <= plot.RIGHT
        assert plot.TOP <= dot.y <= plot.BOTTOM
        assert (dot.y > drawn.limit_y) == ((rows[dot.trial].drop or 0) > report.limit.max_drop)
    for a, b in itertools.combinations(drawn.dots, 2):
        if a.x < b.x:
            assert (rows[a.trial].speedup or 0) < (rows[b.trial].speedup or 0)
        if a.y < b.y:
            assert (rows[a.trial].drop or 0) < (rows[b.trial].drop or 0)
    assert len(drawn.across) >= 3
    assert 2 <= len(drawn.down) <= 8
    assert "1×" in [words for _, words in drawn.across]


@pytest.mark.parametrize("report", list(samples.ALL.values()), ids=list(samples.ALL))
def test_labels_do_not_cover_each_other(report: Report) -> None:
    drawn = plot.pareto_plot(report)
    if drawn is None:
        return
    boxes = [plot._box(label) for label in drawn.labels]
    for (left, top, right, bottom), (left2, top2, right2, bottom2) in itertools.combinations(boxes, 2):
        assert right <= left2 or right2 <= left or bottom <= top2 or bottom2 <= top
    assert all(plot._inside(box) for box in boxes)
    assert any(label.style == "limit" for label in drawn.labels)
    assert any(label.style == "major" for label in drawn.labels) == any(row.chosen and row.speedup for row in facts.rows(report))


@pytest.mark.parametrize("max_drop", [0.0, 1e-6, 0.01, 0.5])
@pytest.mark.parametrize("drops", [(0.0,), (0.0, 0.0), (-0.2, 0.3), (0.004, 0.9), (-1e-9, 1e-9)])
def test_the_plot_takes_any_drops(max_drop: float, drops: tuple[float, ...]) -> None:
    tried = tuple(samples.trial(i, "Eager", p50=0.402 / (i + 1), drop=d) for i, d in enumerate(drops))
    drawn = plot.pareto_plot(replace(samples.kept, trials=tried, pareto=(), chosen=None, limit=Limit(max_drop=max_drop)))
    assert drawn is not None
    assert len(drawn.dots) == len(drops)
    assert all(plot.TOP <= y <= plot.BOTTOM for y in (drawn.limit_y, *(d.y for d in drawn.dots), *(y for y, _ in drawn.down)))


# ---- the terminal


def test_what_has_the_same_size_is_not_called_smaller() -> None:
    assert [html._size_card("size", 900, after)["beside"] for after in (900, 300, 1800)] == ["unchanged", "smaller", "larger"]


def test_the_page_says_which_inputs_the_times_hold_for() -> None:
    report = replace(samples.ALL["kept"], input_shapes=("1×28×28 float32", "4 int64"))
    assert "<dd>1×28×28 float32; 4 int64</dd>" in page(report)
