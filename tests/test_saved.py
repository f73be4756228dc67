"""Our own folders: saved, loaded, and not trusted blindly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from hasten.core.errors import StorageError
from hasten.core.network import Network
from hasten.load import saved
from hasten.load.files import check_forward
from hasten.load.lower import forward
from networks import NETWORKS, QUICK, lowered, network


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.long) for n in NETWORKS])
@pytest.mark.parametrize("form", ["module", "graph"])
def test_save_and_load(name: str, form: str, tmp_path: Path) -> None:
    given = network(name) if form == "module" else lowered(name)
    saved.save(given, tmp_path / "a" / "n")
    again = saved.load(tmp_path / "a" / "n")
    assert (again.kind, again.fixed_batch) == (given.kind, given.fixed_batch)
    assert all(np.array_equal(a, b) for a, b in zip(again.example, given.example, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(forward(again, again.example), forward(given, given.example), strict=True))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["n"]


def test_a_class_of_a_script_survives(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec("import torch\nclass Own(torch.nn.Module):\n    def forward(self, x):\n        return x + 1", namespace)
    saved.save(Network(kind="module", body=namespace["Own"](), example=(np.ones((2, 2)),), fixed_batch=2), tmp_path / "n")
    again = saved.load(tmp_path / "n")
    assert again.fixed_batch == 2
    assert (forward(again, again.example)[0] == 2).all()


def test_saving_is_all_or_nothing(tmp_path: Path) -> None:
    broken = nn.Linear(2, 2)
    broken.lock = __import__("threading").Lock()
    with pytest.raises(StorageError, match="cannot save the network in"):
        saved.save(Network(kind="module", body=broken, example=()), tmp_path / "n")
    assert list(tmp_path.iterdir()) == []
    saved.save(network("shared"), tmp_path / "n")
    with pytest.raises(StorageError, match="expected a new folder"):
        saved.save(network("shared"), tmp_path / "n")


def test_a_folder_of_another_user_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved.save(network("shared"), tmp_path / "n")
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    with pytest.raises(StorageError, match="written by the current user"):
        saved.load(tmp_path / "n")


@pytest.mark.parametrize("where", [".", "module.pt"])
def test_a_folder_that_anyone_may_change_is_not_read(where: str, tmp_path: Path) -> None:
    saved.save(network("shared"), tmp_path / "n")
    (tmp_path / "n" / where).chmod(0o777)
    with pytest.raises(StorageError, match="writable by anyone"):
        saved.load(tmp_path / "n")


@pytest.mark.parametrize("file", ["network.json", "example.npz", "module.pt"])
def test_a_damaged_folder_is_told(file: str, tmp_path: Path) -> None:
    saved.save(network("shared"), tmp_path / "n")
    (tmp_path / "n" / file).write_bytes(b"{}")
    with pytest.raises(StorageError, match="cannot read the network in"):
        saved.load(tmp_path / "n")
    with pytest.raises(StorageError, match="cannot read the network in"):
        saved.load(tmp_path / "missing")


def test_checking_again_changes_nothing() -> None:
    given = network("cnn")
    assert check_forward(given) is given
