"""Recipes are values: they check their order, print, and rebuild themselves from their JSON."""

from __future__ import annotations

import json

import pytest

from hasten.core.errors import UsageError
from hasten.core.recipe import Recipe, part_from_json, part_to_json
from hasten.search.workshop import LOWER, actions, key
from methods import Mend, Quick, Quicker, Round, Shrink, Slow


def test_order_is_checked_at_construction() -> None:
    Recipe((Shrink(), Mend(), Round()), Quick())
    with pytest.raises(UsageError, match="Shrink must come before Mend"):
        Recipe((Mend(), Shrink()), Quick())
    with pytest.raises(UsageError, match="Slow needs a module but follows Round"):
        Recipe((Round(),), Slow())


def test_a_recipe_rebuilds_itself_from_its_json() -> None:
    recipe = Recipe((Shrink(amount=0.25, layers=("a", "b")), Round(bits=4)), Quick(threads=1))
    record = json.loads(json.dumps(recipe.to_json()))
    assert Recipe.from_json(record) == recipe
    assert Recipe.from_json(record).key() == recipe.key()
    assert Recipe((), Quick()).key() != Recipe((), Quick(threads=1)).key()


def test_it_prints_what_differs_from_the_defaults() -> None:
    recipe = Recipe((Shrink(), Round(bits=4)), Quick(threads=1))
    assert str(recipe) == "Shrink → Round(bits=4) → Quick(threads=1)"


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"steps": 3, "engine": None},
        {"steps": [], "engine": {"name": "os.system"}},
        {"steps": [], "engine": {"name": "antigravity.Engine"}},
        {"steps": [], "engine": {"name": "methods.Quick", "speed": 9}},
    ],
)
def test_a_strange_recipe_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Recipe.from_json(record)


def test_a_recipe_from_outside_imports_nothing() -> None:
    import sys

    with pytest.raises(UsageError, match="import the module"):
        part_from_json({"name": "this.Engine"})
    assert "this" not in sys.modules


def test_lowering_happens_once_where_forms_change() -> None:
    assert actions(Recipe((Shrink(), Round()), Quick()), "module") == [Shrink(), LOWER, Round()]
    assert actions(Recipe((Shrink(),), Quick()), "module") == [Shrink(), LOWER]
    assert actions(Recipe((Shrink(),), Slow()), "module") == [Shrink()]
    assert actions(Recipe((Round(),), Quick()), "graph") == [Round()]


def test_the_cache_knows_engines_apart_only_where_a_step_reads_the_profile() -> None:
    assert key([Shrink()], Quick().profile) == key([Shrink()], Quicker().profile)
    assert key([LOWER, Round()], Quick().profile) != key([LOWER, Round()], Quicker().profile)
    assert key([Shrink()], Quick().profile) != key([Shrink(amount=0.25)], Quick().profile)


def test_names_are_those_of_the_room() -> None:
    from hasten.engines import OnnxRuntime

    assert part_to_json(OnnxRuntime())["name"] == "hasten.engines.OnnxRuntime"
