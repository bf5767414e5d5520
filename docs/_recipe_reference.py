"""Writes docs/recipe.md, the reference of every recipe key, from the models that read them. `make
docs` runs it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from reftune.recipe import Component, Recipe, component_class, known_kinds

PAGE = Path(__file__).with_name("recipe.md")
GROUPS = {
    "stages": "Stages",
    "algorithms": "Algorithms",
    "datasets": "Datasets",
    "formats": "Formats",
    "rewards": "Rewards",
    "engines": "Engines",
}
HEAD = """\
# Recipe reference

One YAML file is a run. Keys can be changed on the command line (`stages.reft.steps=100`); an
unknown key is refused with the nearest known one. `extends: other.yaml` starts from another recipe:
mappings merge, an explicit `null` removes a key.
This page is generated from the code that reads recipes.
"""


def page() -> str:
    """The whole page."""
    seen: set[type[BaseModel]] = set()
    parts = [HEAD, *_section("A recipe", Recipe, 2, seen)]
    for group, title in GROUPS.items():
        parts.append(f"## {title}\n")
        for kind in known_kinds(group):
            parts += _section(f"`kind: {kind}`", component_class(kind, group=group), 3, seen)
    return "\n".join(parts).rstrip() + "\n"


def _section(
    title: str, model: type[BaseModel], level: int, seen: set[type[BaseModel]]
) -> Iterator[str]:
    """A table of a model's keys, then those of the tables in it that were not `seen` yet."""
    yield f"{'#' * level} {title}\n"
    about = (
        model.__dict__.get("__doc__") or inspect.getmodule(model).__doc__
    )  # a plug-in's file may speak for its class
    yield f"{_cell(str(about))}\n"
    notes = _notes(model)
    rows = [
        f"| `{name}` | {_type(field.annotation)} | {_default(field)} |"
        f" {_cell(notes.get(name, ''))} |"
        for name, field in model.model_fields.items()
        if name != "kind"
    ]
    if rows:
        yield "| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    for name, field in model.model_fields.items():
        for table in _tables(field.annotation):
            if table in seen:
                yield f"`{name}`: the same table as [above](#{name}).\n"
                continue
            seen.add(table)
            yield from _section(f"`{name}`", table, level + 1, seen)


def _tables(annotation: Any) -> list[type[BaseModel]]:
    found = [
        annotation,
        *(inner for argument in get_args(annotation) for inner in (argument, *get_args(argument))),
    ]
    return [
        kind
        for kind in found
        if inspect.isclass(kind) and issubclass(kind, BaseModel) and not issubclass(kind, Component)
    ]


def _notes(model: type[BaseModel]) -> dict[str, str]:
    """Field → the text under it, of the model and of those it is made from."""
    notes: dict[str, str] = {}
    for base in reversed(
        [base for base in model.__mro__ if issubclass(base, BaseModel) and base is not BaseModel]
    ):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                notes[ast.unparse(field.target)] = inspect.cleandoc(str(below.value.value))
    return notes


def _type(annotation: Any) -> str:
    """What a key takes, in words: `float`, list of `str` or `null`, `base` or `float32`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"{_type(arguments[1])} by name"
    if annotation is None or annotation is NoneType:
        return "`null`"
    if annotation is Any:
        return "any value"
    if inspect.isclass(annotation) and issubclass(annotation, Component):
        return "a kind"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "table"
    return f"`{inspect.formatannotation(annotation)}`"


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "**required**"
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, dict) and "kind" in value:
        value = value["kind"]
    return (
        f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
