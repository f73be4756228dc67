"""The ledger of openings: *prove* data that was looked at once is no longer untouched, whatever run folder looked.

One line of JSON per opening, in the user's own state folder, appended whole; a torn last line is passed over.
"""

from __future__ import annotations

import fcntl
import json
import os
from datetime import UTC, datetime
from pathlib import Path

from hasten.core import folder
from hasten.core.errors import StorageError
from hasten.core.report import Opening


def state_folder() -> Path:
    """`$XDG_STATE_HOME/hasten`, by default under `~/.local/state`: what outlives a run."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser(os.path.join("~", ".local", "state"))
    return Path(state) / "hasten"


def ledger_file() -> Path:
    """`openings.jsonl` there."""
    return state_folder() / "openings.jsonl"


def check() -> None:
    """Raises StorageError where the ledger cannot be written: before a search, not behind it."""
    file = ledger_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        open(file, "ab").close()
    except OSError as why:
        raise StorageError(f"cannot write {file}: {why.strerror}; set XDG_STATE_HOME to a folder that can be written") from why


def record(fingerprint: str, candidates: tuple[int, ...], *, run: str) -> Opening:
    """Appends an opening and syncs it to disk; tells whether this data was opened before.

    Opened before means: by another run, or for other candidates.

    Args:
        fingerprint: of the *prove* view.
        candidates: numbers of the frozen trials.
        run: identity of the run, so that going on after a kill is not a second opening.

    Raises:
        StorageError: if the ledger cannot be written.
    """
    file = ledger_file()
    entry = {"fingerprint": fingerprint, "run": run, "candidates": list(candidates)}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with folder.storage(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            opened.seek(0)
            text = opened.read()
            same_data = [e for e in _entries(text) if e.get("fingerprint") == fingerprint]
            earlier = [e for e in same_data if {k: e.get(k) for k in entry} != entry]
            if len(earlier) == len(same_data):
                torn = b"\n" if text and not text.endswith(b"\n") else b""
                opened.write(torn + json.dumps({**entry, "when": now}).encode() + b"\n")
                opened.flush()
                os.fsync(opened.fileno())
    return Opening(fingerprint=fingerprint, when=now, candidates=candidates, reused=bool(earlier))


def _entries(text: bytes) -> list[dict[str, object]]:
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found
