"""Energy, where the processor counts it (RAPL, through the kernel's powercap files)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_LEAST_S = 0.5  # the counters move about a thousand times a second


def unreadable(root: Path = POWERCAP) -> str | None:
    """None where the counters can be read, else why not."""
    found = _packages(root)
    if not found:
        return f"energy needs the RAPL counters of {root}, and this machine shows none; leave energy out of the objective"
    try:
        _read(found)
    except OSError as why:
        return f"energy needs read permission on {found[0]}: {why.strerror}; leave energy out, or let an administrator allow it"
    return None


def energy_mj(call: Callable[[int], object], *, root: Path = POWERCAP, clock: Callable[[], float] = time.perf_counter) -> float:
    """Millijoules of one call, all processor packages together, what else runs meanwhile included.

    Args:
        call: is asked for a number of consecutive calls; the number is doubled until they take half a second.

    Raises:
        OSError: where the counters cannot be read; see `unreadable`.
    """
    files = _packages(root)
    spans = [int((f.parent / "max_energy_range_uj").read_text()) for f in files]
    count = 1
    while True:
        before, start = _read(files), clock()
        call(count)
        seconds, after = clock() - start, _read(files)
        if seconds >= _LEAST_S:
            break
        count *= 2
    micro = sum((b - a) % span for a, b, span in zip(before, after, spans, strict=True))  # counters wrap around
    return micro / 1e3 / count


def _packages(root: Path) -> list[Path]:
    """Files of whole packages; `intel-rapl:0:0` and the like are parts of them."""
    return sorted(p / "energy_uj" for p in root.glob("*-rapl:*") if p.name.count(":") == 1 and (p / "energy_uj").exists())


def _read(files: list[Path]) -> list[int]:
    return [int(f.read_text()) for f in files]
