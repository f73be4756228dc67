"""The live line of a working command: what is done now, the best so far, the time left. Plain lines when not a terminal."""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import IO, Any

from hasten.search.watch import Event

PLAIN_EVERY_S = 10.0


class Live:
    """A watcher that writes to a stream. A context manager.

    Args:
        stream: usually standard error.
        as_json: one JSON object per event (`Event.to_json`), for programs.
    """

    def __init__(self, stream: IO[str], *, as_json: bool = False) -> None:
        self._stream = stream
        self._as_json = as_json
        self._terminal = stream.isatty() and not as_json
        self._status: Any = None
        self._console: Any = None
        self._last = 0.0
        self._stage = ""

    def __enter__(self) -> Live:
        if self._terminal:
            from rich.console import Console

            self._console = Console(file=self._stream)
            self._status = self._console.status("starting", spinner="dots")
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, trace: TracebackType | None) -> None:
        if self._status:
            self._status.stop()

    def __call__(self, event: Event) -> None:
        """Shows the event."""
        line = describe(event)
        if self._status:
            from rich.text import Text

            if event.trial:
                self._console.print(Text(f"  {event.words}", style="dim"), soft_wrap=True)
            self._status.update(Text(line, overflow="ellipsis", no_wrap=True))
            return
        now = time.monotonic()
        if event.trial or event.stage != self._stage or now - self._last >= PLAIN_EVERY_S:
            self._last, self._stage = now, event.stage
            print(json.dumps(event.to_json()) if self._as_json else line, file=self._stream, flush=True)


def describe(event: Event) -> str:
    """The event in one line.

    >>> describe(Event(stage="proof", words="opening the proof data", elapsed_s=65, left_s=20, best="4.1× OnnxRuntime"))
    'proof 1:05, about 0:20 left · opening the proof data · best 4.1× OnnxRuntime'
    """
    left = f", about {_clock(event.left_s)} left" if event.left_s is not None else ""
    best = f" · best {event.best}" if event.best else ""
    return f"{event.stage} {_clock(event.elapsed_s)}{left} · {event.words}{best}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
