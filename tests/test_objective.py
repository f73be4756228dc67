"""The objective as one number, and energy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import madeup
from hasten.core.errors import BackendMissing, UsageError
from hasten.core.report import Interval
from hasten.measure import energy
from hasten.report.tables import comparison
from hasten.search.clock import parse_duration
from hasten.search.objective import Objective, timed
from hasten.verbs import Options
from sample_reports import measured

OLD = replace(measured(4.0, 0.0, 1_000, batches=(1, 32)), energy_mj=8.0)
NEW = replace(measured(1.0, 0.0, 500, batches=(1, 32)), energy_mj=2.0)
OVER = tuple(Interval(batch=b, value=v, low=v - 0.5, high=v + 0.5, launches=8) for b, v in ((1, 4.0), (32, 2.0)))


def test_halving_one_goal_counts_as_much_as_halving_another() -> None:
    both = Objective(goals=("latency", "size"))
    assert both.cost(timed(OLD, {1: 2.0})) == pytest.approx(both.cost(replace(OLD, size_bytes=500)))
    assert both.cost(OLD) / both.cost(NEW) == pytest.approx(8**0.5)
    assert Objective(goals=("throughput",)).cost(OLD) == pytest.approx(OLD.at(32).p50_ms / 32)
    assert Objective(goals=("energy",)).cost(replace(OLD, energy_mj=None)) == float("inf")


def test_a_gain_has_the_interval_of_its_times_and_none_where_it_is_counted() -> None:
    gain = Objective(goals=("latency", "size")).gain(OLD, NEW, OVER)
    assert (gain.value, gain.low, gain.high) == pytest.approx((8**0.5, 7**0.5, 9**0.5))
    size = Objective(goals=("size",)).gain(OLD, NEW, OVER)
    assert (size.low, size.high) == pytest.approx((2.0, 2.0))
    assert Objective(goals=("throughput",)).gain(OLD, NEW, OVER).low == pytest.approx(1.5)


def test_which_steps_are_of_use() -> None:
    assert Objective(goals=("latency", "memory")).aims == {"speed", "size"}
    assert Objective(goals=("throughput", "latency"), batch=1, full=8).batches == (1, 8)
    assert Objective(goals=("size",), batch=4).batches == (4,)


def test_words_are_checked() -> None:
    with pytest.raises(UsageError, match="one or more of latency, throughput, size, memory, energy, each once, got speed"):
        Options(objective="speed")
    with pytest.raises(UsageError, match="each once"):
        Options(objective="size, size")
    with pytest.raises(UsageError, match="must look like 10m"):
        Options(time_limit="soon")
    with pytest.raises(UsageError, match="above 0, got '0m'"):
        parse_duration("0m")
    assert parse_duration("1h30m5s") == 5405


def counters(root: Path, *values: int) -> Path:
    for i, value in enumerate(values):
        (root / f"intel-rapl:{i}").mkdir(parents=True)
        (root / f"intel-rapl:{i}" / "energy_uj").write_text(str(value))
        (root / f"intel-rapl:{i}" / "max_energy_range_uj").write_text("1000000")
    return root


def test_energy_of_a_call_when_a_counter_wraps(tmp_path: Path) -> None:
    root, now = counters(tmp_path, 999_000, 5), [0.0]

    def call(count: int) -> None:
        now[0] += 0.1 * count
        for i in range(2):
            file = root / f"intel-rapl:{i}" / "energy_uj"
            file.write_text(str((int(file.read_text()) + 500 * count) % 1_000_000))

    assert energy.energy_mj(call, root=root, clock=lambda: now[0]) == pytest.approx(1.0)
    assert energy.unreadable(root) is None


def test_energy_is_refused_where_nothing_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "shows none" in (energy.unreadable(tmp_path) or "")
    monkeypatch.setattr(energy, "unreadable", lambda: "energy needs the RAPL counters")
    with pytest.raises(BackendMissing, match="RAPL"):
        Options(objective="latency,energy")
    with pytest.raises(BackendMissing, match="RAPL"):
        Options(energy_mj=3.0)


def test_a_search_for_less_energy_counts_it_and_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = iter(range(1, 1000))
    monkeypatch.setattr(energy, "energy_mj", lambda call: 100.0 / next(spent))
    madeup.prepare(tmp_path / "run")
    found = madeup.search(tmp_path / "run", replace(madeup.SETTINGS, goals=("energy",)))
    assert [t.measurement.energy_mj for t in found.trials if t.measurement][:3] == [100.0, 50.0, 100 / 3]
    assert found.chosen
    assert found.chosen.energy_mj
    assert found.baselines["as given"].energy_mj == 100.0
    row = next(line.cells for line in comparison(found).lines if line.cells[0].startswith("energy"))
    assert row[1] == "100.00 mJ"
