"""First guesses from earlier runs on this machine: what settings came out best on a network of the same architecture.

A guess is where a search begins to look, never a result: every figure is measured again. The guesses lie beside the ledger of openings, one
file for each architecture, processor and objective; without them, or where they cannot be read, a search begins at the usual settings.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hasten.core import folder
from hasten.core.errors import HastenError
from hasten.core.recipe import Recipe, Step, fingerprint, part_from_json, part_to_json
from hasten.search import ledger


def place(told: Sequence[Any]) -> Path:
    """`guesses/KEY.json` in the state folder; `told`: all that a guess depends on, as JSON."""
    return ledger.state_folder() / "guesses" / f"{fingerprint(list(told))[:32]}.json"


def remember(file: Path, recipe: Recipe) -> None:
    """Keeps the steps of a result for the next search; a cache that cannot be written is done without."""
    with contextlib.suppress(HastenError, OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        for left in file.parent.glob(f".{file.name}.*.part"):  # by one that was killed
            left.unlink(missing_ok=True)
        folder.write(file, json.dumps([part_to_json(step) for step in recipe.steps]) + "\n")


def recall(file: Path) -> list[dict[str, Any]]:
    """The steps that were kept, as JSON; none where there is nothing that can be read."""
    try:
        records = json.loads(file.read_text())
        return [record for record in records if parts([record])]
    except (OSError, ValueError, TypeError):
        return []


def parts(records: Sequence[dict[str, Any]]) -> dict[type[Step], Step]:
    """The steps by their kind; what this version cannot build is left out."""
    found: dict[type[Step], Step] = {}
    for record in records:
        with contextlib.suppress(HastenError, ValueError, TypeError, KeyError, AttributeError):
            step = part_from_json(record)
            found[type(step)] = step
    return found
