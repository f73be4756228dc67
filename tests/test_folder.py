"""The run folder: whole files or none, a lock that dies with its holder, damage that is seen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hasten.core import folder
from hasten.core.data import Sealed, View
from hasten.core.errors import RunLocked, StorageError


def test_write_replaces_whole_files(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    folder.write(file, "one")
    folder.write(file, b"two")
    assert file.read_text() == "two"
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    folder.write(file, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        folder.write(file, "new")
    assert file.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "made"
    with pytest.raises(RuntimeError, match="half way"), folder.new_folder(place) as fresh:
        (fresh / "a").write_text("1")
        raise RuntimeError("half way")
    assert not place.exists()
    with folder.new_folder(place) as fresh:
        (fresh / "sub").mkdir()
        (fresh / "sub" / "a").write_text("1")
        assert not place.exists()
    assert folder.intact(place)
    assert folder.size_bytes(place) == 1


@pytest.mark.parametrize("atomic", [True, False])
def test_an_older_folder_is_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, atomic: bool) -> None:
    if not atomic:
        monkeypatch.setattr(folder, "_exchange", lambda *_: False)
    for text in ("old", "new"):
        with folder.new_folder(tmp_path / "made") as fresh:
            (fresh / text).write_text(text)
    assert folder.intact(tmp_path / "made")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["made", "manifest.json", "new"]


@pytest.mark.parametrize("damage", ["flip", "remove", "manifest"])
def test_damage_is_seen(tmp_path: Path, damage: str) -> None:
    place = tmp_path / "made"
    with folder.new_folder(place) as fresh:
        (fresh / "a").write_bytes(b"1234")
    if damage == "flip":
        (place / "a").write_bytes(b"1235")
    else:
        (place / {"remove": "a", "manifest": folder.MANIFEST}[damage]).unlink()
    assert not folder.intact(place)


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    lock = folder.Lock(tmp_path)
    assert folder.locked(tmp_path)
    script = f"from pathlib import Path; from hasten.core.folder import Lock; Lock(Path({str(tmp_path)!r}))"
    start = time.monotonic()
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert time.monotonic() - start < 120
    assert f"in use by process {os.getpid()}" in other.stderr
    lock.release()
    assert not folder.locked(tmp_path)
    with pytest.raises(RunLocked, match="choose another"):
        _twice(tmp_path)


def _twice(place: Path) -> None:
    first = folder.Lock(place)
    try:
        folder.Lock(place)
    finally:
        first.release()


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self").exists(), reason="needs /proc")
def test_a_place_that_cannot_be_written_is_named() -> None:
    with pytest.raises(StorageError, match="cannot write in /proc"):
        folder.Lock(Path("/proc/hasten"))


def test_views_survive_the_disk(tmp_path: Path) -> None:
    view = View(inputs=(np.arange(6.0).reshape(3, 2), np.arange(3)), labels=np.array([0, 1, 0]))
    view.save(tmp_path / "v")
    back = View.load(tmp_path / "v")
    assert back.fingerprint() == view.fingerprint()
    assert len(back.take(np.array([2, 0]))) == 2
    assert [len(b) for b in back.batches(2)] == [2, 1]
    other = View(inputs=view.inputs, labels=np.array([0, 1, 1]))
    assert other.fingerprint() != view.fingerprint()


def test_views_refuse_unequal_lengths() -> None:
    with pytest.raises(ValueError, match=r"same length, got \[2, 3\]"):
        View(inputs=(np.zeros((3, 1)),), labels=np.zeros(2))
    with pytest.raises(ValueError, match="at least one input"):
        View(inputs=())


def test_the_seal_records_before_it_opens() -> None:
    happened: list[str] = []
    view = View(inputs=(np.zeros((2, 1)),))

    def read() -> View:
        happened.append("read")
        return view

    sealed = Sealed(read, size=2, fingerprint="f")
    assert sealed.open(lambda fingerprint: happened.append(fingerprint)) is view
    assert happened == ["f", "read"]


def test_a_disk_that_fills_up_inside_the_block_is_a_matter_of_storage(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the disk is full"), folder.new_folder(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError), folder.new_folder(tmp_path / "a"):
        raise FileNotFoundError(2, "No such file")
    assert not list(tmp_path.iterdir())
