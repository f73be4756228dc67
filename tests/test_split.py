"""Cutting: what must hold of every cut, over sizes, classes, repeats, groups and seeds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.core.data import View
from hasten.core.errors import DataRefused, StorageError
from hasten.load.data import Loaded
from hasten.load.split import Cut, enough, fewest, notes, reopen, seal, shares, split

SIZES = (3, 4, 5, 7, 10, 23, 100, 267, 541, 1_000, 5_000)

PINNED = {"train": [6, 7, 8, 9], "select": [4, 11], "prove": [10, 1, 2, 5, 0, 3]}


def made(n: int, *, classes: int = 3, repeats: float = 0.0, groups: int = 0, seed: int = 0) -> Loaded:
    """n examples numbered in their first feature; a share of them repeats the one before; labels of uneven classes."""
    rng = np.random.default_rng((n, classes, groups, seed))
    x = np.stack([np.arange(n), rng.integers(0, 9, n)], axis=1).astype(np.float32)
    y = np.minimum(rng.geometric(0.4, n) - 1, classes - 1)
    y[: min(2, n)] = (0, 1)
    copies = rng.permutation(np.arange(2, n))[: int(repeats * n)]
    x[copies] = x[copies - 1]
    return Loaded(view=View(inputs=(x,), labels=y), groups=np.sort(rng.integers(0, groups, n)) if groups else None)


def parts(cut: Cut) -> dict[str, View]:
    return {"train": cut.train, "select": cut.select, "prove": cut.prove}


def rows(view: View) -> list[bytes]:
    return [row.tobytes() for row in view.inputs[0]]


def same(a: Cut, b: Cut) -> bool:
    return all(getattr(a, p).fingerprint() == getattr(b, p).fingerprint() for p in ("train", "calibrate", "select", "prove"))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("repeats", [0.0, 0.3])
@pytest.mark.parametrize("grouped", [False, True])
def test_laws_of_a_cut_in_three(n: int, repeats: float, grouped: bool) -> None:
    data = made(n, repeats=repeats if n > 9 else 0.0, groups=max(4, n // 3) if grouped and n > 9 else 0)
    cut = split(data, seed=n, max_drop=0.01)
    found = {name: rows(view) for name, view in parts(cut).items()}
    assert Counter(r for part in found.values() for r in part) == Counter(rows(data.view))
    assert all(found.values())
    assert not set(found["train"]) & set(found["select"])
    assert not set(found["prove"]) & (set(found["train"]) | set(found["select"]))
    assert rows(cut.calibrate) == found["train"][:300]
    assert same(cut, split(data, seed=n, max_drop=0.01))
    if data.groups is not None:
        at = {row: name for name, part in found.items() for row in part}
        homes = {(group, at[row]) for group, row in zip(data.groups.tolist(), rows(data.view), strict=True)}
        assert len(homes) == len(np.unique(data.groups))
    if n > 99:
        assert not same(cut, split(data, seed=n + 1, max_drop=0.01))


@pytest.mark.parametrize("n", SIZES[2:])
def test_sizes_are_those_of_the_rule_and_classes_keep_their_share(n: int) -> None:
    for seed in range(4):
        data = made(n, classes=5, seed=seed)
        cut = split(data, seed=seed, max_drop=0.01)
        assert (len(cut.train), len(cut.select), len(cut.prove)) == shares(n)
        whole = np.bincount(data.view.labels, minlength=5)
        for view in (*parts(cut).values(), cut.calibrate):
            off = np.bincount(view.labels, minlength=5) - whole * len(view) / n
            assert np.abs(off).max() <= 2, (len(view), off)


def test_every_stretch_of_a_part_is_a_stratified_sample() -> None:
    data = made(5_000, classes=4)
    train = split(data, seed=1, max_drop=0.01).train
    share = np.bincount(data.view.labels, minlength=4) / 5_000
    for start in range(0, len(train) - 100, 100):
        off = np.bincount(train.labels[start : start + 100], minlength=4) - 100 * share
        assert np.abs(off).max() <= 2


def test_every_example_is_as_likely_as_any_to_prove() -> None:
    n, seeds = 60, 400
    x = np.arange(n, dtype=np.float32)[:, None]
    labels = np.array([0] * 57 + [1, 2, 2])
    hits = np.zeros(n)
    for seed in range(seeds):
        cut = split(View(inputs=(x,), labels=labels), seed=seed, max_drop=0.01)
        hits[cut.prove.inputs[0][:, 0].astype(int)] += 1
    expected, spread = seeds * 0.5, math.sqrt(seeds * 0.25)
    assert np.abs(hits - expected).max() < 4.5 * spread


@pytest.mark.parametrize("grouped", [False, True])
def test_the_order_of_the_file_does_not_matter(grouped: bool) -> None:
    data = made(300, repeats=0.2, groups=90 if grouped else 0)
    order = np.random.default_rng(5).permutation(300)
    groups = None if data.groups is None else data.groups[order]
    other = Loaded(view=data.view.take(order), groups=groups)
    for a, b in zip(parts(split(data, seed=1, max_drop=0.01)).values(), parts(split(other, seed=1, max_drop=0.01)).values(), strict=True):
        assert sorted(rows(a)) == sorted(rows(b))


def test_a_cut_is_the_same_on_every_machine() -> None:
    view = View(inputs=(np.arange(12, dtype=np.float32)[:, None],), labels=np.arange(12) % 2)
    cut = split(view, seed=7, max_drop=0.01)
    assert {name: part.inputs[0][:, 0].astype(int).tolist() for name, part in parts(cut).items()} == PINNED


@pytest.mark.parametrize("n", [40, 400])
@pytest.mark.parametrize("groups", [0, 30])
@pytest.mark.parametrize("shared", [0, 1, 7])
def test_laws_of_a_cut_beside_a_given_prove_set(n: int, groups: int, shared: int) -> None:
    data, others = made(n, repeats=0.1, groups=groups), made(50, groups=9, seed=1)
    index = np.arange(0, 5 * shared, 5)
    fresh = others.view.inputs[0] + np.float32(0.5)
    prove = Loaded(
        view=View(
            inputs=(np.concatenate([fresh, data.view.inputs[0][index]]),),
            labels=np.concatenate([others.view.labels, data.view.labels[index]]),
        ),
        groups=None if data.groups is None else np.concatenate([others.groups + 100, data.groups[index]]),
    )
    cut = split(data, prove, seed=0, max_drop=0.01)
    assert cut.provenance == "held out"
    assert cut.prove.fingerprint() == prove.view.fingerprint()
    used, shut = rows(cut.train) + rows(cut.select), set(rows(prove.view))
    assert not set(rows(cut.train)) & set(rows(cut.select))
    barred = np.array([row in shut for row in rows(data.view)])
    if data.groups is not None:
        barred |= np.isin(data.groups, prove.groups)
    assert Counter(used) == Counter(row for row, bad in zip(rows(data.view), barred, strict=True) if not bad)
    told = [note for note in cut.notes if f"{barred.sum()} of {n} examples of the data occur in the prove set" in note]
    assert len(told) == (shared > 0)


def test_a_set_of_two_parts_is_enough_beside_a_given_prove_set() -> None:
    cut = split(View(inputs=(np.array([[0.0], [0.0], [1.0]]),)), View(inputs=(np.array([[2.0], [3.0], [4.0]]),)), seed=0, max_drop=0.01)
    assert sorted([len(cut.train), len(cut.select)]) == [1, 2]


def test_a_large_prove_set_selects_as_well_and_the_seed_does_not_move_the_line() -> None:
    data, prove = made(300, groups=0), made(1_400, groups=70, repeats=0.05, seed=1)
    prove = Loaded(view=View(inputs=(prove.view.inputs[0] + np.float32(0.5),), labels=prove.view.labels), groups=None)
    cut = split(data, prove, seed=0, max_drop=0.01)
    assert (len(cut.train), cut.provenance) == (300, "held out")
    assert len(cut.select) == len(prove) // 4
    assert not set(rows(cut.select)) & set(rows(cut.prove))
    assert Counter(rows(cut.select) + rows(cut.prove)) == Counter(rows(prove.view))
    assert "350 of the 1,400 examples of the prove set chose, the others proved" in cut.notes
    other = split(data, prove, seed=1, max_drop=0.01)
    assert other.prove.fingerprint() == cut.prove.fingerprint()
    assert other.train.fingerprint() != cut.train.fingerprint()


def test_groups_and_repeats_hang_together_through_each_other() -> None:
    x = np.array([0, 1, 1, 2, 2, 3, 7, 8], dtype=np.float32)[:, None]
    groups = np.array(["a", "a", "b", "b", "c", "d", "e", "f"])
    view = View(inputs=(x,), labels=np.arange(8) % 2)
    for seed in range(20):
        cut = split(Loaded(view=view, groups=groups), seed=seed, max_drop=0.01)
        homes = [name for name, part in parts(cut).items() if {0, 1, 2} & set(part.inputs[0][:, 0].tolist())]
        assert len(homes) == 1


def test_minus_zero_is_zero_and_inputs_count_together() -> None:
    first = np.array([[0.0], [-0.0], [1.0], [1.0], [2.0]], dtype=np.float32)
    second = np.array([1, 1, 2, 3, 4], dtype=np.int64)
    view = View(inputs=(first, second), labels=np.array([0, 1, 0, 1, 0]))
    for seed in range(20):
        cut = split(view, seed=seed, max_drop=0.01)
        assert sum(1 in part.inputs[1] for part in parts(cut).values()) == 1
    assert any(sum(1.0 in part.inputs[0] for part in parts(split(view, seed=seed, max_drop=0.01)).values()) == 2 for seed in range(20))


def test_sizes_of_the_design() -> None:
    assert shares(10) == (3, 2, 5)
    assert shares(100) == (30, 20, 50)
    assert shares(600) == (272, 60, 268)
    assert shares(5_000) == (2_639, 500, 1_861)
    assert shares(70_000) == (58_000, 2_000, 10_000)
    for n in range(3, 3_000):
        for drop in (0.0, 0.001, 0.01, 0.05, 2.0):
            sizes = shares(n, max_drop=drop)
            assert sum(sizes) == n
            assert min(sizes) >= 1


@pytest.mark.parametrize(("drop", "confidence", "n"), [(0.01, 0.95, 268), (0.02, 0.95, 133), (0.01, 0.99, 536)])
def test_the_fewest_examples(drop: float, confidence: float, n: int) -> None:
    """Tango's interval without a discordant pair ends at z²/(n + z²)."""
    from scipy.stats import norm

    z2 = norm.ppf(confidence) ** 2
    assert fewest(drop, confidence) == n
    assert z2 / (n + z2) <= drop < z2 / (n - 1 + z2)


