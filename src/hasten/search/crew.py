"""Building ahead: while one trial is packed, scored and timed, helpers work on what the search will probably ask for next.

A search is a dialogue, one trial after another, and stays one however many help, so that its result does not depend on their number.
Helpers try nothing and choose nothing: they fill the cache of recipe beginnings (`workshop.py`), which is where the training is. A
wrong guess costs a helper's time and nothing else. While a network is timed, every helper on this machine is stopped.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Protocol

from hasten.core.errors import BackendMissing, ChildFailed, HastenError, WorkerLost
from hasten.core.recipe import Recipe
from hasten.core.report import Trial
from hasten.search.board import Dialogue

Progress = Callable[[float, str], None]
_FAR = 1000  # trials; no search is looked at further ahead
_LOSSES = 2  # a recipe over which so many workers were lost is not given to another


class Helper(Protocol):
    """Builds beginnings of recipes into the cache of a run, in a process of its own."""

    def build(self, recipe: Recipe, progress: Progress | None = None) -> None:
        """Applies the steps. Raises what they raise, ChildFailed, or WorkerLost."""
        ...

    def pause(self) -> None:
        """Stops it while something is timed here; nothing starts there until `resume`."""
        ...

    def resume(self) -> None:
        """Lets it go on."""
        ...

    def stop(self) -> None:
        """Ends what it does now; its `build` raises ChildFailed. From any thread."""
        ...

    def close(self) -> None:
        """Ends its process."""
        ...


@dataclass(eq=False)
class _Job:
    recipe: Recipe
    state: str = "waiting"  # "running", "done"
    error: HastenError | None = None
    dropped: bool = False
    losses: int = 0
    heard: tuple[float, str] | None = None


class Crew:
    """Helpers and the list of what they should build, the most wanted first. Every method is for the search's own thread.

    Args:
        helpers: each is used by one thread, which lives as long as the crew.
        at_the_end: called by `close`.
    """

    def __init__(self, helpers: Sequence[Helper], *, at_the_end: Callable[[], None] = lambda: None) -> None:
        self._helpers = list(helpers)
        self._at_the_end = at_the_end
        self._changed = threading.Condition()
        self._jobs: dict[object, _Job] = {}
        self._wanted: list[_Job] = []
        self._under_way: dict[int, _Job] = {}
        self._open = True
        self._threads = [threading.Thread(target=self._work, args=(at,), daemon=True) for at in range(len(helpers))]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        return len(self._helpers)

    def follow(self, begin: Callable[[], Dialogue], said: Sequence[Trial]) -> None:
        """Expects what a dialogue will probably ask for after these trials (`foresee`)."""
        self.expect(foresee(begin, said, len(self) + 1))

    def expect(self, recipes: Sequence[Recipe]) -> None:
        """What will probably be asked for, the soonest first; replaces an earlier list. What is under way goes on."""
        with self._changed:
            self._wanted = list(dict.fromkeys(self._job(r) for r in recipes if r.steps))
            self._changed.notify_all()

    def wait(self, recipe: Recipe, progress: Progress | None = None, *, deadline_s: float = math.inf) -> None:
        """Returns when the beginning of the recipe is in the cache, or when no helper is left to build it.

        Where all helpers are busy with guesses that turned out wrong, one of them is taken off its work.

        Raises:
            HastenError: what building it raised.
            ChildFailed: if it takes longer than `deadline_s`, or `progress` raises it.
        """
        if not recipe.steps:
            return
        end = time.monotonic() + deadline_s
        with self._changed:
            job = self._job(recipe)
            if job not in self._wanted:
                self._wanted.insert(0, job)
            self._changed.notify_all()
            while job.state != "done" and self._helpers_left():
                self._make_room(job)
                self._changed.wait(0.2)
                try:
                    _tell(progress, job)
                    _in_time(end, deadline_s)
                except ChildFailed:
                    self._wanted.remove(job)
                    self._end([at for at, other in self._under_way.items() if other is job])
                    raise
        if job.error:
            raise job.error

    @contextlib.contextmanager
    def rest(self) -> Iterator[None]:
        """Nobody works inside."""
        with contextlib.ExitStack() as stack:
            for helper in self._helpers:
                helper.pause()
                stack.callback(helper.resume)
            yield

    def drop(self) -> None:
        """Nothing more is wanted: whatever is under way is ended."""
        self.expect(())
        with self._changed:
            self._end(list(self._under_way))

    def close(self) -> None:
        """Ends all processes and threads."""
        with self._changed:
            self._open = False
            self._wanted = []
            self._end(list(self._under_way))
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for helper in self._helpers:
            helper.close()
        self._at_the_end()

    def _job(self, recipe: Recipe) -> _Job:
        """The job of a recipe; recipes that differ only behind what is built share one."""
        told = recipe.engine.profile if any(step.reads_profile for step in recipe.steps) else None
        return self._jobs.setdefault((recipe.steps, recipe.engine.takes, told), _Job(recipe))

    def _helpers_left(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _make_room(self, job: _Job) -> None:
        busy = len(self._under_way) == sum(thread.is_alive() for thread in self._threads)
        if job.state == "waiting" and busy and not any(j.dropped for j in self._under_way.values()):
            self._end([at for at, other in self._under_way.items() if other not in self._wanted][:1])

    def _end(self, which: Sequence[int]) -> None:
        for at in which:
            self._under_way[at].dropped = True
            self._helpers[at].stop()

    def _work(self, at: int) -> None:
        while (job := self._take(at)) is not None:
            error: HastenError | None = None
            try:
                self._helpers[at].build(job.recipe, lambda share, words, job=job: setattr(job, "heard", (share, words)))  # type: ignore[misc]
            except BackendMissing:
                self._give_back(at, job)
                return  # this helper cannot start again
            except HastenError as why:
                error = why
            except Exception as why:  # an error of ours must not leave the search waiting for ever
                error = ChildFailed(f"{type(why).__name__}: {why}")
            if job.dropped:
                self._helpers[at].close()  # stopped, perhaps a moment too late: what comes next gets a fresh process
            self._put(at, job, error)

    def _take(self, at: int) -> _Job | None:
        with self._changed:
            while self._open:
                job = next((j for j in self._wanted if j.state == "waiting"), None)
                if job is not None:
                    job.state, job.dropped, job.heard = "running", False, None
                    self._under_way[at] = job
                    return job
                self._changed.wait()
        return None

    def _put(self, at: int, job: _Job, error: HastenError | None) -> None:
        job.losses += isinstance(error, WorkerLost)
        if (job.dropped and error) or (isinstance(error, WorkerLost) and job.losses < _LOSSES):
            self._give_back(at, job)
            return
        with self._changed:
            del self._under_way[at]
            job.state, job.error = "done", error
            self._changed.notify_all()

    def _give_back(self, at: int, job: _Job) -> None:
        with self._changed:
            del self._under_way[at]
            job.state = "waiting"
            self._changed.notify_all()


def _tell(progress: Progress | None, job: _Job) -> None:
    if progress and job.heard:
        progress(*job.heard)


def _in_time(end: float, deadline_s: float) -> None:
    if time.monotonic() > end:
        raise ChildFailed(f"no answer within {deadline_s:.0f} s, stopped")


def foresee(begin: Callable[[], Dialogue], said: Sequence[Trial], most: int) -> list[Recipe]:
    """What a dialogue will probably ask for, the soonest first, up to `most` recipes; the first is what it does ask for.

    Two futures are followed in turn: the trials to come bring nothing; the next one pays, and what follows it brings nothing.

    Args:
        begin: starts the dialogue from its beginning.
        said: the trials that it has been sent.
    """
    paths = (_future(begin, said, most, pays=pays) for pays in (False, True))
    mixed = chain.from_iterable(zip_longest(*paths))
    return list(dict.fromkeys(recipe for recipe in mixed if recipe is not None))[:most]


def to_come(begin: Callable[[], Dialogue], said: Sequence[Trial]) -> float:
    """How many trials a dialogue will probably still ask for: the mean of the two futures."""
    return sum(1.0 for pays in (False, True) for _ in _future(begin, said, _FAR, pays=pays)) / 2


def _future(begin: Callable[[], Dialogue], said: Sequence[Trial], most: int, *, pays: bool) -> Iterator[Recipe]:
    dialogue = begin()
    try:
        recipe = next(dialogue)
        for trial in said:
            recipe = dialogue.send(trial)
        for ahead in range(most):
            yield recipe
            recipe = dialogue.send(_guess(recipe, said, pays=pays and ahead == 0))
    except StopIteration:
        return


def _guess(recipe: Recipe, said: Sequence[Trial], *, pays: bool) -> Trial:
    told = Trial(number=-1, recipe=recipe.to_json(), words=str(recipe), state="failed", reason="not tried yet")
    measured = [t.measurement for t in said if t.measurement]
    if not (pays and measured):
        return told
    best = min(measured, key=lambda m: m.latency[0].p50_ms)
    faster = tuple(replace(entry, p50_ms=entry.p50_ms / 2) for entry in best.latency)
    return replace(told, state="finished", reason=None, measurement=replace(best, latency=faster, score_drop=0.0))
