"""The demonstration says where it stands from the first second on; the whole of it is the README's first command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten import demo, tasks
from hasten.core.data import View
from hasten.search.watch import Event
from hasten.tasks import TaskData


def test_its_training_tells_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = View(inputs=(np.random.default_rng(0).normal(size=(64, 1, 28, 28)).astype(np.float32),), labels=np.arange(64) % 10)
    asked: list[Any] = []
    monkeypatch.setattr(tasks, "load", lambda name: TaskData(name=name, train=images, held_out=images, classes=tuple("0123456789")))
    monkeypatch.setattr(demo, "optimize", lambda *given, **named: asked.append(given))
    events: list[Event] = []
    demo.demo(tmp_path, watcher=events.append, say=lambda line: None)
    assert asked == [tuple(tmp_path / "inputs" / name for name in ("model.pt2", "data.npz", "prove.npz"))]
    left = [event.left_s for event in events if event.stage == "train"]
    assert left[0] is None
    assert len(left) > 10
    assert left[-1] == pytest.approx(0, abs=1)