def test_no_number_of_examples_shows_a_drop_of_zero() -> None:
    assert fewest(0.0, 0.95) is None
    assert enough(0.0, 0.95) is None
    assert fewest(1.5, 0.95) is None


def test_enough_gives_nine_in_ten() -> None:
    n = enough(0.01, 0.95)
    assert n is not None
    rng = np.random.default_rng(0)
    lost, won, _ = rng.multinomial(n, [0.01, 0.01, 0.98], size=4_000).T
    shown = np.mean([_tango_upper(int(a), int(b), n) <= 0.01 for a, b in zip(lost, won, strict=True)])
    assert 0.88 < shown < 0.93


def _tango_upper(lost: int, won: int, n: int, z: float = 1.6448536) -> float:
    low, high = (lost - won) / n, 0.5
    for _ in range(30):
        d = (low + high) / 2
        b = -lost - won + (2 * n - lost + won) * d
        q = (math.sqrt(max(b * b + 8 * n * won * d * (1 - d), 0.0)) - b) / (4 * n)
        t = (lost - won - n * d) / math.sqrt(max(n * (2 * q + d * (1 - d)), 1e-12))
        low, high = (d, high) if t > -z else (low, d)
    return high


def test_notes_say_how_many_would_do() -> None:
    said = split(made(300), seed=0, max_drop=0.01).notes
    expected = "prove has 150 examples; at least 268 are needed to show a drop of at most 1 point at 95 %, about 1,861"
    assert any(note.startswith(expected) for note in said)
    assert split(made(5_000), seed=0, max_drop=0.01).notes == ()
    values = Loaded(view=View(inputs=made(50).view.inputs, labels=np.linspace(0, 1, 50, dtype=np.float32)))
    assert split(values, seed=0, max_drop=0.01).notes == ()
    assert any("alike" in note for note in split(made(300, groups=50), seed=0, max_drop=0.01).notes)


