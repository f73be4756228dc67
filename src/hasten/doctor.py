"""What this machine is, which engines run on it, and what is missing with the command that brings it."""

from __future__ import annotations

import re
import shutil
from importlib import metadata
from typing import Any

from hasten.measure import machine

_COMPILERS = ("c++", "g++", "clang++")


def doctor() -> dict[str, Any]:
    """The machine, its engines, and the extras.

    Returns:
        {"environment" (CPU, cores, flags, memory, versions), "free_memory_bytes", "int8_dot_product", "bfloat16", "energy_counter"
        (null if it can be read, else why not), "compiler", "engines" (each, on each provider and device that it knows, with `engine` and
        `missing`: null, or why not), "extras" (by name: `missing` packages and the `command` that installs them), "outdated" (required
        packages that are not here or too old)}.
    """
    from hasten import engines
    from hasten.core.recipe import describe

    return {
        "environment": machine.environment(),
        "free_memory_bytes": machine.free_memory_bytes(),
        "int8_dot_product": machine.has_int8_dot(),
        "bfloat16": machine.has_bf16(),
        "energy_counter": machine.energy_counter(),
        "compiler": next(filter(None, map(shutil.which, _COMPILERS)), None),
        "engines": [{"engine": describe(e), "missing": e.available()} for e in engines.variants()],
        "extras": _extras(_requirements()),
        "outdated": _outdated(_requirements()),
    }


def show(found: dict[str, Any], console: Any) -> None:
    """Prints what `doctor` found."""

    def line(words: str) -> None:
        console.print(words, highlight=False, markup=False, soft_wrap=True)

    where = found["environment"]
    free = "" if found["free_memory_bytes"] is None else f", {found['free_memory_bytes'] / 2**30:.1f} free"
    line(f"{where['cpu']}, {where['cores']} cores, {where['memory_bytes'] / 2**30:.0f} GiB{free}, {where['system']}")
    line(f"8-bit dot products: {_yes(found['int8_dot_product'])}, bfloat16: {_yes(found['bfloat16'])} ({', '.join(where['flags'])})")
    line(f"energy counter: {found['energy_counter'] or 'readable'}")
    line(f"C++ compiler: {found['compiler'] or 'none, so no fused optimizers and no torch.compile; install g++'}")
    line(", ".join(f"{name} {version}" for name, version in where["versions"].items()))
    for row in found["engines"]:
        line(f"engine {row['engine']}: {row['missing'] or 'ready'}")
    for name, extra in found["extras"].items():
        said = f"{', '.join(extra['missing'])} missing; {extra['command']}" if extra["missing"] else "complete"
        line(f"extra {name}: {said}")
    for words in found["outdated"]:
        line(words)


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _requirements() -> list[str]:
    """As the installed package declares them; none where it runs from a bare source tree."""
    try:
        return metadata.requires("hasten") or []
    except metadata.PackageNotFoundError:
        return []


def _extras(requirements: list[str]) -> dict[str, dict[str, Any]]:
    """The optional packages by extra; an extra that takes others in is only named for its own packages."""
    found: dict[str, dict[str, Any]] = {}
    for line in requirements:
        extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", line)
        name = _name(line)
        if not extra or extra[1] == "dev" or name == "hasten":
            continue
        row = found.setdefault(extra[1], {"missing": [], "command": f"pip install 'hasten[{extra[1]}]'"})
        if _version(name) is None:
            row["missing"].append(name)
    return found


def _outdated(requirements: list[str]) -> list[str]:
    """Required packages that are missing, or older than the floor."""
    said = []
    for line in (r for r in requirements if "extra" not in r):
        name, floor = _name(line), re.search(r">=\s*([\d.]+)", line)
        here = _version(name)
        if here is None:
            said.append(f"required {name} is missing: pip install '{line}'")
        elif floor and _numbers(here) < _numbers(floor[1]):
            said.append(f"required {name} is {here}, at least {floor[1]} is needed: pip install --upgrade {name}")
    return said


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    return found[0] if found else requirement


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release as numbers, which compare as they should where texts do not.

    >>> _numbers("2.13.0+cpu"), _numbers("1.9") < _numbers("1.22")
    ((2, 13, 0), True)
    """
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
