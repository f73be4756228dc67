"""Reading: the same data gives the same view in whatever form it comes, and bad data gives one plain line."""

from __future__ import annotations

import itertools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from hasten.core.data import View
from hasten.core.errors import BackendMissing, DataRefused, OutOfResources, UsageError
from hasten.load import examples
from hasten.load.data import Loaded, check_labels, read
from test_image_folders import images

N, FEATURES = 37, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, FEATURES)).astype(np.float32)
Y = RNG.permutation(np.arange(N) % 3).astype(np.int64)
GROUP = RNG.integers(0, 6, N)
VALUES = RNG.normal(size=N).astype(np.float32)


class Pairs(Dataset[Any]):
    def __init__(self, *arrays: Any) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, i: int) -> Any:
        return tuple(array[i] for array in self.arrays)


class Unsized(Pairs):
    __len__ = None  # type: ignore[assignment]


class Named(Pairs):
    def __getitem__(self, i: int) -> Any:
        return dict(zip("xy", super().__getitem__(i), strict=True))


class Stream(IterableDataset[Any]):
    def __init__(self, *arrays: Any) -> None:
        self.arrays = arrays

    def __iter__(self) -> Iterator[Any]:
        return zip(*self.arrays, strict=True)


def frame(x: np.ndarray = X, y: Any = Y, **more: Any) -> pd.DataFrame:
    return pd.DataFrame({f"f{i}": column for i, column in enumerate(x.T)} | {"label": y} | more)


def saved(path: Path, how: Callable[[Path], Any]) -> Path:
    how(path)
    return path