def test_classes_that_train_lacks_are_told() -> None:
    prove = View(inputs=(np.arange(100, 140, dtype=np.float32)[:, None],), labels=np.arange(40) % 4)
    data = View(inputs=(np.arange(40, dtype=np.float32)[:, None],), labels=np.arange(40) % 2)
    assert "train has no example of 2 classes that prove has: 2, 3" in split(data, prove, seed=0, max_drop=0.01).notes


def one_feature(n: int, dtype: Any = np.float32, **more: Any) -> Loaded:
    return Loaded(view=View(inputs=(np.arange(n, dtype=dtype)[:, None],), labels=np.arange(n) % 2), **more)


@pytest.mark.parametrize(
    ("data", "prove", "message"),
    [
        (View(inputs=(np.zeros((9, 2)),)), None, "at least 3 independent parts, got 1 from 9 examples"),
        (one_feature(9, groups=np.arange(9) % 2), None, "at least 3 independent parts, got 2"),
        (one_feature(9), one_feature(9), "got none of its own"),
        (one_feature(9), View(inputs=(np.zeros((9, 2)),)), r"float32 \(1,\); .* got inputs float32 \(2,\)"),
        (one_feature(9), View(inputs=(np.arange(9.0)[:, None],)), r"labels int64 .* got .* labels none"),
        (one_feature(9, classes=("a", "b")), one_feature(9, classes=("b", "c")), "classes of the data, a, b, got b, c"),
        (one_feature(9), one_feature(9, np.int64), "float32"),
    ],
)  # fmt: skip
def test_sets_that_cannot_be_cut(data: Any, prove: Any, message: str) -> None:
    with pytest.raises(DataRefused, match=message):
        split(data, prove, seed=0, max_drop=0.01)


