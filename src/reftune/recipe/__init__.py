"""Recipes and plug-ins. A recipe is a table of keys read from YAML. It names plug-ins by their
kinds."""

from reftune.recipe.kinds import (
    Component,
    Table,
    component_class,
    known_kinds,
    load_component,
    refusal,
    shipped_recipes,
    unknown_key,
)
from reftune.recipe.reading import load_recipe, merge, parse_recipe, read_yaml
from reftune.recipe.schema import (
    LengthTable,
    LoraTable,
    ModelTable,
    Recipe,
    ScratchTable,
    TrackerName,
    dump_recipe,
)

__all__ = [
    "Component",
    "LengthTable",
    "LoraTable",
    "ModelTable",
    "Recipe",
    "ScratchTable",
    "Table",
    "TrackerName",
    "component_class",
    "dump_recipe",
    "known_kinds",
    "load_component",
    "load_recipe",
    "merge",
    "parse_recipe",
    "read_yaml",
    "refusal",
    "shipped_recipes",
    "unknown_key",
]
