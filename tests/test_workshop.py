"""What trainings of one run share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hasten.core.data import View
from hasten.core.network import Network
from hasten.load import files, saved
from hasten.search import workshop


def prepared(run: Path, examples: int, fixed: int | None) -> tuple[nn.Module, np.ndarray]:
    torch.manual_seed(0)
    module = nn.Linear(6, 3).eval()
    inputs = np.random.default_rng(0).normal(size=(examples, 6)).astype(np.float32)
    opened = files.from_module(module, (inputs[: fixed or 4],))
    network = Network(body=opened.body, example=opened.example, kind="module", fixed_batch=fixed)
    saved.save(network, run / workshop.ORIGINAL / "network")
    for name in ("train", "calibrate"):
        View(inputs=(inputs,), labels=np.zeros(examples, np.int64)).save(run / "views" / name)
    return module, inputs


@pytest.mark.parametrize(("examples", "fixed"), [(150, None), (128, None), (3, None), (30, 8)])
def test_the_original_is_asked_once_for_all_trainings(tmp_path: Path, examples: int, fixed: int | None) -> None:
    module, inputs = prepared(tmp_path, examples, fixed)
    found = workshop._answers(str(tmp_path))
    with torch.no_grad():
        np.testing.assert_allclose(found[0], module(torch.from_numpy(inputs)).numpy(), rtol=1e-5, atol=1e-6)
    workshop._answers.cache_clear()
    place = next(p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    before = place.stat().st_mtime_ns
    np.testing.assert_array_equal(workshop._answers(str(tmp_path))[0], found[0])
    assert place.stat().st_mtime_ns == before
