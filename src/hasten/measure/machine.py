"""What this machine is: the figures mean nothing without it."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("hasten", "torch", "numpy", "onnx", "onnxruntime", "openvino", "nncf")
_TELLING_FLAGS = frozenset(
    "avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_int8 amx_bf16 asimddp bf16 i8mm".split()  # noqa: SIM905
)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def cpu() -> tuple[str, frozenset[str]]:
    """Name and instruction-set flags of the processor; ("unknown", empty) where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown", frozenset()
    pairs = (line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {key.strip(): value.strip() for key, value in pairs}
    return facts.get("model name", "unknown"), frozenset((facts.get("flags") or facts.get("Features") or "").split())


def has_int8_dot() -> bool:
    """Whether 8-bit products are summed in 32 bits at once (VNNI, AMX, Arm dot product). Without it they saturate in 16."""
    return bool(cpu()[1] & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})


def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    return bool(cpu()[1] & {"avx512_bf16", "amx_bf16", "bf16"})


def memory_bytes() -> int:
    """Physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory_bytes() -> int | None:
    """What a process can still get: the system's estimate, or what the control group has left where that is less; None if unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=None)


def energy_counter(root: Path = Path("/sys/class/powercap")) -> str | None:
    """None if the processor's energy counter (RAPL) can be read, else why not."""
    counters = sorted(root.glob("*rapl:*/energy_uj"))
    if not counters:
        return "the system offers no RAPL counter (usual in virtual machines)"
    try:
        int(counters[0].read_text())
    except (OSError, ValueError) as why:
        return f"{counters[0]} cannot be read ({getattr(why, 'strerror', None) or why}); run as root, or: sudo chmod a+r {counters[0]}"
    return None


def versions() -> dict[str, str]:
    """Installed releases of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """The machine as the report prints it."""
    name, flags = cpu()
    return {
        "cpu": name,
        "cores": cores(),
        "flags": sorted(flags & _TELLING_FLAGS),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
    }
