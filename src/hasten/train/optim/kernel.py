"""Compiles the source of a kernel with the system's C++ compiler, once per user and machine, and calls it.

The cache is content-addressed: source, compiler, its flags and the processor's flags make the name. What is loaded from it is code, so
the folder and the file must belong to the user and be writable by nobody else.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hasten.core.errors import BackendMissing
from hasten.measure import machine
from hasten.train.optim.source import Form, written

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")

Kernel = Callable[[Sequence[int], Sequence[int], Sequence[float], int, int], list[float]]
"""(sizes, pointers, numbers, seed, how many sums) → the sums; pointers and numbers of the tensors one behind the other."""


@functools.cache
def kernel(form: Form) -> Kernel:
    """The compiled kernel of `form`. Raises BackendMissing where there is no compiler, or it fails."""
    return compiled(written(form))


def compiled(source: str) -> Kernel:
    """Compiles, or finds compiled, a source whose symbol is `run`."""
    call = _loaded(source).run
    call.restype = None
    call.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 3, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_int]

    def run(sizes: Sequence[int], pointers: Sequence[int], numbers: Sequence[float], seed: int, sums: int) -> list[float]:
        lengths, arrays, given = array.array("q", sizes), array.array("Q", pointers), array.array("d", numbers)
        found = array.array("d", bytes(8 * (sums + 1)))
        places = [a.buffer_info()[0] for a in (lengths, arrays, given, found)]
        call(len(lengths), *places[:3], seed, places[3], torch.get_num_threads())
        return found[:sums].tolist()

    return run


@functools.cache
def missing() -> str | None:
    """Why this process has no fused kernels, or None where it has: a kernel of nothing is compiled, or found."""
    try:
        compiled('extern "C" void run() {}')
    except BackendMissing as why:
        return str(why)
    return None


@functools.cache
def _compiler() -> tuple[str, str]:
    """Its path and what it says of itself."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            return path, said
    raise BackendMissing(f"fused optimizers need a C++ compiler, found no {wanted or 'c++, g++ or clang++'}; install one or set CXX")


def _loaded(source: str) -> ctypes.CDLL:
    path, said = _compiler()
    cpu = " ".join(sorted(machine.cpu()[1]))
    name = hashlib.sha256("\0".join((source, path, said, *_FLAGS, cpu)).encode()).hexdigest()[:32]
    file = folder() / f"{name}.so"
    if not file.exists():
        _build(path, source, file)
    _trusted(file)
    try:
        return ctypes.CDLL(str(file))
    except OSError:  # a damaged file
        _build(path, source, file)
        return ctypes.CDLL(str(file))


def _build(compiler: str, source: str, file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as place:
        made = Path(place) / "kernel.so"
        (Path(place) / "kernel.cpp").write_text(source)
        done = subprocess.run(
            [compiler, *_FLAGS, "-o", str(made), str(made.with_suffix(".cpp"))], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BackendMissing(f"fused optimizers need a C++ compiler with OpenMP, {compiler} failed: {done.stderr.strip()[-500:]}")
        made.chmod(0o700)
        made.replace(file)


def folder() -> Path:
    """`$XDG_CACHE_HOME/hasten/kernels`, by default under `~/.cache`; a folder of this process alone where that cannot be written."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hasten" / "kernels"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return _private()
    _trusted(root)
    return root if os.access(root, os.W_OK) else _private()


@functools.cache
def _private() -> Path:
    place = tempfile.TemporaryDirectory(prefix="hasten-kernels-")  # removed when the process ends
    atexit.register(place.cleanup)
    return Path(place.name)


def _trusted(path: Path) -> None:
    facts = path.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022 or stat.S_ISLNK(facts.st_mode):
        raise BackendMissing(
            f"{path} holds code and must be the user's own and writable by nobody else; remove it or set XDG_CACHE_HOME to another folder"
        )