FORMS: dict[str, Callable[[Path, Any], Any]] = {
    "arrays": lambda _, y: (X, y),
    "float64": lambda _, y: (X.astype(np.float64), y),
    "big endian": lambda _, y: (X.astype(">f4"), y),
    "column labels": lambda _, y: (X, y[:, None]),
    "lists": lambda _, y: (X.tolist(), y.tolist()),
    "tensors": lambda _, y: (torch.from_numpy(X).requires_grad_(), torch.from_numpy(y)),
    "view": lambda _, y: View(inputs=(X,), labels=y),
    "mapping": lambda _, y: {"labels": y, "pixels": X},
    "npz": lambda p, y: saved(p / "a.npz", lambda f: np.savez(f, y=y, x=X)),
    "npz, packed": lambda p, y: saved(p / "a.npz", lambda f: np.savez_compressed(f, x=X.astype(np.float64), y=y)),
    "npz, Fortran order": lambda p, y: saved(p / "a.npz", lambda f: np.savez(f, x=np.asfortranarray(X), y=y)),
    "csv": lambda p, y: saved(p / "a.csv", lambda f: frame(y=y).to_csv(f, index=False)),
    "tsv": lambda p, y: saved(p / "a.tsv", lambda f: frame(y=y).to_csv(f, index=False, sep="\t")),
    "parquet": lambda p, y: saved(p / "a.parquet", lambda f: frame(y=y).to_parquet(f)),
    "frame": lambda _, y: frame(y=y),
    "nullable frame": lambda _, y: frame(y=y).convert_dtypes(),
    "tensor set": lambda _, y: TensorDataset(torch.from_numpy(X), torch.from_numpy(y)),
    "data set": lambda _, y: Pairs(X, y),
    "data set without len": lambda _, y: Unsized(X, y),
    "data set of mappings": lambda _, y: Named(X, y),
    "stream": lambda _, y: Stream(X, y),
    "generator": lambda _, y: zip(X, y, strict=True),
    "loader": lambda _, y: DataLoader(Pairs(X, y), batch_size=8),
    "loader, shuffled": lambda _, y: DataLoader(Pairs(X, y), batch_size=8, shuffle=True),
    "loader, last batch dropped": lambda _, y: DataLoader(Pairs(X, y), batch_size=8, drop_last=True),
    "loader without batches": lambda _, y: DataLoader(Pairs(X, y), batch_size=None),
    "loader of a stream": lambda _, y: DataLoader(Stream(X, y), batch_size=5),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("y", [Y, VALUES], ids=["classes", "values"])
def test_every_form_gives_the_same_view(form: str, y: np.ndarray, tmp_path: Path) -> None:
    view = read(FORMS[form](tmp_path, y)).view
    assert view.labels is not None
    assert (view.inputs[0].dtype, view.labels.dtype) == (np.float32, y.dtype)
    assert view.fingerprint() == View(inputs=(X,), labels=y).fingerprint()


@pytest.mark.parametrize(
    "form",
    [
        lambda _: {"x": X, "who": GROUP, "y": Y},
        lambda p: saved(p / "a.npz", lambda f: np.savez(f, x=X, who=GROUP, y=Y)),
        lambda _: frame(who=GROUP),
        lambda p: saved(p / "a.csv", lambda f: frame(who=GROUP).to_csv(f, index=False)),
        lambda p: saved(p / "a.parquet", lambda f: frame(who=GROUP).to_parquet(f)),
        lambda _: ({"x": x, "who": g, "y": y} for x, g, y in zip(X, GROUP, Y, strict=True)),
    ],
)
def test_a_group_is_no_input(form: Callable[[Path], Any], tmp_path: Path) -> None:
    found = read(form(tmp_path), group="who")
    assert found.groups is not None
    assert found.groups.tolist() == GROUP.tolist()
    assert found.view.fingerprint() == View(inputs=(X,), labels=Y).fingerprint()


def test_several_inputs_come_in_their_order(tmp_path: Path) -> None:
    many = {f"x{i}": np.full((4, 2), i, dtype=np.float32) for i in (10, 2, 0)}
    np.savez(tmp_path / "numbered.npz", y=[0, 1, 0, 1], **many)
    assert [a[0, 0] for a in read(tmp_path / "numbered.npz").view.inputs] == [0, 2, 10]
    np.savez(tmp_path / "named.npz", words=many["x10"], y=[0, 1, 0, 1], mask=many["x2"])
    assert [a[0, 0] for a in read(tmp_path / "named.npz").view.inputs] == [10, 2]
    for source in [(X, X[:, :2], Y), Pairs(X, X[:, :2], Y), DataLoader(Pairs(X, X[:, :2], Y), batch_size=9)]:
        view = read(source).view
        assert [a.shape for a in view.inputs] == [(N, 5), (N, 2)]
        assert view.labels is not None


@pytest.mark.parametrize("source", [X, torch.from_numpy(X), (X,), (X, None), Stream(X), DataLoader(list(X), batch_size=4)])
def test_inputs_alone_have_no_labels(source: Any) -> None:
    found = read(source)
    assert found.view.labels is None
    assert found.view.fingerprint() == View(inputs=(X,)).fingerprint()


def test_an_array_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    assert read(tmp_path / "x.npy").view.fingerprint() == View(inputs=(X,)).fingerprint()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (np.float16, np.float32), (np.float64, np.float32), (np.uint8, np.uint8), (np.bool_, np.bool_), (np.int8, np.int64),
        (np.uint16, np.int64), (np.int32, np.int32), (np.int64, np.int64), (torch.bfloat16, np.float32),
    ],
)  # fmt: skip
def test_input_types(given: Any, kept: Any) -> None:
    x = torch.ones(4, 2, dtype=given) if isinstance(given, torch.dtype) else np.ones((4, 2), dtype=given)
    assert read((x, [0, 1, 0, 1])).view.inputs[0].dtype == kept


@pytest.mark.parametrize(
    ("labels", "kind", "classes"),
    [
        ([True, False, True], "int64", None),
        (np.array([0, 3, 1], dtype=np.uint8), "int64", None),
        (["dog", "cat", "dog"], "int64", ("cat", "dog")),
        ([0.5, 1.0, 2.0], "float32", None),
        (np.ones((3, 2)), "float32", None),
    ],
)
def test_label_types(labels: Any, kind: str, classes: Any) -> None:
    found = read((X[:3], labels))
    assert found.view.labels is not None
    assert (found.view.labels.dtype, found.classes) == (np.dtype(kind), classes)


def test_whole_floats_stay_values_and_a_note_says_so() -> None:
    assert "taken as values" in read((X[:3], [0.0, 1.0, 2.0])).notes[0]
    assert read((X[:3], [0.0, 1.0, 2.5])).notes == ()


def test_a_second_set_keeps_the_numbers_of_the_first() -> None:
    first = read((X[:3], ["cat", "dog", "owl"]))
    second = read((X[:3], ["owl", "dog", "owl"]), classes=first.classes)
    assert second.view.labels is not None
    assert second.view.labels.tolist() == [2, 1, 2]
    with pytest.raises(DataRefused, match="among the classes cat, dog, owl, got elk"):
        read((X[:3], ["elk", "dog", "owl"]), classes=first.classes)
    with pytest.raises(DataRefused, match=r"in \[0, 3\), one for each class, got 7"):
        read((X[:3], [0, 1, 7]), classes=first.classes)


