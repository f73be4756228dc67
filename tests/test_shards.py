"""Shards: every example answered once, in order, whoever is lost on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from hasten.core.errors import BackendMissing, ChildFailed, WorkerLost
from hasten.core.network import Arrays
from hasten.distributed import shards

INPUTS = (np.arange(1000, dtype=np.float32)[:, None], np.arange(1000, dtype=np.int64))


class Stand:
    """In the place of a runner: doubles its inputs; raises what it is told to at its `at`-th shard."""

    def __init__(self, why: Exception | None = None, at: int = 0) -> None:
        self.why, self.at, self.shards, self.closed = why, at, 0, False

    def __enter__(self) -> Stand:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def outputs(self, inputs: Arrays, *, batch: int) -> Arrays:
        assert len(inputs[0]) <= 16 * batch
        if self.why and self.shards == self.at:
            raise self.why
        self.shards += 1
        return tuple(2 * a for a in inputs)


def answered(*stands: Stand, batch: int = 3) -> Arrays:
    starts: list[Any] = [lambda s=s: s for s in stands]
    return shards.outputs(starts, INPUTS, batch=batch)


@pytest.mark.parametrize("batch", [1, 3, 62, 63, 1000])
@pytest.mark.parametrize("workers", [1, 3])
def test_all_examples_in_their_order(batch: int, workers: int) -> None:
    stands = [Stand() for _ in range(workers)]
    found = answered(*stands, batch=batch)
    assert all(np.array_equal(a, 2 * b) for a, b in zip(found, INPUTS, strict=True))
    assert sum(s.shards for s in stands) == -(-1000 // (16 * batch))
    assert all(s.closed for s in stands[: -(-1000 // (16 * batch))])


@pytest.mark.parametrize("at", [0, 1, 5])
def test_the_shard_of_a_lost_worker_goes_to_another(at: int) -> None:
    lost, well = Stand(WorkerLost("gone"), at), Stand()
    found = answered(lost, well)
    assert np.array_equal(found[0], 2 * INPUTS[0])
    assert lost.closed


def test_a_shard_given_back_when_the_others_are_through() -> None:
    began, through = threading.Event(), threading.Event()

    class Late(Stand):
        def outputs(self, inputs: Arrays, *, batch: int) -> Arrays:
            began.set()
            through.wait(10)
            raise WorkerLost("gone at last")

    class Well(Stand):
        def __exit__(self, *_: object) -> None:
            through.set()

        def outputs(self, inputs: Arrays, *, batch: int) -> Arrays:
            began.wait(10)
            return super().outputs(inputs, batch=batch)

    assert np.array_equal(answered(Late(), Well())[0], 2 * INPUTS[0])


@pytest.mark.parametrize("number", [1, 3])
def test_what_cannot_start_is_done_without(number: int) -> None:
    def missing() -> Stand:
        raise BackendMissing("no processor free")

    well = Stand()
    starts: list[Any] = [*[missing] * number, lambda: well]
    assert np.array_equal(shards.outputs(starts, INPUTS, batch=3)[0], 2 * INPUTS[0])
    with pytest.raises(BackendMissing, match="no processor free"):
        shards.outputs([missing] * number, INPUTS, batch=3)  # type: ignore[list-item]


def test_no_more_workers_than_shards() -> None:
    stands = [Stand() for _ in range(8)]
    answered(*stands, batch=1000)
    assert [s.closed for s in stands] == [True] + 7 * [False]


def test_nobody_begins_another_shard_after_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it

    class Slow(Stand):
        def outputs(self, inputs: Arrays, *, batch: int) -> Arrays:
            if self.shards == 2:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            return super().outputs(inputs, batch=batch)

    slow = Slow()
    try:
        with pytest.raises(KeyboardInterrupt):
            answered(slow, batch=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert slow.closed
    assert slow.shards < 20


def test_all_lost() -> None:
    with pytest.raises(WorkerLost, match="gone"):
        answered(Stand(WorkerLost("gone"), 2), Stand(WorkerLost("gone"), 1))


def test_what_is_no_loss_ends_it() -> None:
    well = Stand()
    with pytest.raises(ChildFailed, match="crashed"):
        answered(Stand(ChildFailed("crashed"), 0), well, batch=1)
    assert well.closed or not well.shards


def test_progress() -> None:
    told: list[tuple[float, str]] = []
    shards.outputs([Stand], INPUTS, batch=30, progress=lambda share, words: told.append((share, words)))  # type: ignore[list-item]
    assert told[-1] == (1.0, "1,000 of 1,000 examples answered")
    assert [share for share, _ in told] == sorted(share for share, _ in told)
