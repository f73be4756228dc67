"""A training that is killed at any moment ends with the bytes of one that was not."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from hasten.core.errors import RunLocked, StorageError, UsageError
from hasten.train import Augment, Average, Checkpoints, Fit, Health, Precision, Stop, Trainer
from hasten.train.records import Log, read
from hasten.train.schedules import OfTorch
from lessons import contents, dense, image, pictures, plain, points, seeded

CASES = {
    "plain": (dense, points(), Fit(epochs=6, batch=32, learning_rate=0.01)),
    "images": (
        image,
        pictures(),
        Fit(epochs=6, batch=32, augmentation=Augment(shift=1, flip="alternating", cutout=2, mixup=0.4), average=Average(kind="swa")),
    ),
    "half": (
        dense,
        points(),
        Fit(epochs=6, batch=32, precision=Precision(format="float16"), average=Average(), health=Health(nonfinite="roll back", every=3)),
    ),
    "plateau": (dense, points(), Fit(epochs=6, batch=32, optimizer="sgd", schedule="plateau", stop=Stop(patience=7, every=0.5))),
    "sampled": (
        dense,
        points(),
        Fit(
            epochs=6,
            batch=32,
            balance="sampling",
            warm_up=0,
            schedule=OfTorch(lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=5, cycle_momentum=False)),
        ),
    ),
}


class Interrupted(Exception):
    pass


def trainer(settings, folder, *, until=None):
    def stop(_, step, __):
        if step == until:
            raise Interrupted

    validation = points(40, seed=1) if settings.needs_validation else None
    return Trainer(settings=settings, validation=validation, checkpoints=Checkpoints(folder=folder, steps=1, seconds=1e9), after_step=stop)


@pytest.mark.parametrize("case", CASES)
def test_a_training_broken_off_in_a_pass_ends_with_the_same_bytes(case, tmp_path):
    build, view, settings = CASES[case]
    whole = trainer(settings, tmp_path / "whole").fit(seeded(build), view)
    for until in (2, 7, 11):
        with pytest.raises(Interrupted):
            trainer(settings, tmp_path / "parts", until=until).fit(seeded(build), view)
    other = seeded(build, 5)
    state = torch.get_rng_state()
    parts = trainer(settings, tmp_path / "parts").fit(other, view)
    assert torch.equal(torch.get_rng_state(), state)
    assert contents(parts.module) == contents(whole.module)
    assert (parts.curve, parts.looks, parts.ended, parts.findings) == (whole.curve, whole.looks, whole.ended, whole.findings)
    again = trainer(settings, tmp_path / "parts", until=1).fit(seeded(build, 5), view)
    assert contents(again.module) == contents(whole.module), "a finished training comes back at once"


def test_a_loader_is_taken_up_in_the_middle_of_its_pass(tmp_path):
    view, settings = points(), Fit(epochs=4, batch=32)
    loader = DataLoader(TensorDataset(torch.from_numpy(view.inputs[0]), torch.from_numpy(view.labels)), batch_size=32, shuffle=True)
    whole = Trainer(settings=settings).fit(seeded(dense), loader)
    with pytest.raises(Interrupted):
        trainer(settings, tmp_path, until=7).fit(seeded(dense), loader)
    assert contents(trainer(settings, tmp_path).fit(seeded(dense), loader).module) == contents(whole.module)


def work(folder: str, done: str) -> None:
    """Trains in a process of its own; says the digest of what came out."""
    settings = Fit(epochs=6, batch=16, learning_rate=0.01, average=Average())
    log = Log(Path(folder) / "log.jsonl")
    fitted = Trainer(settings=settings, checkpoints=Checkpoints(folder=Path(folder) / "c", steps=3), watch=log).fit(seeded(dense), points())
    Path(done).write_text(hashlib.sha256(repr(contents(fitted.module)).encode()).hexdigest())


def _started(folder, done):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hasten.train", "lessons", "torch._dynamo"])  # what an optimizer imports late
    process = context.Process(target=work, args=(str(folder), str(done)))
    process.start()
    return process


def killed(folder: Path, done: Path, kills: int, seed: int) -> int:
    """Runs `work`, killing it at random moments; how many kills hit a training under way."""
    rng, hits = random.Random(seed), 0
    for _ in range(kills):
        process = _started(folder, done)
        deadline = time.monotonic() + 60
        steps = len(list((folder / "c").glob("step-*"))) and max(p.name for p in (folder / "c").glob("step-*"))
        while process.is_alive() and time.monotonic() < deadline:
            now = [p.name for p in (folder / "c").glob("step-*")]
            if now and max(now) != steps:
                break  # it has begun
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()  # which it may be too late for
        process.join()
        hits += process.exitcode != 0
        if done.exists():
            break
    process = _started(folder, done)
    process.join(120)
    return hits


def _bytes_after(tmp_path, kills):
    whole, done = tmp_path / "whole", tmp_path / "digest"
    _started(whole, done).join(120)
    want, found, hits, attempt = done.read_text(), tmp_path / "found", 0, 0
    while hits < kills:
        attempt += 1
        hits += killed(tmp_path / f"run{attempt}", found, kills - hits, seed=attempt)
        assert found.read_text() == want
        assert [r.step for r in read(tmp_path / f"run{attempt}" / "log.jsonl")] == list(range(1, 55))
        found.unlink()
    return hits


def test_killed_three_times_the_bytes_are_the_same(tmp_path):
    assert _bytes_after(tmp_path, 3) >= 3


@pytest.mark.long(share=1)
def test_killed_25_times_the_bytes_are_the_same(tmp_path):
    assert _bytes_after(tmp_path, 25) >= 25


@pytest.mark.long
def test_killed_100_times_the_bytes_are_the_same(tmp_path):
    assert _bytes_after(tmp_path, 100) >= 100


def _broken_off(folder, settings=CASES["plain"][2]):
    with pytest.raises(Interrupted):
        trainer(settings, folder, until=9).fit(seeded(dense), points())
    return sorted(folder.glob("step-*"))


@pytest.mark.parametrize("fault", ["flipped bit", "cut off", "gone", "manifest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, fault):
    settings = CASES["plain"][2]
    whole = trainer(settings, tmp_path / "whole").fit(seeded(dense), points())
    newest = _broken_off(tmp_path / "parts")[-1]
    state = newest / ("manifest.json" if fault == "manifest" else "state.pt")
    data = bytearray(state.read_bytes())
    if fault == "gone":
        state.unlink()
    else:
        data[len(data) // 2] ^= 1
        state.write_bytes(data[: len(data) // 2] if fault in ("cut off", "manifest") else data)
    fitted = trainer(settings, tmp_path / "parts").fit(seeded(dense), points())
    assert contents(fitted.module) == contents(whole.module)
    assert f"the checkpoint {newest.name} is damaged and was passed over for the one before" in fitted.notes


def test_checkpoints_are_kept_apart(tmp_path):
    places = _broken_off(tmp_path)
    assert [p.name for p in places] == ["step-000000007", "step-000000008"]
    with pytest.raises(UsageError, match="holds a training with other settings, data or layers; choose a new folder"):
        trainer(replace(CASES["plain"][2], seed=1), tmp_path).fit(seeded(dense), points())
    with pytest.raises(UsageError, match="other settings, data or layers"):
        trainer(CASES["plain"][2], tmp_path).fit(seeded(plain), points())
    for place in places:
        (place / "state.pt").write_bytes(b"")
    with pytest.raises(StorageError, match=r"every checkpoint in .* is damaged; remove the folder"):
        trainer(CASES["plain"][2], tmp_path).fit(seeded(dense), points())
    lock = Checkpoints(folder=tmp_path).lock()
    with pytest.raises(RunLocked, match="is in use by process"):
        trainer(CASES["plain"][2], tmp_path).fit(seeded(dense), points())
    lock.release()


def test_the_log_writes_over_what_is_done_again(tmp_path):
    log = tmp_path / "log.jsonl"
    seen = []
    Trainer(settings=Fit(epochs=1, batch=30), watch=seen.append).fit(seeded(plain), points())
    for record in seen:
        Log(log)(record) if record.step == 1 else None
    first = Log(log)
    for record in seen[:4]:
        first(record)
    with open(log, "a") as file:
        file.write('{"step": 5, "st')  # killed while it wrote
    second = Log(log)
    for record in seen[2:]:
        second(record)
    assert read(log) == seen
    assert json.loads(log.read_text().splitlines()[0])["batch"] == 30
    lines = log.read_text().splitlines()
    log.write_text("\n".join(["nonsense", *lines]))
    with pytest.raises(StorageError, match=r"line 1 of .* is no record"):
        read(log)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"steps": 0}, "steps must be at least 1"), ({"seconds": -1}, "seconds must be at least 0"), ({"last": 1}, "last must be at least 2")],
)
def test_refusals(wrong, words):
    with pytest.raises(UsageError, match=words):
        Checkpoints(folder="x", **wrong)