def with_value(value: float) -> np.ndarray:
    x = X.copy()
    x[[4, 9], 1] = value
    return x


REFUSED: list[tuple[Any, str]] = [
    ((X[:0], Y[:0]), "must hold examples, got an empty set"),
    (iter(()), "must hold examples, got an empty set"),
    ((X[:2], Y[:2]), "at least 3 examples, got 2"),
    ((with_value(np.nan), Y), "input 0 must be finite .* 2 of 37 examples, the first is example 4"),
    ((with_value(-np.inf), Y), "2 of 37 examples, the first is example 4"),
    ((X.astype(np.float64) * 1e300, Y), "37 of 37 examples"),
    ((X, np.where(np.arange(N) == 6, np.nan, VALUES)), "the labels must be finite .* the first is example 6"),
    ((X, np.zeros(N, dtype=int)), "at least two classes, got 0 for every example"),
    ((X, Y - 1), "must be 0 or above, got -1"),
    ((X, Y[:-1]), "one row for each example, got input 0: 37, labels: 36"),
    ((X, np.eye(3, dtype=int)[Y]), r"shape \(37, 3\); for one-hot rows give labels.argmax\(1\)"),
    ((X, np.array([{}] * N)), "must be an array of numbers, got dtype object"),
    ((X.astype(object), Y), "must be an array of numbers, got dtype object"),
    ((X.astype(complex), Y), "must be an array of numbers, got dtype complex"),
    ((X.astype(str), Y), "must hold numbers, got text"),
    ((np.zeros((N, 0)), Y), "at least one value"),
    (([[1], [2, 3], [4]], [0, 1, 0]), "must be one array with a row for each example, got list"),
    ((np.float32(3), Y), "a row for each example, got the single value"),
    ((), "got an empty tuple"),
    ({"y": Y}, "must hold inputs beside labels"),
    (Pairs([np.zeros(2), np.zeros(3), np.zeros(2)], [0, 1, 0]), r"x0 must have one shape .*\(2,\) and \(3,\) in example 1"),
    (({"x": 1, "y": 0} if i else {"x": 1} for i in range(3)), "example 1 must hold x like the first, got x, y"),
    (frame(y=["a", None] + ["b"] * (N - 2)), "column label must be filled, it is empty in 1 of 37 rows, the first is row 1"),
    (frame(with_value(np.nan)), "finite numbers, got .* in f1 .*2 of 37 rows, the first is row 4"),
    (frame(town=["a"] * N, day=pd.Timestamp("2020-01-01")), "features must be numbers, got text or dates in town, day"),
    (frame()[:0], "must hold examples, got column names alone"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_data_that_is_refused(source: Any, message: str) -> None:
    with pytest.raises(DataRefused, match=message) as caught:
        read(source)
    assert "\n" not in str(caught.value)


def test_words_that_are_refused(tmp_path: Path) -> None:
    table = frame(y2=Y).rename(columns={"y2": "target"})
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    (tmp_path / "a.bin").write_bytes(b"")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "none.npz", {}, "no such file or folder"),
        (str(tmp_path / "a.bin"), {}, "expected .npz, .npy, .csv"),
        (tmp_path / "a.npz", {"group": "who"}, "has no 'who'; it has x, y"),
        (table, {}, "label, target, each of which could be the labels"),
        (frame().rename(columns={"label": "speed"}), {}, "no column y, label or target; .* f0, f1, f2, f3, f4, speed"),
        (frame(), {"target": "speed"}, "has no 'speed'"),
        ([1, 2, 3], {}, "got list"),
        (read((X, Y)), {"group": "who"}, "a View has no named parts"),
    ]
    for source, words, message in cases:
        with pytest.raises(UsageError, match=message):
            read(source, **words)


def test_a_table_saved_with_row_numbers_is_refused(tmp_path: Path) -> None:
    frame().to_csv(tmp_path / "a.csv")
    with pytest.raises(DataRefused, match="row numbers"):
        read(tmp_path / "a.csv")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=X, y=Y)
    frame().to_parquet(tmp_path / "a.parquet")
    np.save(tmp_path / "a.npy", X)
    for name in ("a.npz", "a.parquet", "a.npy"):
        whole = (tmp_path / name).read_bytes()
        for end in (0, 3, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:end])
            with pytest.raises(DataRefused, match="must be"):
                read(tmp_path / name)
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe,\n1,2,3\n")
    with pytest.raises(DataRefused, match="must be a table"):
        read(tmp_path / "a.csv")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([print] * 3), y=[0, 1, 0])
    with pytest.raises(DataRefused, match="Python objects, which are never loaded"):
        read(tmp_path / "a.npz")