@pytest.mark.parametrize("sizes", [[100, 1, 1], [50, 50, 1, 1], [2, 2, 2], [1, 1, 1, 300]])
def test_large_groups_leave_no_part_empty(sizes: list[int]) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    for seed in range(10):
        cut = split(one_feature(len(groups), groups=groups), seed=seed, max_drop=0.01)
        assert min(len(part) for part in parts(cut).values()) >= 1


def test_sealed_views_come_back_as_they_were(tmp_path: Path) -> None:
    cut = split(made(200), seed=0, max_drop=0.01)
    opened: list[str] = []
    for views in (seal(cut, tmp_path), reopen(tmp_path)):
        for part in ("train", "calibrate", "select"):
            view = getattr(views, part)
            assert view.fingerprint() == getattr(cut, part).fingerprint()
            assert isinstance(view.inputs[0], np.memmap)
        assert (views.prove.size, views.provenance) == (len(cut.prove), "unknown")
        assert views.prove.open(opened.append).fingerprint() == cut.prove.fingerprint() == views.prove.fingerprint
    assert opened == [cut.prove.fingerprint()] * 2
    assert notes(tmp_path) == cut.notes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["views"]


def test_a_seal_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = split(made(50), seed=0, max_drop=0.01)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(StorageError, match="the disk is full"):
            seal(cut, tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "views" / "train").mkdir(parents=True)  # what a killed run left
    for _ in range(2):
        assert seal(cut, tmp_path).train.fingerprint() == cut.train.fingerprint()
        assert [p.name for p in tmp_path.iterdir()] == ["views"]


def test_damage_is_seen(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*cut\.json"):
        reopen(tmp_path)
    seal(split(made(50), seed=0, max_drop=0.01), tmp_path)
    path = tmp_path / "views" / "prove" / "labels.npy"
    values = path.read_bytes()
    path.write_bytes(values[:-8] + b"\1" + values[-7:])
    with pytest.raises(StorageError, match="its content changed"):
        reopen(tmp_path).prove.open(lambda _: None)
    for text in ("", "{}", "[]", json.dumps({"provenance": "x", "prove": {"size": 1, "fingerprint": ""}, "notes": []})):
        (tmp_path / "views" / "cut.json").write_text(text)
        with pytest.raises(StorageError, match="cannot read"):
            reopen(tmp_path)


def test_reading_and_cutting_need_no_torch() -> None:
    code = (
        "import sys, numpy as np; from hasten.load.split import split; from hasten.core.data import View;"
        "split(View(inputs=(np.eye(9),)), seed=0, max_drop=0.01);"
        "print([m for m in ('torch', 'pandas', 'PIL', 'onnx') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
