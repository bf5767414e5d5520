"""Reads recipes, which are YAML files of settings, and loads the plug-ins that recipes name."""

from reftune.recipe.kinds import Component as Component
from reftune.recipe.kinds import Table as Table
from reftune.recipe.kinds import component_class as component_class
from reftune.recipe.kinds import known_kinds as known_kinds
from reftune.recipe.kinds import load_component as load_component
from reftune.recipe.kinds import refusal as refusal
from reftune.recipe.kinds import shipped_recipes as shipped_recipes
from reftune.recipe.kinds import unknown_key as unknown_key
from reftune.recipe.reading import load_recipe as load_recipe
from reftune.recipe.reading import merge as merge
from reftune.recipe.reading import parse_recipe as parse_recipe
from reftune.recipe.schema import LengthTable as LengthTable
from reftune.recipe.schema import LoraTable as LoraTable
from reftune.recipe.schema import ModelTable as ModelTable
from reftune.recipe.schema import Recipe as Recipe
from reftune.recipe.schema import ScratchTable as ScratchTable
from reftune.recipe.schema import TrackerName as TrackerName
from reftune.recipe.schema import dump_recipe as dump_recipe
from reftune.recipe.schema import local_path as local_path
