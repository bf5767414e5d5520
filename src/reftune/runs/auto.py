"""Keys of a recipe that say `auto`: chosen once, when a run begins, and kept when it goes on."""

from __future__ import annotations

from typing import Any

import yaml

from reftune.errors import RecipeError
from reftune.model.precision import fastest_dtype
from reftune.processes import launch, world
from reftune.recipe import Recipe, parse_recipe
from reftune.storage.run_folder import RunFolder

Key = tuple[str, str]
"""A table of the recipe and one of its keys."""
Values = dict[Key, Any]
AUTO = "auto"
KEYS: tuple[Key, ...] = (("model", "dtype"),)


def settled(recipe: Recipe) -> Recipe:
    """`recipe` with a value for each `auto`: that of its run folder, or what suits this machine.

    All processes take the main one's.
    """
    return (
        _with(recipe, world.from_main(lambda: _choices(recipe))) if _open_keys(recipe) else recipe
    )


def _choices(recipe: Recipe) -> Values:
    chosen = _stored(recipe)
    remaining = _open_keys(_with(recipe, chosen))
    if ("model", "dtype") in remaining:
        chosen["model", "dtype"] = fastest_dtype(launch.choose_device(recipe.model.device))
    return chosen


def _open_keys(recipe: Recipe) -> list[Key]:
    return [key for key in KEYS if _value(recipe, key) == AUTO]


def _value(recipe: Recipe, key: Key) -> Any:
    table, name = key
    return getattr(getattr(recipe, table), name, None)


def _with(recipe: Recipe, values: Values) -> Recipe:
    for (table, name), value in values.items():
        changed = getattr(recipe, table).model_copy(update={name: value})
        recipe = recipe.model_copy(update={table: changed})
    return recipe


def _stored(recipe: Recipe) -> Values:
    """What the run folder's recipe says of the open keys; nothing if it is no run's."""
    try:
        stored = parse_recipe(yaml.safe_load(RunFolder(recipe.folder).recipe.read_bytes()))
    except (OSError, ValueError, TypeError, yaml.YAMLError, RecipeError):
        return {}
    found = {key: _value(stored, key) for key in _open_keys(recipe)}
    return {key: value for key, value in found.items() if value not in (None, AUTO)}
