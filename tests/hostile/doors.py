"""Where a hostile file is brought to: what a user's command would call, or the guard of a format. And how that went, in a child."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.applying import read_recipe
from hasten.core.errors import HastenError
from hasten.load import guards
from hasten.load.data import read
from hasten.load.files import open_network
from hasten.load.guards.places import room_for

DOORS: dict[str, Callable[[Path], Any]] = {
    "model": open_network,
    "data": read,
    "recipe": read_recipe,
    "pt": guards.open_checkpoint,
    "zip": guards.read_zip,
    "safetensors": guards.check_safetensors,
    "keras": guards.read_keras,
    "h5": guards.check_hdf5,
    "tflite": lambda path: guards.check_tflite(path.read_bytes(), path.name),
    "saved model": guards.check_saved_model,
}


def bring(door: str, path: Path) -> dict[str, Any]:
    """Opens a file in a child as `hasten.prepare` does: what came of it, the seconds and the bytes that it took."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = _status("VmRSS"), time.monotonic()
    said, kind = "", "loaded"
    try:
        with room_for(path):
            DOORS[door](path)
    except HastenError as why:
        said, kind = str(why), type(why).__name__
    except Exception as why:
        said, kind = f"{type(why).__name__}: {why}"[:300], "raised"
    return {"kind": kind, "said": said, "seconds": time.monotonic() - start, "bytes": max(0, _status("VmHWM") - before)}


def _status(name: str) -> int:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
    return 0


def bring_case(*, name: str, folder: str) -> dict[str, Any]:
    """Makes one case of the corpus in a folder and opens it."""
    from hostile import CASES

    case = next(c for c in CASES if c.name == name)
    path = case.write(Path(folder) / "given")
    bring("recipe", Path(folder) / "no such file")  # what the first call of all imports is no part of it
    return bring(case.door, path)


def bring_mutants(*, kind: str, first: int, count: int, folder: str) -> list[dict[str, Any]]:
    """Makes `count` mutants of one format and opens each; tells the number of the one that is opened now."""
    from hasten.core.child import report_progress
    from hostile.mutations import SEEDS, mutant

    seed, found = SEEDS[kind], []
    path = Path(folder) / seed.file
    for number in range(first, first + count):
        path.write_bytes(mutant(kind, number))
        report_progress(number, kind)
        found.append({"number": number, **bring(seed.door, path)})
    return found
