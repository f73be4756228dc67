"""The settings that engines share: threads and the number format of floats."""

from __future__ import annotations

import importlib.util
import lzma
import shutil
from pathlib import Path
from typing import Literal

from hasten.measure import machine

Precision = Literal["fp32", "bf16"]

# What both ONNX Runtime and OpenVINO run on integers, and what only moves numbers (measured by benchmarks/placement.py).
INTEGER_OPS = frozenset({"Conv", "Gemm", "MatMul", "Add", "GlobalAveragePool", "AveragePool"})
PASSING_OPS = frozenset({"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Resize"})


def check(threads: int, precision: Precision = "fp32") -> None:
    """Raises ValueError on a setting that no machine has."""
    if threads < 0:
        raise ValueError(f"threads must be >= 0 (0 for all cores), got {threads}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")


def resolve(threads: int) -> int:
    """The number of threads: 0 means every core of this machine."""
    return threads or machine.cores()


def thread_choices() -> tuple[int, ...]:
    """All cores, and one where there are several: a small network loses more by waking threads than they bring."""
    return (0, 1) if machine.cores() > 1 else (0,)


def precision_choices() -> tuple[Precision, ...]:
    """The float formats that this processor multiplies itself."""
    return ("fp32", "bf16") if machine.has_bf16() else ("fp32",)


def missing(package: str, precision: Precision = "fp32") -> str | None:
    """Why an engine of `package` cannot run here, or None."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; run: pip install {package}"
    if precision == "bf16" and not machine.has_bf16():
        return "this processor has no bfloat16 instructions"
    return None


def no_compiler(engine: str) -> str | None:
    """Why an engine that compiles C++ cannot run here, or None."""
    if any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return None
    return f"{engine} needs a C++ compiler; install g++"


def compress(*files: Path) -> None:
    """Puts `<file>.xz` in the place of each file.

    The filter is told that the data are mostly 32-bit numbers, whose bytes repeat at distances of four.
    """
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 2, "pb": 2}]
    for file in files:
        file.with_name(file.name + ".xz").write_bytes(lzma.compress(file.read_bytes(), filters=filters))
        file.unlink()
