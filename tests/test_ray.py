"""Outposts on the nodes of a Ray cluster: the search comes out as without them, also when a node is lost on the way."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import madeup
import problems
from cluster import Nodes, cluster
from hasten.core.errors import UsageError
from hasten.evaluating import evaluate
from hasten.judging import Asked
from hasten.search.outpost import Hands, Outpost
from hasten.search.watch import Event

pytest.importorskip("ray")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]


def _lose_while_building(nodes: Nodes, began: threading.Event) -> None:
    if began.wait(300):
        nodes.lose(0)


def test_a_search_on_other_machines_that_loses_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, built, began = {}, [], threading.Event()
    real = Outpost.build

    def watched(self: Outpost, *given: object, **more: object) -> None:
        began.set()
        real(self, *given, **more)  # type: ignore[arg-type]
        built.append(self)

    monkeypatch.setattr(Outpost, "build", watched)
    monkeypatch.setattr("hasten.distributed.ray._ANSWER_S", 900.0)
    with cluster(2) as nodes:
        losing = threading.Thread(target=_lose_while_building, args=(nodes, began))
        losing.start()
        for name, hands in (("here", Hands()), ("there", Hands(ray=nodes.address, workers=2))):
            monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / f"state-{name}"))
            madeup.prepare(tmp_path / name)
            madeup.search(tmp_path / name, hands=hands)
            found[name] = madeup.remembered(tmp_path / name)
            found[name]["folders"] = {k: v for k, v in found[name]["folders"].items() if not k.startswith("cache/")}
        losing.join()
    assert built, "nothing was built on the cluster"
    assert found["here"] == found["there"]


def test_examples_shared_by_machines_one_of_which_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, held = problems.write_files(tmp_path)
    monkeypatch.setattr("hasten.distributed.ray._ANSWER_S", 900.0)
    with cluster(2) as nodes:
        lost = []

        def watch(event: Event) -> None:
            if "answered" in event.words and not lost:
                lost.append(event.words)
                nodes.lose(0)

        there = evaluate(model, held, asked=Asked(batch=4, ray=nodes.address), watcher=watch)
    assert lost
    assert (there.score, there.classes) == ((here := evaluate(model, held, asked=Asked(batch=4))).score, here.classes)


def test_no_cluster() -> None:
    with pytest.raises(UsageError, match=r"no Ray cluster answers at '127\.0\.0\.1:1': Connection refused"):
        Hands(ray="127.0.0.1:1").hire(Path(), loss="classes", seed=0)
