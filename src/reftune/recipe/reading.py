"""Reads a recipe file into a `Recipe`, applying `extends` and `key=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from reftune.errors import RecipeError
from reftune.recipe.schema import Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, resolve `extends`, apply `key=value` overrides, and validate the result.

    The key `extends` contains the path of another recipe, or a list of such paths, relative to the
    recipe's folder. Later recipes in the list override earlier recipes, and the recipe's own keys
    override all of them. `merge` describes how one recipe overrides another. The override
    `key=null` removes the key if the key names a stage or if its value is a mapping. Otherwise, the
    override sets the key to null. If a component that has a default, such as the reward, is null,
    the default is used.
    Raises: RecipeError if a recipe or an override cannot be read, or if the result is not valid.
    """
    data = read_yaml(Path(path))
    for override in overrides:
        _apply_override(data, override)
    return parse_recipe(data, where=str(path))


def parse_recipe(data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """The recipe that `data` describes. Raises: RecipeError if `data` is not valid; the message
    begins with `where`."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        try:
            problem = _first_problem(error)
        except UnicodeEncodeError as half:
            problem = f"{half.object!r} contains half a surrogate pair; expected Unicode"[:300]
        raise RecipeError(f"{where}: {problem}") from None


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that rejects a mapping if it contains a key twice. YAML forbids such mappings,
    but PyYAML accepts them."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} occurs twice", problem_mark=key.start_mark
                )
            keys.add(str(key.value))
        return node


def read_yaml(path: Path, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file as a dict, merged with the recipes that it extends. Raises: RecipeError if a
    file is missing, is not YAML, is not a mapping, contains a key twice, or extends itself."""
    try:
        if path.resolve() in _seen:
            raise RecipeError(f"{path}: extends itself")
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    # a date in month 13, an overlong number or bytes that are not UTF-8 raise ValueError
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise RecipeError(
            f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}"
        ) from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: expected a mapping of recipe keys, got {type(data).__name__}")
    for key in data:
        if not isinstance(key, str):
            raise RecipeError(f"{path}: expected keys that are text, got {key!r}")
    bases = data.pop("extends", [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise RecipeError(
                f"{path}: extends: expected a recipe or a list of them, got {base!r}"[:300]
            )
        merged = merge(merged, read_yaml(path.parent / base, (*_seen, path.resolve())))
    return merge(merged, data)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base`, changed by `over`. If a key's value is a mapping in both, the two mappings
    are merged, unless they have different values of `kind`. If one value is a string `s` and the
    other is a mapping, the string counts as `{kind: s}`. Any other value in `over` replaces the
    value in `base`. If a key of `base` is null in `over`, the key is removed."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(value, Mapping) and isinstance(old, str):
            old = {"kind": old}
        elif isinstance(value, str) and isinstance(old, Mapping):
            value = {"kind": value}
        if value is None and key in result:
            del result[key]
        elif (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and value.get("kind", old.get("kind")) == old.get("kind", value.get("kind"))
        ):
            result[key] = merge(old, value)
        else:
            result[key] = value
    return result


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"{override!r}: expected key=value, as in stages.reft.steps=100")
    value = _value(text)
    *parents, last = key.split(".")
    table = data
    for name in parents:
        own = table.get(name)
        own = {"kind": own} if isinstance(own, str) else own
        # a copy, because stages that use the same YAML alias share one table
        table[name] = dict(own) if isinstance(own, dict) else {}
        table = table[name]
    is_stage = parents == ["stages"] and last in table  # its table may be a bare kind
    if value is None and (is_stage or isinstance(table.get(last), dict)):
        del table[last]
    else:
        table[last] = value


def _value(text: str) -> Any:
    """The value in a `key=value` override. `text` is read as YAML, but `#` does not begin a
    comment, and a mapping needs braces. So "Think: end with ####" stays text."""
    is_enclosed = text.strip()[:1] + text.strip()[-1:] in ("{}", "[]", "''", '""')
    if not is_enclosed and re.search(r"(^|\s)#|:(\s|$)", text):
        return text
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unknown_key":
        return f"{where}.{first['msg']}" if where else first["msg"]
    message = first["msg"][:1].lower() + first["msg"][1:]
    if not where:
        return message
    is_of_table = isinstance(first["input"], Mapping) and "message" in first.get("ctx", {})
    if is_of_table or first["type"].endswith(("missing", "_kind", "_file", "_name", "_component")):
        return f"{where}: {message}"
    return f"{where}: {message}, got {first['input']!r}"[:300]
