"""Recipes: the schema, YAML loading, dotted overrides, and errors of one sentence."""

from toolkit.config.load import dump, find, load_recipe, read_yaml, shipped, validate
from toolkit.config.outputs import ExportSection
from toolkit.config.schema import Recipe

__all__ = ["ExportSection", "Recipe", "dump", "find", "load_recipe", "read_yaml", "shipped", "validate"]