def test_a_header_cannot_ask_for_memory(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 64)
    with pytest.raises(DataRefused, match="declares 4000000000000 bytes and holds 64"):
        read(tmp_path / "a.npz")


def test_a_zip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((50, 100_000), dtype=np.float32), y=np.arange(50) % 2)
    assert (tmp_path / "a.npz").stat().st_size < 100_000
    monkeypatch.setattr(examples, "free_bytes", lambda: 3 * 10_000_000)
    monkeypatch.setattr(np.lib.format, "read_array", None)  # refused before anything is unpacked
    with pytest.raises(OutOfResources, match=r"unpacked, would take 0\.0 GB"):
        read(tmp_path / "a.npz")


def test_large_tables_and_folders_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame().to_parquet(tmp_path / "a.parquet")
    frame().to_csv(tmp_path / "a.csv", index=False)
    images(tmp_path / "set", np.zeros((4, 2, 2), dtype=np.uint8), ["a", "a", "b", "b"])
    monkeypatch.setattr(examples, "free_bytes", lambda: 3)
    for name in ("a.parquet", "a.csv", "set"):
        with pytest.raises(OutOfResources, match="there is room for"):
            read(tmp_path / name)


def test_an_endless_stream_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "free_bytes", lambda: 3 * 1_000_000)
    monkeypatch.setattr("hasten.load.data.room_bytes", examples.room_bytes)
    with pytest.raises(OutOfResources, match=r"had not ended after .* items; if it is endless give a finite part"):
        read((np.zeros(100), i % 2) for i in itertools.count())


def test_an_error_inside_a_data_set_names_the_item() -> None:
    class Faulty(Pairs):
        def __getitem__(self, i: int) -> Any:
            if i == 5:
                raise KeyError("lost")
            return super().__getitem__(i)

    with pytest.raises(DataRefused, match="item 5 of the data set could not be read: KeyError: 'lost'"):
        read(Faulty(X, Y))


def test_a_sampler_of_the_user_is_obeyed() -> None:
    loader = DataLoader(Pairs(X, Y), batch_size=4, sampler=SubsetRandomSampler([3, 1, 4, 15, 9]))
    assert sorted(map(tuple, read(loader).view.inputs[0])) == sorted(map(tuple, X[[3, 1, 4, 15, 9]]))


def test_random_numbers_of_the_user_stay_where_they_were() -> None:
    class Noisy(Pairs):
        def __getitem__(self, i: int) -> Any:
            return torch.rand(3), self.arrays[0][i]

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = read(Noisy(Y)), read(DataLoader(Noisy(Y), batch_size=4, shuffle=True))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(4)
    assert first.view.fingerprint() == read(Noisy(Y)).view.fingerprint()
    assert "the loader shuffles" in second.notes[0]


def test_a_buffer_that_is_used_again_is_copied() -> None:
    def rows() -> Iterator[Any]:
        buffer = np.empty(FEATURES, dtype=np.float32)
        for x, y in zip(X, Y, strict=True):
            buffer[:] = x
            yield buffer, y

    assert read(rows()).view.fingerprint() == View(inputs=(X,), labels=Y).fingerprint()


@pytest.mark.parametrize(("package", "name", "extra"), [("pandas", "a.csv", "tables"), ("PIL", "set", "images")])
def test_a_missing_package_is_named(package: str, name: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame().to_csv(tmp_path / "a.csv", index=False)
    images(tmp_path / "set", np.zeros((4, 2, 2), dtype=np.uint8), ["a", "a", "b", "b"])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendMissing, match=rf"pip install 'hasten\[{extra}\]'"):
        read(tmp_path / name)


def test_what_was_read_is_handed_back() -> None:
    found = read((X, Y))
    assert isinstance(found, Loaded)
    assert read(found) is found


@pytest.mark.parametrize(("outputs", "good"), [(3, True), (4, True), (2, False), (1, False)])
def test_labels_are_held_against_the_outputs(outputs: int, good: bool) -> None:
    check_labels(VALUES, outputs)
    check_labels(None, outputs)
    check_labels(np.array([0, 1, 1]), outputs)
    if good:
        check_labels(Y, outputs)
        return
    with pytest.raises(DataRefused, match=r"in \[0, 2\), one for each class, got 2 \(12 of 37 examples"):
        check_labels(Y, outputs)
