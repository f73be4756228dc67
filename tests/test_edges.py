"""Edges of the rooms around the search: what is not finite, not a tensor, not writable, or goes wrong for a moment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hasten
import madeup
from hasten.core import folder
from hasten.core.errors import ChildFailed, HastenError, ModelRefused, StorageError
from hasten.core.network import Network
from hasten.core.runner import Runner
from hasten.core.store import Store
from hasten.engines import AotInductor, Eager, Program, TorchCompile
from hasten.load import lower, saved
from hasten.search import export, ledger, workshop
from hasten.search.bench import Bench, check_alike, difference

INF = float("inf")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([-INF, 1.0, 2.0], [-INF, 1.0, 1.0], 0.5),
        ([-INF, 1.0, 2.0], [INF, 1.0, 2.0], INF),
        ([-INF, 1.0, 2.0], [0.0, 1.0, 2.0], INF),
        ([np.nan, 1.0, 2.0], [np.nan, 1.0, 2.0], 0.0),
        ([0.0, 1.0, 2.0], [0.0, np.nan, 2.0], INF),
    ],
)
def test_a_difference_is_one_beside_what_is_not_finite(old: list[float], new: list[float], expected: float) -> None:
    assert difference((np.array(old),), (np.array(new),)) == expected


def test_masked_outputs_are_compared_where_they_are_numbers() -> None:
    mask = np.array([-INF, 1.0, 2.0])
    assert lower.relative_difference(mask, mask + np.array([0.0, 0.5, 0.0])) == 0.25
    with pytest.raises(ChildFailed, match="NaN or infinity"):
        check_alike((mask,), (np.array([-INF, 1.0, np.nan]),))


class Loose(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"y": 2 * x, "loss": None}


@pytest.mark.parametrize("engine", [Eager(), TorchCompile(), AotInductor(), Program()], ids=str)
def test_what_is_no_tensor_among_the_outputs_is_left_out(engine: Any, tmp_path: Path) -> None:
    if why := engine.available():
        pytest.skip(why)
    x = np.ones((2, 3), np.float32)
    network = Network(kind="module", body=Loose().eval(), example=(x,))
    (tmp_path / "packed").mkdir()
    engine.pack(network, tmp_path / "packed")
    with Runner(tmp_path / "packed") as runner:
        outputs = runner(x)
    assert len(outputs) == 1
    assert np.array_equal(outputs[0], 2 * x)


def test_what_a_loader_needs_is_named() -> None:
    assert export.needs("import functools, lzma\nfrom pathlib import Path\nfrom ai_edge_litert.interpreter import Interpreter\n") == [
        "ai_edge_litert",
        "numpy",
    ]


def test_a_home_that_cannot_be_written_is_told_before_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    madeup.prepare(tmp_path / "run")
    with pytest.raises(StorageError, match="set XDG_STATE_HOME"):
        madeup.search(tmp_path / "run")
    store = Store(tmp_path / "run" / "run.sqlite")
    assert store.trials() == []
    store.close()
    with pytest.raises(StorageError, match="set XDG_STATE_HOME"):
        ledger.check()


def test_a_first_trial_that_failed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise ChildFailed("no answer within 120 s")

    madeup.prepare(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Bench, "_measure", busy)
        with pytest.raises(ModelRefused, match="no answer within 120 s"):
            madeup.search(tmp_path)
    assert madeup.search(tmp_path).state == "finished"


def test_a_call_that_failed_at_once_does_not_hold_the_folder(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("a,b\n" + "".join(f"{i},{i % 2}\n" for i in range(40)))
    (tmp_path / "net.py").write_text("raise ValueError('broken')\n")
    for target in ("c", "d"):
        with pytest.raises(HastenError) as why:
            hasten.optimize(f"{tmp_path}/net.py:Net", tmp_path / "d.csv", run=tmp_path / "run", options=hasten.Options(target=target))
        assert "another target" not in str(why.value)


def test_a_folder_may_be_named_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with folder.new_folder(Path(".")) as fresh:
        (fresh / "x").write_text("x")
    assert (tmp_path / "empty" / "x").read_text() == "x"


def test_our_own_network_is_read_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        saved.save(Network(kind="module", body=nn.Linear(2, 2).eval(), example=(np.zeros((2, 2), np.float32),)), tmp_path / "saved")
    finally:
        os.umask(before)
    assert saved.load(tmp_path / "saved").kind == "module"


@torch.library.custom_op("edges::twice", mutates_args=())
def _twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@_twice.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Foreign(nn.Module):
    """Calls an operator that torch alone does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _twice(x)


class Doubling(nn.Module):
    """Takes floats and computes in doubles, for which its program would ask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.double()).float()


@pytest.mark.parametrize(("module", "expected"), [(nn.Linear(3, 2), True), (Foreign(), False), (Doubling(), False)])
def test_the_original_is_shipped_as_a_program_only_where_torch_alone_can_run_it(tmp_path: Path, module: nn.Module, expected: bool) -> None:
    run = tmp_path / "run"
    with folder.new_folder(run / workshop.ORIGINAL) as fresh:
        saved.save(Network(kind="module", body=module.eval(), example=(np.ones((2, 3), np.float32),)), fresh / "network")
    (tmp_path / "made").mkdir()
    workshop._original.cache_clear()
    nothing = np.zeros(0, np.uint8)
    assert workshop._ship(nothing, run=str(run), loss="classes", seed=0, into=str(tmp_path / "made")) is expected
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == (["load.py", "model.pt2"] if expected else [])
