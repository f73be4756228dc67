"""The artifact: a folder that runs without hasten."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from hasten.core import folder
from hasten.core.recipe import Recipe
from hasten.core.report import Trial
from hasten.search.bench import Bench

_README = """\
# {words}

This folder runs without hasten.{standing}

    from load import load
    run = load(".")          # or this folder's path
    outputs = run(inputs)    # numpy arrays, one per input, first axis the batch; gives a tuple of arrays

`load.py` names the packages that it needs: {needs}. `recipe.json` rebuilds the network from the original with hasten,
`report.json` holds what was measured and proved, `manifest.json` the SHA-256 of every file.
"""


_UNPROVED = " It is the best so far of a search that has not ended: NOT PROVED on untouched data."


def package(
    run: Path, bench: Bench, trial: Trial, original: Trial, *, name: str = "artifact", proved: bool = True, ship: bool = True
) -> None:
    """Makes `run/name` from a trial's package; the folder that was there stays until the new one is whole.

    The network as given, unchanged in its own engine, is shipped as a `.pt2` program where torch can export it, alone
    can read it, and it gives the same; without `ship` as it ran.
    """
    source = bench.package(trial.number)
    with folder.new_folder(run / name) as fresh:
        shipped = ship and trial.number == original.number and bench.workshop.ship_original(fresh)
        if not shipped:
            shutil.copytree(source, fresh, dirs_exist_ok=True, ignore=shutil.ignore_patterns(folder.MANIFEST))
        recipe = Recipe.from_json(trial.recipe).to_json()
        (fresh / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
        packages = needs((fresh / "load.py").read_text()) + (["cloudpickle"] if (fresh / "network.pkl").exists() else [])
        (fresh / "README.md").write_text(_README.format(words=trial.words, standing="" if proved else _UNPROVED, needs=", ".join(packages)))


def add(place: Path, name: str, text: str) -> None:
    """Puts one more file into a finished folder and renews its manifest."""
    with folder.new_folder(place) as fresh:
        shutil.copytree(place, fresh, dirs_exist_ok=True, ignore=shutil.ignore_patterns(folder.MANIFEST))
        (fresh / name).write_text(text)


def needs(loader: str) -> list[str]:
    """Names of the packages that a `load.py` imports."""
    lines = [line.split() for line in loader.splitlines() if line.startswith(("import ", "from "))]
    named = [words[1:2] if words[0] == "from" else "".join(words[1:]).split(",") for words in lines]
    modules = {name.split(".")[0] for names in named for name in names}
    return sorted((modules - sys.stdlib_module_names) | {"numpy"})
